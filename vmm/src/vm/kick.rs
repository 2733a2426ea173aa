//! Kicks: how another thread gets a vCPU out of the guest.
//!
//! A kick is the signal `SIGRTMIN`, whose handler sets `immediate_exit` in the `kvm_run` of the
//! vCPU. The signal alone is not enough: if it arrived between the check of a request and
//! `KVM_RUN`, it would be lost and the guest would run on.

use std::cell::Cell;
use std::io;
use std::ptr;

use kvm_ioctls::VcpuFd;
use libc::{c_int, c_void, siginfo_t};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs. A const initializer and no destructor,
    /// so that the signal handler may use it.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

extern "C" fn on_kick(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    IMMEDIATE_EXIT.with(|cell| {
        let flag = cell.get();
        if !flag.is_null() {
            // SAFETY: `run_kickable` set the pointer on this thread to a byte of its `kvm_run`, and
            // resets it before that mapping can go.
            unsafe { flag.write_volatile(1) };
        }
    });
}

/// Installs the handler of kicks for this process. The signal is `SIGRTMIN`; a program that embeds
/// a monitor must leave it alone.
///
/// # Errors
/// The handler cannot be installed.
pub fn install_kick_handler() -> io::Result<()> {
    register_signal_handler(SIGRTMIN(), on_kick).map_err(Into::into)
}

/// Runs `f` so that a kick of this thread gets the vCPU out of the guest.
pub fn run_kickable<T>(fd: &mut VcpuFd, f: impl FnOnce(&mut VcpuFd) -> T) -> T {
    IMMEDIATE_EXIT.set(&raw mut fd.get_kvm_run().immediate_exit);
    let result = f(fd);
    IMMEDIATE_EXIT.set(ptr::null_mut());
    result
}
