//! The handler of SIGSYS: reports the call that a filter refused, then ends the process.

use std::cell::Cell;
use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicI32, Ordering};

use libc::{c_int, c_void, siginfo_t};
use vmm_sys_util::signal::register_signal_handler;

use super::syscall_names::syscall_name;

/// The descriptor that refused calls are reported to.
static REPORT_FD: AtomicI32 = AtomicI32::new(libc::STDERR_FILENO);

thread_local! {
    /// The name of this thread in reports. It has neither a destructor nor lazy initialization, so
    /// that the handler may read it.
    static THREAD_NAME: Cell<&'static str> = const { Cell::new("unfiltered") };
}

/// Sets the name that this thread's refused calls are reported under.
pub(super) fn set_thread_name(name: &'static str) {
    THREAD_NAME.set(name);
}

/// Installs the handler, which reports to `report_fd`.
///
/// The other handlers of the standard library are removed: a fault (SIGSEGV, SIGBUS) ends the
/// process with its own signal. The standard library's handler would call `rt_sigaction`, which the
/// filters refuse, and the fault would be reported as a refused call.
///
/// # Errors
/// The kernel rejects the handler.
pub(super) fn install_handler(report_fd: RawFd) -> io::Result<()> {
    REPORT_FD.store(report_fd, Ordering::Relaxed);
    register_signal_handler(libc::SIGSYS, on_refused_call)?;
    for signal in [libc::SIGSEGV, libc::SIGBUS] {
        // SAFETY: the default action runs no code of this process, and the standard library does
        // not rely on its handler: a guard page without it still ends the process.
        if unsafe { libc::signal(signal, libc::SIG_DFL) } == libc::SIG_ERR {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// The start of a `siginfo_t` of SIGSYS, as 64-bit Linux lays it out.
#[repr(C)]
struct RefusedCall {
    signal: c_int,
    errno: c_int,
    code: c_int,
    _pad: c_int,
    address: *mut c_void,
    number: c_int,
    architecture: u32,
}

extern "C" fn on_refused_call(_: c_int, info: *mut siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel passes a valid `siginfo_t`, which is at least as long as its start.
    let refused = unsafe { info.cast::<RefusedCall>().read() };
    let number = usize::try_from(refused.number).unwrap_or(usize::MAX);
    let mut line = Line { bytes: [0; 128], length: 0 };
    line.push(THREAD_NAME.get());
    line.push(" thread: forbidden system call ");
    line.push(syscall_name(number).unwrap_or("unknown"));
    line.push(", number ");
    line.push_number(number);
    line.push("\n");
    let (start, fd) = (line.bytes.as_ptr().cast(), REPORT_FD.load(Ordering::Relaxed));
    // SAFETY: the line is initialized and outlives the call; write(2) is allowed to each thread and
    // safe in a handler. The second call is a refused one: the kernel blocks SIGSYS while its
    // handler runs, and ends a process with a blocked SIGSYS. The handler returns only if another
    // process sent the signal to a thread without a filter.
    unsafe {
        libc::write(fd, start, line.length);
        libc::syscall(libc::SYS_socket, -1, -1, -1);
    }
}

/// A line of text that is built without an allocation.
struct Line {
    bytes: [u8; 128],
    length: usize,
}

impl Line {
    /// Appends text; what does not fit is dropped.
    fn push(&mut self, text: &str) {
        for byte in text.bytes() {
            if let Some(slot) = self.bytes.get_mut(self.length) {
                *slot = byte;
                self.length += 1;
            }
        }
    }

    fn push_number(&mut self, number: usize) {
        if number >= 10 {
            self.push_number(number / 10);
        }
        self.push(["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"][number % 10]);
    }
}
