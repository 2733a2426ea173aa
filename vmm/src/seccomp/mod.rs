//! What threads may ask of the kernel: a filter for each, installed before the guest runs and never taken back.
//!
//! [`rules`] is the list, as data. A call that is not on it is not made: the thread gets a signal instead, whose handler says
//! which call it was and then makes it again, which with the signal held back ends the process. A thread that was taken over
//! can keep the handler from speaking, and the call from being told; it cannot get the call made.

mod assemble;
pub mod rules;
mod syscall_names;

use std::cell::Cell;
use std::io;
use std::os::fd::RawFd;
use std::ptr;
use std::sync::atomic::{AtomicI32, Ordering};

use libc::{c_int, c_void, siginfo_t, sock_filter};

use self::assemble::Allowed;
use self::rules::{Thread, When};
use crate::spec::VmSpec;

/// Where refusals are told.
static TOLD_TO: AtomicI32 = AtomicI32::new(libc::STDERR_FILENO);

thread_local! {
    /// What this thread is, for the handler. No destructor and no lazy initialization: safe to use there.
    static NAME: Cell<&'static str> = const { Cell::new("an") };
}

/// The filters of one monitor.
#[derive(Clone, Copy, Debug)]
pub struct Filters {
    console: bool,
    restored: bool,
    prepared: bool,
    saved: bool,
}

impl Filters {
    /// Those that fit what is asked for.
    pub fn of(spec: &VmSpec) -> Self {
        Self {
            console: spec.console,
            restored: spec.restore,
            prepared: spec.prepared,
            saved: spec.template || spec.record,
        }
    }

    fn hold(self, when: When) -> bool {
        match when {
            When::Always => true,
            When::Console => self.console,
            When::Restored => self.restored,
            When::Prepared => self.prepared,
            When::Saved => self.saved,
        }
    }

    /// The filter of a thread.
    pub fn program(self, thread: Thread) -> Vec<sock_filter> {
        let calls: Vec<_> = rules::calls(thread)
            .filter(|rule| self.hold(rule.when))
            .map(|rule| Allowed { call: rule.call, check: rule.check })
            .collect();
        let ioctls: Vec<_> =
            rules::ioctls(thread).iter().filter(|ioctl| self.hold(ioctl.when)).collect();
        assemble::program(&calls, &ioctls)
    }

    /// Filters the calling thread, which is of this kind, for good.
    ///
    /// # Errors
    /// The kernel has no filters (it was built without), or the process may still get new privileges.
    pub fn install(self, thread: Thread) -> io::Result<()> {
        NAME.set(match thread {
            Thread::Vcpu => "a vCPU's",
            Thread::Vmm => "the VMM",
        });
        let mut program = self.program(thread);
        let length = u16::try_from(program.len()).map_err(io::Error::other)?;
        let program = libc::sock_fprog { len: length, filter: program.as_mut_ptr() };
        // SAFETY: the kernel copies the program during the call.
        let result = unsafe {
            libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program)
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// Gets this process ready for filters: refusals are told to `told_to`, and threads share one heap, so that none of them has
/// to make another.
///
/// # Errors
/// The handler cannot be installed.
pub fn prepare(told_to: RawFd) -> io::Result<()> {
    TOLD_TO.store(told_to, Ordering::Relaxed);
    // SAFETY: a number for the allocator.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) = on_refusal;
    // SAFETY: zero is a valid `sigaction`; the handler has the signature that SA_SIGINFO asks for and does only what a handler
    // may.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO;
        if libc::sigaction(libc::SIGSYS, &raw const action, ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // From here on for the whole process; a filter needs it.
    // SAFETY: numbers only.
    match unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Lets this process, which has `threads`, start no further one; the filter forbids it too. One is left to KVM, which starts a
/// thread of its own in this process when the guest is entered for the first time (Linux 6.13), and otherwise does not enter it.
///
/// # Errors
/// None that is known.
pub fn no_more_threads(threads: usize) -> io::Result<()> {
    let most = threads as u64 + 1;
    let limit = libc::rlimit { rlim_cur: most, rlim_max: most };
    // SAFETY: a valid limit, read during the call.
    match unsafe { libc::setrlimit(libc::RLIMIT_NPROC, &raw const limit) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The head of a `siginfo_t` of SIGSYS, as Linux has it on 64-bit machines.
#[repr(C)]
struct Refused {
    signal: c_int,
    errno: c_int,
    code: c_int,
    _pad: c_int,
    address: *mut c_void,
    call: c_int,
    architecture: u32,
}

extern "C" fn on_refusal(_: c_int, info: *mut siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel passes a valid one, and it is at least as long.
    let refused = unsafe { info.cast::<Refused>().read() };
    let number = usize::try_from(refused.call).unwrap_or(usize::MAX);
    let mut line = Line { bytes: [0; 128], length: 0 };
    line.push(NAME.get());
    line.push(" thread made the system call ");
    line.push(syscall_names::name(number).unwrap_or("without a name"));
    line.push(", number ");
    line.push_number(number);
    line.push("\n");
    let (start, fd) = (line.bytes.as_ptr().cast(), TOLD_TO.load(Ordering::Relaxed));
    // SAFETY: the bytes live; write(2) is allowed to each thread. Then what was refused once more: the signal is held back while
    // its handler runs, so now the kernel ends the process. If it does not, somebody else has sent the signal.
    unsafe {
        libc::write(fd, start, line.length);
        libc::syscall(libc::SYS_socket, -1, -1, -1);
    }
}

/// A line that is put together without an allocation.
struct Line {
    bytes: [u8; 128],
    length: usize,
}

impl Line {
    fn push(&mut self, text: &str) {
        for byte in text.bytes() {
            if let Some(place) = self.bytes.get_mut(self.length) {
                *place = byte;
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

#[cfg(test)]
#[path = "seccomp_test.rs"]
mod tests;
