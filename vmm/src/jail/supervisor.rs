//! The supervisor: the process that the host has started, which waits for the jailed child.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{
    DumpableBehavior, Pid, Signal, WaitOptions, pidfd_send_signal, set_dumpable_behavior, waitpid,
};
use rustix::thread::CapabilitySet;

use super::cgroup::Cgroup;
use super::{BASE_UID, keep_capabilities};
use crate::signals::TerminationSignals;

/// The maximum number of bytes that are read of a child's last output: a line or two. Untrusted.
const MAX_OUTPUT_BYTES: u64 = 2048;

/// Waits for a child in separate namespaces.
///
/// ```text
///  created ─▶ identified (root only) ─▶ waiting ─┬─ child ended ─▶ reaped ─▶ ChildExit
///                                                ├─ SIGINT, SIGTERM: forwarded to the child
///                                                └─ control socket closed: child killed
/// ```
pub struct Supervisor {
    child: Pid,
    /// Becomes readable when the child has ended.
    pidfd: OwnedFd,
    /// Sends the user id, and is open as long as the supervisor lives.
    ready_tx: File,
    /// Receives the standard error of the child.
    stderr_rx: File,
    is_root: bool,
    /// Removed when the child has ended.
    _cgroup: Option<Cgroup>,
}

/// The end of a child.
#[derive(Debug, PartialEq, Eq)]
pub enum ChildExit {
    /// The child has reported its result and exited with this code.
    Exited(i32),
    /// The child was killed because the host has closed the control socket.
    ControlClosed,
    /// A signal ended the child.
    Killed(KilledChild),
}

/// A child that a signal ended before it could report a result.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{}", explain_signal(*signal), quote_output(last_output))]
pub struct KilledChild {
    /// The number of the signal.
    pub signal: i32,
    /// The last output of the child on standard error: one line of printable ASCII. Untrusted.
    pub last_output: String,
}

impl Supervisor {
    pub(super) fn new(
        child: Pid,
        pidfd: OwnedFd,
        ready_tx: OwnedFd,
        stderr_rx: OwnedFd,
        is_root: bool,
        cgroup: Option<Cgroup>,
    ) -> Self {
        let (ready_tx, stderr_rx) = (ready_tx.into(), stderr_rx.into());
        Self { child, pidfd, ready_tx, stderr_rx, is_root, _cgroup: cgroup }
    }

    /// Assigns the child a dedicated user if root started the monitor, lets the child continue, and
    /// waits for its end.
    ///
    /// Signals are forwarded to the child. When the other end of `control` is closed, the child is
    /// killed.
    pub fn wait_for_child(
        self,
        signals: &TerminationSignals,
        control: Option<BorrowedFd<'_>>,
    ) -> ChildExit {
        if self.is_root {
            self.send_identity();
        }
        // This process has no secrets, and yet no other process has a reason to trace it.
        let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
        let control_closed = self.forward_events(signals, control);
        self.reap_child(control_closed)
    }

    /// Forwards events to the child until it has ended. Returns whether the host has closed the
    /// control socket.
    fn forward_events(
        &self,
        signals: &TerminationSignals,
        mut control: Option<BorrowedFd<'_>>,
    ) -> bool {
        let mut control_closed = false;
        loop {
            let mut polls = vec![
                PollFd::new(&self.pidfd, PollFlags::IN),
                PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN),
            ];
            // Without a requested event, poll reports only that the other end is closed.
            polls.extend(control.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::empty())));
            if poll(&mut polls, None).is_err() {
                continue;
            }
            let is_ready =
                |index: usize| polls.get(index).is_some_and(|fd| !fd.revents().is_empty());
            if is_ready(0) {
                return control_closed;
            }
            if is_ready(1)
                && let Some(signal) = signals.read_signal()
            {
                self.send_signal(signal);
            }
            if is_ready(2) {
                control_closed = true;
                control = None;
                self.send_signal(Signal::KILL);
            }
        }
    }

    /// Sends a signal; a child that has ended already is found by the next poll.
    fn send_signal(&self, signal: Signal) {
        let _ = pidfd_send_signal(&self.pidfd, signal);
    }

    fn reap_child(self, control_closed: bool) -> ChildExit {
        let status = match waitpid(Some(self.child), WaitOptions::empty()) {
            Ok(Some((_, status))) => Some(status),
            _ => None,
        };
        if let Some(code) = status.and_then(|status| status.exit_status()) {
            return ChildExit::Exited(code);
        }
        if control_closed {
            return ChildExit::ControlClosed;
        }
        let signal = status.and_then(|status| status.terminating_signal()).unwrap_or(0);
        ChildExit::Killed(KilledChild { signal, last_output: read_last_output(&self.stderr_rx) })
    }

    /// Sends the child its user id, and keeps no capability but that to end a process of another
    /// user.
    fn send_identity(&self) {
        let id = self.map_identity().unwrap_or(0);
        // Capabilities that cannot be dropped do no harm in this process.
        let _ = keep_capabilities(CapabilitySet::KILL);
        // A child that has ended already is found by the next poll.
        let _ = (&self.ready_tx).write_all(&id.to_le_bytes());
    }

    /// Maps a dedicated user and group for the child.
    ///
    /// # Errors
    /// The host has no such users: in a container that has only a few users of the host. The child
    /// stays root of that container then.
    fn map_identity(&self) -> io::Result<u32> {
        let id = BASE_UID + std::process::id();
        let line = format!("{id} {id} 1");
        for map in ["gid_map", "uid_map"] {
            fs::write(format!("/proc/{}/{map}", self.child.as_raw_nonzero()), &line)?;
        }
        Ok(id)
    }
}

/// Reads what the child has written, as one line without control characters, so that it cannot
/// steer a terminal.
fn read_last_output(stderr_rx: &File) -> String {
    let mut output = Vec::new();
    // The pipe does not block; it ends where there is no more output.
    let _ = stderr_rx.take(MAX_OUTPUT_BYTES).read_to_end(&mut output);
    let text = String::from_utf8_lossy(&output);
    text.split_whitespace()
        .map(|word| word.chars().filter(char::is_ascii_graphic).collect())
        .collect::<Vec<String>>()
        .join(" ")
}

fn explain_signal(signal: i32) -> String {
    match signal {
        libc::SIGKILL => "the monitor was killed (signal 9): by another process, or because the \
                          host ran out of memory"
            .into(),
        libc::SIGSYS => "the monitor made a system call that its filter forbids, and was \
                         killed (signal 31)"
            .into(),
        signal => format!("the monitor was killed (signal {signal})"),
    }
}

fn quote_output(output: &str) -> String {
    if output.is_empty() { String::new() } else { format!("; its last output: {output}") }
}

#[cfg(test)]
mod tests {
    use rustix::pipe::{PipeFlags, pipe_with};

    use super::*;

    #[test]
    fn last_output_is_one_bounded_printable_line() {
        let (stderr_rx, stderr_tx) = pipe_with(PipeFlags::NONBLOCK).unwrap();
        let (stderr_rx, mut stderr_tx) = (File::from(stderr_rx), File::from(stderr_tx));
        stderr_tx.write_all(b"thread 'x' panicked\n\x1b[2Jat \xff here\r\n").unwrap();
        assert_eq!(read_last_output(&stderr_rx), "thread 'x' panicked [2Jat  here");
        stderr_tx.write_all(&[b'x'; 5000]).unwrap();
        assert_eq!(read_last_output(&stderr_rx).len(), 2048);
        // The other end is still open, which blocks no reader.
        let left: usize = (0..3).map(|_| read_last_output(&stderr_rx).len()).sum();
        assert_eq!(left, 5000 - 2048);
    }

    #[test]
    fn killed_child_is_explained_by_its_signal() {
        let explain = |signal, last_output: &str| {
            KilledChild { signal, last_output: last_output.into() }.to_string()
        };
        assert!(explain(9, "").ends_with("or because the host ran out of memory"));
        assert!(explain(libc::SIGSYS, "x").contains("its filter forbids"));
        assert_eq!(
            explain(6, "panicked"),
            "the monitor was killed (signal 6); its last output: panicked"
        );
    }
}
