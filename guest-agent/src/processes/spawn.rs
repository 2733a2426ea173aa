//! Forks a child, with shared memory where that is safe.
//!
//! The first process shares the agent's memory until its exec, as vfork(2) does, and the agent
//! waits for that: copying the agent's memory would take longer than all other steps of a start.
//! Where the workload has a process already, that one could stop the child before its exec, and
//! with it the agent. There the child gets a copy, and the agent does not wait.

use std::arch::asm;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use rustix::io::Errno;
use rustix::process::{Pid, WaitId, WaitIdOptions};

use super::child::ExecArgs;

/// From the kernel's `linux/sched.h`. The libc crate has it in a type that is too narrow.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Forks a child that runs `args`, and returns its pid. With `cgroup`, the child is born into that
/// cgroup: moving it there would wait for an RCU grace period, which takes milliseconds.
///
/// # Safety
/// Other threads may hold locks of the allocator and the C library. Until its exec, the child may
/// make system calls only.
pub unsafe fn spawn_child(
    args: &ExecArgs<'_>,
    cgroup: Option<BorrowedFd<'_>>,
) -> Result<Pid, Errno> {
    // SAFETY: all-zero is a valid `clone_args`.
    let mut clone_args: libc::clone_args = unsafe { std::mem::zeroed() };
    let shared = if is_workload_empty() { libc::CLONE_VM | libc::CLONE_VFORK } else { 0 };
    let [shared, signal] = [shared, libc::SIGCHLD].map(|flags| u64::from(flags.cast_unsigned()));
    let (call, first, second) = match cgroup {
        Some(cgroup) => {
            clone_args.flags = CLONE_INTO_CGROUP | shared;
            clone_args.exit_signal = signal;
            clone_args.cgroup = cgroup.as_raw_fd().cast_unsigned().into();
            (libc::SYS_clone3, &raw const clone_args as u64, size_of::<libc::clone_args>() as u64)
        }
        None => (libc::SYS_clone, shared | signal, 0),
    };
    let result: i64;
    // SAFETY: no new stack is passed, so the child continues on this one. Nothing else uses it
    // before the exec: either the child has a copy, or this thread waits. The child never returns
    // from `run_child`. The C library's fork() is not used, because it runs handlers and takes
    // locks.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "mov rdi, r12",
            "call {run_child}",
            "ud2",
            "2:",
            run_child = sym run_child,
            inlateout("rax") call => result,
            in("rdi") first,
            in("rsi") second,
            in("rdx") 0,
            in("r10") 0,
            in("r8") 0,
            in("r12") ptr::from_ref(args),
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    match i32::try_from(result) {
        Ok(pid) if pid > 0 => Pid::from_raw(pid).ok_or(Errno::SRCH),
        Ok(errno) => Err(Errno::from_raw_os_error(-errno)),
        Err(_) => Err(Errno::OVERFLOW),
    }
}

/// Returns whether the workload has no process, so that a child can let the agent wait for its
/// exec. All processes of the workload are descendants of PID 1.
fn is_workload_empty() -> bool {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    rustix::process::getpid().is_init()
        && matches!(rustix::process::waitid(WaitId::All, options), Err(Errno::CHILD))
}

/// The entry point of a child.
extern "C" fn run_child(args: &ExecArgs<'_>) -> ! {
    args.run()
}
