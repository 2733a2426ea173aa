use std::io;
use std::path::PathBuf;
use std::time::Duration;

use chitin_broker::SecretValueError;
use chitin_broker::egress::EgressError;
use chitin_broker::proxy::ValueError;
use chitin_broker::vault::VaultError;
use chitin_policy::PolicyError;
use chitin_protocol::{Exit, Failure, Fault, MAX_CONTROL, MAX_STREAMS};
use chitin_spec::EndCause;
use chitin_tiers::GuestEnd;
use chitin_vmm::{FailureCode, HostError, SpecError};

use crate::template::TemplateError;

/// A failed operation on a sandbox. Each variant names the operation and its object; the source, if
/// there is one, is the cause. [`error_chain`](crate::error_chain) prints both.
///
/// [`Error::code`] has the cause of a failed monitor for programs:
///
/// ```no_run
/// use chitin::{FailureCode, Sandbox};
///
/// # async fn example() -> Result<(), chitin::Error> {
/// let sandbox = match Sandbox::builder().start().await {
///     Err(error) if error.code() == Some(FailureCode::KvmPermission) => {
///         eprintln!("log in as a member of the group `kvm`: {error}");
///         return Err(error);
///     }
///     started => started?,
/// };
/// # sandbox.stop().await
/// # }
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting is out of range.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The host refused an operation that every process may usually do.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The guest ended before it was stopped.
    #[error("{0}")]
    GuestEnded(GuestEnd),
    /// No acceptable tier is available, or the selected one failed.
    #[error(transparent)]
    Tier(chitin_tiers::Error),
    /// The guest did not boot in time.
    #[error(
        "the guest has not answered for {} s: in a microVM, --console shows why",
        limit.as_secs()
    )]
    BootTimeout {
        /// The time that it was given.
        limit: Duration,
    },
    /// The agent broke the protocol. The sandbox has been ended.
    #[error("the agent in the sandbox broke the protocol, so the sandbox was ended: {0}")]
    Protocol(Fault),
    /// The time limit of the sandbox was reached.
    #[error("the time limit of {} was reached", format_limit(*limit))]
    Timeout {
        /// The limit.
        limit: Duration,
    },
    /// The sandbox has been stopped.
    #[error("the sandbox has been stopped")]
    Stopped,
    /// A credential could not be fetched, or cannot be delivered in the requested way.
    #[error(transparent)]
    Credential(#[from] chitin_broker::Error),
    /// No credential of this name was delivered to the sandbox.
    #[error("secret {name}: no credential of this name was delivered to the sandbox")]
    UnknownCredential {
        /// The requested name.
        name: String,
    },
    /// Two credentials have the same name.
    #[error("secret {name}: it is given twice: give each credential a name of its own")]
    DuplicateCredential {
        /// The name.
        name: String,
    },
    /// The endpoint of a credential was allowed as a destination as well.
    #[error(
        "secret {name}: localhost:{port} is its endpoint in the sandbox: remove it from the \
         allowed endpoints"
    )]
    EndpointConflict {
        /// The credential.
        name: String,
        /// The port of the endpoint.
        port: u16,
    },
    /// A template was to be built with a credential.
    #[error("secret {name}: a template would store it on disk")]
    SecretInTemplate {
        /// The credential.
        name: String,
    },
    /// A rotated credential could not be delivered, or a credential not be revoked.
    #[error("secret {name}")]
    Rotation {
        /// The credential.
        name: String,
        /// The cause.
        source: RotationError,
    },
    /// A policy is invalid, or does not permit a request.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// The requested egress is invalid.
    #[error(transparent)]
    Egress(#[from] EgressError),
    /// The sandbox that an audit attacks from the first one did not start.
    #[error("audit: the second sandbox is not ready")]
    AuditNeighbour,
    /// A probe of an audit failed, so that its property could not be judged.
    #[error("audit: the probe of `{property}` failed")]
    Probe {
        /// The property.
        property: &'static str,
        /// The cause.
        source: ProbeError,
    },
    /// Only a microVM can be saved and copied.
    #[error("only a microVM can be saved and copied: use the tier ironclaw")]
    MicrovmRequired,
    /// Private memory was requested, and no acceptable tier has it.
    #[error(
        "private memory needs the tier ironclaw: the containers of a host share the pages of their \
         files"
    )]
    PrivateMemory,
    /// The sandbox was not started as forkable, or was forked already.
    #[error(
        "this sandbox cannot be forked: start it with `Builder::forkable(true)`, and fork it once"
    )]
    NotForkable,
    /// Too many copies were requested at once.
    #[error("{count} copies at once: at most {max}")]
    ForkCount {
        /// The requested number.
        count: usize,
        /// The limit.
        max: usize,
    },
    /// The size of a pool is out of range.
    #[error("a pool of {size}: from 1 to {max} monitors can wait")]
    PoolSize {
        /// The requested size.
        size: usize,
        /// The limit.
        max: usize,
    },
    /// A template cannot be built or used.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The warm-up command of a template failed.
    #[error("the warm-up command {}, and printed {}", describe_exit(exit), quote_output(output))]
    WarmUp {
        /// The exit status.
        exit: Exit,
        /// The end of its output, as one line of printable text.
        output: String,
    },
    /// Command line and environment do not fit one message.
    #[error(
        "the command and its environment take {len} bytes, over the limit of {MAX_CONTROL}: pass \
         large data as a file"
    )]
    CommandTooLong {
        /// Their encoded length in bytes.
        len: usize,
    },
    /// Too many streams are open in one sandbox.
    #[error("more than {MAX_STREAMS} streams at once in one sandbox")]
    TooManyStreams,
    /// A copy failed on the host's side.
    #[error("copy {direction} {} to {}", from.display(), to.display())]
    Copy {
        /// The direction.
        direction: CopyDirection,
        /// The source path.
        from: PathBuf,
        /// The target path.
        to: PathBuf,
        /// The cause.
        source: chitin_tree::Error,
    },
    /// The target of a copy to the host cannot be created or replaced.
    #[error("copy out to {}", target.display())]
    CopyTarget {
        /// The target path.
        target: PathBuf,
        /// The cause.
        source: chitin_tree::Error,
    },
    /// The copied tree contains links that lead out of it. Everything else has been copied.
    #[error(
        "copy out {} to {}: {} links lead out of the copied tree and were omitted: {}",
        from.display(), to.display(), summary.refused, summary.refused_examples.join(", ")
    )]
    LinksRefused {
        /// The source path, in the sandbox.
        from: PathBuf,
        /// The target path, on the host.
        to: PathBuf,
        /// The counts of the copy; `refused` is the number of such links.
        summary: Box<chitin_tree::Summary>,
    },
    /// The agent could not do what was requested.
    #[error("in the sandbox")]
    Guest(#[source] Failure),
}

/// The direction of a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyDirection {
    /// From the host into the sandbox.
    In,
    /// From the sandbox to the host.
    Out,
}

impl std::fmt::Display for CopyDirection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            CopyDirection::In => "in",
            CopyDirection::Out => "out",
        })
    }
}

/// The cause of a credential that was not rotated or revoked in a running sandbox.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RotationError {
    /// The agent did not reply.
    #[error("the agent has not answered within {} s", limit.as_secs())]
    Unanswered {
        /// The time that it was given.
        limit: Duration,
    },
    /// The audit file cannot be written. A value is delivered only after its line is written.
    #[error("write the audit")]
    Audit(#[source] io::Error),
    /// The rotated secret of the vault does not have the field.
    #[error(transparent)]
    Field(#[from] VaultError),
    /// The rotated value is invalid.
    #[error(transparent)]
    Value(#[from] SecretValueError),
    /// The rotated value cannot be delivered through the proxy.
    #[error(transparent)]
    Proxy(#[from] ValueError),
}

/// The cause of a failed probe.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProbeError {
    /// The probe ended with an error.
    #[error("{exit:?}: {stderr}")]
    Exited {
        /// The exit status.
        exit: Exit,
        /// The last line of standard error.
        stderr: String,
    },
    /// The probe did not end in time.
    #[error("it has not ended within {} s", limit.as_secs())]
    Unfinished {
        /// The time that it was given.
        limit: Duration,
    },
    /// The sandbox ended under the probe.
    #[error(transparent)]
    Sandbox(Box<Error>),
}

impl From<chitin_tiers::Error> for Error {
    fn from(error: chitin_tiers::Error) -> Error {
        match error {
            chitin_tiers::Error::GuestEnded(end) => Error::GuestEnded(end),
            chitin_tiers::Error::Stopped => Error::Stopped,
            chitin_tiers::Error::Host(error) => Error::Host(error),
            error => Error::Tier(error),
        }
    }
}

impl Error {
    /// Returns the cause for programs, if the monitor of a microVM reported the failure.
    pub fn code(&self) -> Option<FailureCode> {
        match self {
            Error::Tier(chitin_tiers::Error::Monitor { code, .. }) => Some(*code),
            _ => None,
        }
    }

    /// Returns the cause of the end of the sandbox, or of a failed operation.
    pub fn cause(&self) -> EndCause {
        match self {
            Error::GuestEnded(end) => end.cause,
            Error::Timeout { .. } => EndCause::TimeLimit,
            Error::Stopped => EndCause::Interrupted,
            Error::Protocol(_) => EndCause::GuestFault,
            Error::Policy(_) => EndCause::Policy,
            Error::Tier(error) => tier_cause(error),
            Error::Guest(failure) => guest_cause(failure.errno),
            Error::Probe { source: ProbeError::Sandbox(error), .. } => error.cause(),
            Error::WarmUp { exit: Exit::Signal(_), .. } => EndCause::Signal,
            Error::WarmUp { .. } => EndCause::Exit,
            Error::Spec(_)
            | Error::UnknownCredential { .. }
            | Error::DuplicateCredential { .. }
            | Error::EndpointConflict { .. }
            | Error::SecretInTemplate { .. }
            | Error::Egress(_)
            | Error::MicrovmRequired
            | Error::PrivateMemory
            | Error::NotForkable
            | Error::ForkCount { .. }
            | Error::PoolSize { .. }
            | Error::CopyTarget { .. }
            | Error::CommandTooLong { .. }
            | Error::TooManyStreams => EndCause::Request,
            Error::Host(_)
            | Error::BootTimeout { .. }
            | Error::Credential(_)
            | Error::Rotation { .. }
            | Error::AuditNeighbour
            | Error::Probe { .. }
            | Error::Template(_)
            | Error::Copy { .. }
            | Error::LinksRefused { .. } => EndCause::Host,
        }
    }

    /// Returns the last messages of the guest kernel, if they may explain the error. Untrusted
    /// text.
    pub fn guest_log(&self) -> Option<&str> {
        match self {
            Error::GuestEnded(end) if !end.log.is_empty() => Some(&end.log),
            _ => None,
        }
    }
}

fn tier_cause(error: &chitin_tiers::Error) -> EndCause {
    match error {
        chitin_tiers::Error::GuestEnded(end) => end.cause,
        chitin_tiers::Error::Stopped => EndCause::Interrupted,
        chitin_tiers::Error::Path { .. } => EndCause::Policy,
        chitin_tiers::Error::Monitor { code, .. } => match code {
            FailureCode::Killed | FailureCode::Control | FailureCode::Internal => {
                EndCause::MonitorFault
            }
            FailureCode::Spec => EndCause::Request,
            _ => EndCause::Host,
        },
        _ => EndCause::Host,
    }
}

/// Returns the cause of an operation that failed inside the sandbox: the limit that its error
/// names, or the request itself.
fn guest_cause(errno: i32) -> EndCause {
    match rustix::io::Errno::from_raw_os_error(errno) {
        rustix::io::Errno::NOSPC => EndCause::DiskFull,
        rustix::io::Errno::NOMEM => EndCause::OutOfMemory,
        _ => EndCause::Request,
    }
}

fn format_limit(limit: Duration) -> String {
    if limit.subsec_nanos() == 0 {
        format!("{} s", limit.as_secs())
    } else {
        format!("{} ms", limit.as_millis())
    }
}

/// Returns the verb of a sentence about a command that has ended.
fn describe_exit(exit: &Exit) -> String {
    match exit {
        Exit::Code(code) => format!("exited with code {code}"),
        Exit::Signal(signal) => format!("was ended by signal {signal}"),
        Exit::NotStarted { failure, .. } => format!("could not be started ({failure})"),
    }
}

fn quote_output(output: &str) -> String {
    if output.is_empty() { "nothing".into() } else { format!("`{output}`") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn monitor_failure_has_a_code() {
        let code = FailureCode::KvmPermission;
        let message = "open /dev/kvm: permission denied".into();
        let error = Error::from(chitin_tiers::Error::Monitor { code, message });
        assert_eq!(error.code(), Some(FailureCode::KvmPermission));
        assert_eq!(Error::Stopped.code(), None);
    }

    #[test]
    fn end_has_a_cause() {
        let monitor = |code| Error::from(chitin_tiers::Error::Monitor { code, message: "".into() });
        let end = |cause| GuestEnd { cause, reason: "it ended".into(), log: String::new() };
        for (error, cause) in [
            (Error::Timeout { limit: Duration::from_secs(1) }, EndCause::TimeLimit),
            (Error::GuestEnded(end(EndCause::GuestPanic)), EndCause::GuestPanic),
            (Error::Tier(chitin_tiers::Error::GuestEnded(end(EndCause::Host))), EndCause::Host),
            (monitor(FailureCode::Killed), EndCause::MonitorFault),
            (monitor(FailureCode::KvmPermission), EndCause::Host),
            (Error::Guest(Failure { operation: "write".into(), errno: 28 }), EndCause::DiskFull),
            (Error::Guest(Failure { operation: "write".into(), errno: 13 }), EndCause::Request),
            (Error::Stopped, EndCause::Interrupted),
        ] {
            assert_eq!(error.cause(), cause, "{error}");
        }
    }

    #[test]
    fn host_error_of_a_tier_is_a_host_error() {
        let source = io::Error::from(io::ErrorKind::OutOfMemory);
        let tier = chitin_tiers::Error::Host(HostError { operation: "create a socket", source });
        let operation = match Error::from(tier) {
            Error::Host(error) => error.operation,
            error => panic!("{error:?}"),
        };
        assert_eq!(operation, "create a socket");
    }

    #[test]
    fn time_limit_is_printed_in_whole_units() {
        assert_eq!(format_limit(Duration::from_secs(90)), "90 s");
        assert_eq!(format_limit(Duration::from_millis(1500)), "1500 ms");
    }
}
