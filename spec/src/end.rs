//! The cause of the end of a run, for programs.

use std::fmt;

use chitin_protocol::{Exit, Usage};
use serde::Serialize;

/// The cause of the end of a run. It is only as specific as what was observed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum EndCause {
    /// The command exited by itself, with any code.
    Exit,
    /// A signal ended the command, and no limit explains it.
    Signal,
    /// The command could not be started: it was not found, or is not executable.
    NotStarted,
    /// The kernel killed a process because the sandbox had no memory left.
    OutOfMemory,
    /// The kernel refused a process or thread because the sandbox had too many.
    OutOfTasks,
    /// The writable files of the sandbox had no space left.
    DiskFull,
    /// The time limit was reached.
    TimeLimit,
    /// The policy is invalid or does not permit the run.
    Policy,
    /// The request is invalid. Nothing ran.
    Request,
    /// A signal, or the program that uses the library, ended the run.
    Interrupted,
    /// The guest panicked, rebooted or crashed.
    GuestPanic,
    /// The guest broke the rules of a device or of the channel, and was ended.
    GuestFault,
    /// The monitor of the microVM was killed, or failed by a fault of its own.
    MonitorFault,
    /// The host did not do its part: KVM, a daemon, a file, a credential source.
    Host,
}

/// Linux numbers of signals that people and programs send to end a process.
const SIGHUP: u8 = 1;
const SIGINT: u8 = 2;
const SIGKILL: u8 = 9;
const SIGTERM: u8 = 15;

impl EndCause {
    /// Returns the cause of the end of a process.
    ///
    /// A limit is the cause if it was reached while the process ran and the process failed. The
    /// OOM killer sends SIGKILL; the other signals that are sent from outside have their own
    /// sender. A process that exits with 0 has coped with the limit.
    pub fn of_process(exit: &Exit, usage: &Usage) -> EndCause {
        let reached = usage.reached;
        let own = match exit {
            Exit::Code(0) => return EndCause::Exit,
            Exit::Signal(SIGHUP | SIGINT | SIGTERM) => return EndCause::Signal,
            Exit::Signal(SIGKILL) if reached.oom_kills == 0 => return EndCause::Signal,
            Exit::Code(_) => EndCause::Exit,
            Exit::Signal(_) => EndCause::Signal,
            Exit::NotStarted { .. } => EndCause::NotStarted,
        };
        if reached.oom_kills > 0 {
            EndCause::OutOfMemory
        } else if reached.refused_tasks > 0 {
            EndCause::OutOfTasks
        } else if reached.disk_full {
            EndCause::DiskFull
        } else {
            own
        }
    }

    /// Returns the name that reports use.
    pub fn name(self) -> &'static str {
        match self {
            EndCause::Exit => "exit",
            EndCause::Signal => "signal",
            EndCause::NotStarted => "not_started",
            EndCause::OutOfMemory => "out_of_memory",
            EndCause::OutOfTasks => "out_of_tasks",
            EndCause::DiskFull => "disk_full",
            EndCause::TimeLimit => "time_limit",
            EndCause::Policy => "policy",
            EndCause::Request => "request",
            EndCause::Interrupted => "interrupted",
            EndCause::GuestPanic => "guest_panic",
            EndCause::GuestFault => "guest_fault",
            EndCause::MonitorFault => "monitor_fault",
            EndCause::Host => "host",
        }
    }
}

impl fmt::Display for EndCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use chitin_protocol::ReachedLimits;

    use super::*;

    const OOM: ReachedLimits = ReachedLimits { oom_kills: 1, refused_tasks: 0, disk_full: false };
    const TASKS: ReachedLimits = ReachedLimits { oom_kills: 0, refused_tasks: 9, disk_full: false };
    const DISK: ReachedLimits = ReachedLimits { oom_kills: 0, refused_tasks: 0, disk_full: true };

    fn cause(exit: Exit, reached: ReachedLimits) -> EndCause {
        EndCause::of_process(&exit, &Usage { reached, ..Usage::default() })
    }

    #[test]
    fn reached_limit_is_the_cause_of_a_failure() {
        let none = ReachedLimits::default();
        for (exit, reached, expected) in [
            (Exit::Code(3), none, EndCause::Exit),
            (Exit::Signal(9), none, EndCause::Signal),
            (Exit::Signal(9), OOM, EndCause::OutOfMemory),
            (Exit::Code(137), OOM, EndCause::OutOfMemory),
            (Exit::Code(1), TASKS, EndCause::OutOfTasks),
            (Exit::Signal(6), TASKS, EndCause::OutOfTasks),
            (Exit::Code(1), DISK, EndCause::DiskFull),
            (Exit::Signal(7), DISK, EndCause::DiskFull),
            (Exit::Code(1), OOM.merge(TASKS), EndCause::OutOfMemory),
        ] {
            assert_eq!(cause(exit.clone(), reached), expected, "{exit:?} {reached:?}");
        }
    }

    #[test]
    fn limit_is_no_cause_of_success_or_of_a_sent_signal() {
        let all = OOM.merge(TASKS).merge(DISK);
        assert_eq!(cause(Exit::Code(0), all), EndCause::Exit);
        for number in [1, 2, 15] {
            assert_eq!(cause(Exit::Signal(number), all), EndCause::Signal);
        }
        assert_eq!(cause(Exit::Signal(9), TASKS.merge(DISK)), EndCause::Signal);
    }

    #[test]
    fn name_is_that_of_the_report() {
        for cause in [EndCause::OutOfMemory, EndCause::MonitorFault, EndCause::NotStarted] {
            assert_eq!(serde_json::to_value(cause).unwrap(), cause.name());
        }
    }
}
