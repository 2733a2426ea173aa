//! The one who stays outside: the process that the host started, and whose end is the end.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use libc::{c_int, pid_t};

use super::cgroup::Group;
use super::{IDENTITIES, keep_capabilities, prctl};

/// How much of an inmate's last words is listened to: a line or two. Untrusted.
const MAX_WORDS: u64 = 2048;

/// Number 5 of `linux/capability.h`.
const CAP_KILL: u32 = 1 << 5;

/// Waits for a child in namespaces of its own.
pub struct Keeper {
    inmate: pid_t,
    /// Becomes readable when the inmate has ended.
    pidfd: OwnedFd,
    /// Open as long as the keeper lives.
    opener: File,
    /// Where the inmate's last words arrive.
    ear: File,
    root: bool,
    /// Removed when the inmate has ended.
    _group: Option<Group>,
}

/// How an inmate ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Fate {
    /// By itself, having said what there is to say, with this exit code.
    Exited(c_int),
    /// It was killed because whoever asked for it has gone.
    Unwanted,
    /// By a signal: in words, for people.
    Killed(String),
}

impl Keeper {
    pub(super) fn new(
        inmate: pid_t,
        pidfd: OwnedFd,
        opener: OwnedFd,
        ear: OwnedFd,
        root: bool,
        group: Option<Group>,
    ) -> Self {
        Self { inmate, pidfd, opener: opener.into(), ear: ear.into(), root, _group: group }
    }

    /// Gives an inmate of root's a user that nobody else is, lets it go on, and waits for its end. Signals that arrive at
    /// `signals` are passed on; when the other end of `control` is closed the inmate is killed.
    pub fn watch(self, signals: &OwnedFd, control: Option<RawFd>) -> Fate {
        if self.root {
            let id = self.identify().unwrap_or(0);
            // All that is left to do is to end a process of another user. What cannot be given up does no harm here.
            let _ = keep_capabilities(CAP_KILL);
            // One that is gone already is found to be below.
            let _ = (&self.opener).write_all(&id.to_le_bytes());
        }
        // It has nothing to hide, but nobody has to look into it either.
        let _ = prctl(libc::PR_SET_DUMPABLE, 0);
        let mut polls = [
            poll(self.pidfd.as_raw_fd(), libc::POLLIN),
            poll(signals.as_raw_fd(), libc::POLLIN),
            // A negative one is not looked at.
            poll(control.unwrap_or(-1), 0),
        ];
        let mut unwanted = false;
        loop {
            // SAFETY: three valid entries.
            let ready = unsafe { libc::poll(polls.as_mut_ptr(), 3, -1) };
            let [ended, signal, gone] = polls.map(|poll| ready > 0 && poll.revents != 0);
            if ended {
                break;
            }
            if signal && let Some(number) = next(signals) {
                send(self.inmate, number);
            }
            if gone {
                unwanted = true;
                polls[2].fd = -1;
                send(self.inmate, libc::SIGKILL);
            }
        }
        let mut status = 0;
        // SAFETY: a child that has ended, whose number is still its own.
        let reaped = unsafe { libc::waitpid(self.inmate, &raw mut status, 0) };
        if reaped == self.inmate && libc::WIFEXITED(status) {
            Fate::Exited(libc::WEXITSTATUS(status))
        } else if unwanted {
            Fate::Unwanted
        } else {
            Fate::Killed(in_words(libc::WTERMSIG(status), &last_words(&self.ear)))
        }
    }

    /// Makes a user and a group for the inmate, if the host has such: in a container whose users are a few of the host's there
    /// are none, and it stays who we are.
    fn identify(&self) -> io::Result<u32> {
        let id = IDENTITIES + std::process::id();
        let line = format!("{id} {id} 1");
        for map in ["gid_map", "uid_map"] {
            fs::write(format!("/proc/{}/{map}", self.inmate), &line)?;
        }
        Ok(id)
    }
}

fn poll(fd: RawFd, events: i16) -> libc::pollfd {
    libc::pollfd { fd, events, revents: 0 }
}

fn send(inmate: pid_t, signal: c_int) {
    // SAFETY: a child that nobody has waited for yet, so the number is its own.
    unsafe { libc::kill(inmate, signal) };
}

/// The number of a signal that has arrived.
fn next(signals: &OwnedFd) -> Option<c_int> {
    // SAFETY: plain numbers, of which zero is valid.
    let mut info: libc::signalfd_siginfo = unsafe { std::mem::zeroed() };
    let length = size_of_val(&info);
    // SAFETY: `info` is writable for its length.
    let read = unsafe { libc::read(signals.as_raw_fd(), (&raw mut info).cast(), length) };
    usize::try_from(read).is_ok_and(|read| read == length).then(|| info.ssi_signo.cast_signed())
}

/// What the inmate has written, as one line without anything that a terminal would obey.
fn last_words(ear: &File) -> String {
    let mut words = Vec::new();
    // It does not block, and ends where there is no more.
    let _ = ear.take(MAX_WORDS).read_to_end(&mut words);
    let text = String::from_utf8_lossy(&words);
    text.split_whitespace()
        .map(|word| word.chars().filter(char::is_ascii_graphic).collect())
        .collect::<Vec<String>>()
        .join(" ")
}

fn in_words(signal: c_int, words: &str) -> String {
    let why = match signal {
        libc::SIGKILL => {
            "the monitor was killed (signal 9): by somebody, or because memory ran out".into()
        }
        libc::SIGSYS => {
            "the monitor asked the kernel for what its filter forbids, and was ended".into()
        }
        signal => format!("the monitor was ended by signal {signal}"),
    };
    if words.is_empty() { why } else { format!("{why}; it said: {words}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jail::pipe;

    #[test]
    fn last_words_are_one_bounded_line_that_is_safe_to_print() {
        let (ear, mouth) = pipe(libc::O_NONBLOCK).unwrap();
        let mut mouth = File::from(mouth);
        mouth.write_all(b"thread 'x' panicked\n\x1b[2Jat \xff here\r\n").unwrap();
        let ear = File::from(ear);
        assert_eq!(last_words(&ear), "thread 'x' panicked [2Jat  here");
        mouth.write_all(&[b'x'; 5000]).unwrap();
        assert_eq!(last_words(&ear).len(), 2048);
        // The other end is still open: that does not hold anybody up.
        let left: usize = (0..3).map(|_| last_words(&ear).len()).sum();
        assert_eq!(left, 5000 - 2048);
    }

    #[test]
    fn ends_are_told_in_words() {
        assert!(in_words(9, "").ends_with("or because memory ran out"));
        assert!(in_words(libc::SIGSYS, "x").contains("its filter forbids"));
        assert_eq!(in_words(6, "panicked"), "the monitor was ended by signal 6; it said: panicked");
    }
}
