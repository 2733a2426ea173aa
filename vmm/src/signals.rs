//! Signals that ask this process to end, received through a descriptor.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::process::Signal;
use vmm_sys_util::signal::create_sigset;

/// The length of a `signalfd_siginfo`; it begins with the number of the signal.
const SIGINFO_BYTES: usize = size_of::<libc::signalfd_siginfo>();

/// SIGINT and SIGTERM of this process, as a descriptor that becomes readable when one arrives.
pub struct TerminationSignals(File);

impl TerminationSignals {
    /// Blocks the signals in the calling thread and in threads that it starts. They have no other
    /// effect from here on.
    ///
    /// # Errors
    /// The host refuses another descriptor.
    pub fn block() -> io::Result<Self> {
        let signals = create_sigset(&[libc::SIGTERM, libc::SIGINT])?;
        // SAFETY: `signals` is an initialized set that both calls only read. The returned
        // descriptor is new, and only this function knows it.
        unsafe {
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const signals, std::ptr::null_mut());
            let flags = libc::SFD_CLOEXEC | libc::SFD_NONBLOCK;
            match libc::signalfd(-1, &raw const signals, flags) {
                -1 => Err(io::Error::last_os_error()),
                fd => Ok(Self(File::from_raw_fd(fd))),
            }
        }
    }

    /// Reads the next signal that has arrived.
    pub fn read_signal(&self) -> Option<Signal> {
        let mut info = [0; SIGINFO_BYTES];
        (&self.0).read_exact(&mut info).ok()?;
        let (number, _) = info.split_first_chunk()?;
        Signal::from_named_raw(i32::from_ne_bytes(*number))
    }
}

impl AsFd for TerminationSignals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<TerminationSignals> for OwnedFd {
    fn from(signals: TerminationSignals) -> Self {
        signals.0.into()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use vmm_sys_util::signal::Killable;

    use super::*;

    #[test]
    fn blocked_signal_is_read_from_the_descriptor() {
        let (blocked, is_blocked) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let signals = TerminationSignals::block().unwrap();
            assert_eq!(signals.read_signal(), None);
            blocked.send(()).unwrap();
            loop {
                if let Some(signal) = signals.read_signal() {
                    return signal;
                }
                std::thread::yield_now();
            }
        });
        is_blocked.recv().unwrap();
        thread.kill(libc::SIGTERM).unwrap();
        assert_eq!(thread.join().unwrap(), Signal::TERM);
    }
}
