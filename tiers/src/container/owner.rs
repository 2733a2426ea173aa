//! The process that a container belongs to, so that leftovers of a dead process can be removed.

use std::fmt;

use rustix::process::{Pid, Signal, kill_process_group};

/// The process that a container belongs to: a client that creates it, or the runtime that runs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Owner {
    /// Boot id and PID namespace in which the pid is valid.
    scope: String,
    pid: u32,
    /// Start time in clock ticks since boot, which tells a reused pid apart.
    started: u64,
}

impl Owner {
    /// Returns this process.
    pub fn this_process() -> Owner {
        Owner::of(std::process::id())
    }

    /// Returns the process with this pid.
    pub fn of(pid: u32) -> Owner {
        Owner { scope: Owner::current_scope(), pid, started: start_time(pid).unwrap_or(0) }
    }

    fn current_scope() -> String {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let namespace = std::fs::read_link("/proc/self/ns/pid").unwrap_or_default();
        format!("{}/{}", boot.trim(), namespace.display())
    }

    /// Parses the text form.
    pub fn parse(text: &str) -> Option<Owner> {
        let mut words = text.split(' ');
        let (scope, pid, started) = (words.next()?, words.next()?, words.next()?);
        Some(Owner { scope: scope.into(), pid: pid.parse().ok()?, started: started.parse().ok()? })
    }

    /// Returns true if the process is known to have ended. Of a process in another scope nothing is
    /// known.
    pub fn has_ended(&self) -> bool {
        self.scope == Owner::current_scope() && start_time(self.pid) != Some(self.started)
    }

    /// Kills the process and its process group, which it leads.
    pub fn kill_group(&self) {
        if let Some(pid) = self.pid.try_into().ok().and_then(Pid::from_raw)
            && self.scope == Owner::current_scope()
            && !self.has_ended()
        {
            let _ = kill_process_group(pid, Signal::KILL);
        }
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.scope, self.pid, self.started)
    }
}

/// Returns the start time of a process in clock ticks since boot, or `None` if it does not exist
/// (proc_pid_stat(5), field 22).
fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name of the program, in parentheses, may hold any character.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owner_ends_only_within_its_own_scope() {
        let own = Owner::this_process();
        assert_eq!(Owner::parse(&own.to_string()), Some(own.clone()));
        assert!(!own.has_ended());
        let before = Owner { started: own.started.wrapping_sub(1), ..own.clone() };
        assert!(before.has_ended(), "the pid was reused");
        assert!(!Owner { scope: "another boot".into(), ..before }.has_ended());
        for bad in ["", "0.1.0", "scope 1", "scope x 1"] {
            assert_eq!(Owner::parse(bad), None, "{bad}");
        }
    }
}
