//! Signals of the agent, which it reads from a descriptor, and those of its children.

use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::error::{Context, SystemError};
use crate::mode::Mode;
use crate::syscall::check_result;

/// `_NSIG` of the kernel.
const LAST_SIGNAL: i32 = 64;

/// The descriptor of the blocked signals: SIGCHLD, and in a container SIGTERM and SIGINT.
pub struct SignalFd(OwnedFd);

impl SignalFd {
    /// Blocks the signals that are read from the descriptor, and sets the disposition of the
    /// others.
    pub fn open(mode: Mode) -> Result<SignalFd, SystemError> {
        if mode.stdio && !mode.own_kernel {
            // The workload should not inherit what the container's starter ignores, and with
            // SIGCHLD ignored children would vanish before they are reaped. A kernel that serves
            // this sandbox alone has no such starter.
            for signal in 1..=LAST_SIGNAL {
                set_default_disposition(signal);
            }
        }
        // SAFETY: all-zero is a valid, empty `sigset_t`, which outlives the calls that fill and
        // read it. SIG_IGN involves no code of this process. `signalfd` returns a new descriptor
        // that nothing else owns.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigaddset(&raw mut set, libc::SIGCHLD);
            if mode.stdio {
                libc::sigaddset(&raw mut set, libc::SIGTERM);
                libc::sigaddset(&raw mut set, libc::SIGINT);
            }
            let blocked =
                libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut());
            check_result(blocked).context("block", "signals")?;
            // A pipe without readers is an error of that pipe, and must not end PID 1.
            libc::signal(libc::SIGPIPE, libc::SIG_IGN);
            let fd = libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
            check_result(fd).context("open", "a signalfd")?;
            Ok(SignalFd(OwnedFd::from_raw_fd(fd)))
        }
    }

    /// Reads pending signals. Returns whether SIGTERM or SIGINT asks the container to stop;
    /// otherwise all pending signals were SIGCHLD.
    pub fn read_stop_request(&self) -> bool {
        let mut record = [0; size_of::<libc::signalfd_siginfo>()];
        while let Ok(count) = rustix::io::read(&self.0, &mut record) {
            let signal = record.first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes));
            if count < record.len() {
                break;
            }
            if signal != libc::SIGCHLD.cast_unsigned() {
                return true;
            }
        }
        false
    }
}

impl AsFd for SignalFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Sets the default disposition of any signal. The C library's function refuses the signals that it
/// uses itself, and those are inherited like any other.
fn set_default_disposition(signal: i32) {
    // The kernel's `struct sigaction`: handler, flags, restorer, mask. A default handler is 0.
    let action = [0_u64; 4];
    // SAFETY: the kernel reads 32 bytes, the last 8 of which are the mask, as the last argument
    // says. No code of this process becomes a handler. SIGKILL and SIGSTOP are refused, which does
    // no harm.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigaction,
            signal,
            &raw const action,
            std::ptr::null_mut::<u64>(),
            8,
        )
    };
}

/// Undoes in a child what [`SignalFd::open`] has set: no signal is ignored or blocked.
///
/// Makes system calls only.
pub fn reset_for_exec() {
    // SAFETY: the default disposition involves no code of this process. All-zero is a valid, empty
    // `sigset_t`, which `sigprocmask` only reads.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        let none: libc::sigset_t = std::mem::zeroed();
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}
