//! The cause of the end of a run: a message for people, and the same cause in the report.

use chitin::{EndCause, Exit, ReachedLimits, Sandbox, Usage};

use crate::error::CliError;

/// The limits of a sandbox, as messages name them.
#[derive(Debug, Clone, Copy)]
pub struct NamedLimits {
    memory_mib: u64,
    tasks: u32,
    disk_mib: Option<u32>,
    from_template: bool,
}

impl NamedLimits {
    /// Reads the limits of a running sandbox.
    pub fn of(sandbox: &Sandbox, from_template: bool) -> NamedLimits {
        NamedLimits {
            memory_mib: sandbox.memory_mib(),
            tasks: sandbox.max_tasks(),
            disk_mib: sandbox.disk_mib(),
            from_template,
        }
    }

    fn explain_memory(&self) -> String {
        let remedy = match self.from_template {
            true => "build the template with more --memory",
            false => "raise it with --memory",
        };
        format!("out of memory: the sandbox used its {} MiB; {remedy}", self.memory_mib)
    }

    fn explain_tasks(&self) -> String {
        format!(
            "out of tasks: the sandbox reached its limit of processes and threads, at most {}; \
             `resources.pids` of a policy sets it, and more --memory allows more",
            self.tasks
        )
    }

    fn explain_disk(&self) -> String {
        match self.disk_mib {
            Some(mib) => format!(
                "disk full: the files of the sandbox took their {mib} MiB; raise \
                 `resources.disk_mib` in the policy"
            ),
            None => format!(
                "disk full: the files of the sandbox, which lie in its {} MiB of memory, took \
                 their share of it; raise --memory",
                self.memory_mib
            ),
        }
    }
}

/// Returns the cause of the end of a run: that of its error, of its process, or the signal that
/// interrupted it.
pub fn find_cause(ended: Option<&(Exit, Usage)>, outcome: &Result<u8, CliError>) -> EndCause {
    match (outcome, ended) {
        (Err(error), _) => error.cause(),
        (Ok(_), Some((exit, usage))) => EndCause::of_process(exit, usage),
        (Ok(_), None) => EndCause::Interrupted,
    }
}

/// Returns the lines that explain the cause, if exit code and error do not, and those about limits
/// that a successful command has reached.
pub fn explain_end(cause: EndCause, reached: ReachedLimits, limits: &NamedLimits) -> Vec<String> {
    match cause {
        EndCause::OutOfMemory => vec![limits.explain_memory()],
        EndCause::OutOfTasks => vec![limits.explain_tasks()],
        EndCause::DiskFull => vec![limits.explain_disk()],
        EndCause::Exit => list_notes(reached, limits),
        _ => Vec::new(),
    }
}

fn list_notes(reached: ReachedLimits, limits: &NamedLimits) -> Vec<String> {
    let notes = [
        (reached.oom_kills > 0, limits.explain_memory()),
        (reached.refused_tasks > 0, limits.explain_tasks()),
        (reached.disk_full, limits.explain_disk()),
    ];
    let notes = notes.into_iter().filter(|(applies, _)| *applies);
    notes.map(|(_, text)| format!("note: {text}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: NamedLimits =
        NamedLimits { memory_mib: 128, tasks: 64, disk_mib: None, from_template: false };

    #[test]
    fn limit_is_named_with_its_value_and_remedy() {
        let lines = |cause| explain_end(cause, ReachedLimits::default(), &LIMITS);
        assert_eq!(
            lines(EndCause::OutOfMemory),
            ["out of memory: the sandbox used its 128 MiB; raise it with --memory"]
        );
        for (cause, number) in [(EndCause::OutOfTasks, "64"), (EndCause::DiskFull, "128 MiB")] {
            assert!(lines(cause)[0].contains(number), "{cause}");
        }
        for cause in [EndCause::Exit, EndCause::Signal, EndCause::TimeLimit, EndCause::Host] {
            assert!(lines(cause).is_empty(), "{cause}");
        }
    }

    #[test]
    fn limit_reached_by_a_success_is_a_note() {
        let reached = ReachedLimits { oom_kills: 0, refused_tasks: 3, disk_full: true };
        let lines = explain_end(EndCause::Exit, reached, &LIMITS);
        assert_eq!(lines.len(), 2);
        assert!(lines.iter().all(|line| line.starts_with("note: ")), "{lines:?}");
    }

    #[test]
    fn cause_is_that_of_the_error_or_the_process() {
        let timeout = chitin::Error::Timeout { limit: std::time::Duration::from_secs(1) };
        assert_eq!(find_cause(None, &Err(timeout.into())), EndCause::TimeLimit);
        assert_eq!(find_cause(None, &Ok(130)), EndCause::Interrupted);
        let reached = ReachedLimits { oom_kills: 1, ..ReachedLimits::default() };
        let ended = (Exit::Code(137), Usage { reached, ..Usage::default() });
        assert_eq!(find_cause(Some(&ended), &Ok(137)), EndCause::OutOfMemory);
    }
}
