use std::io;
use std::time::Duration;

use chitin_protocol::{Failure, Fault};
use chitin_tiers::GuestEnd;

/// What can go wrong with a sandbox. Each variant says what failed and on what; its source, if any, says why.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Something asked for is out of range.
    #[error(transparent)]
    Spec(#[from] chitin_vmm::SpecError),
    /// The host refused something every process may usually do.
    #[error("{what}")]
    Host {
        /// The operation.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The guest ended before it was told to.
    #[error("{0}")]
    GuestEnded(GuestEnd),
    /// No tier is available, or the one that was chosen failed.
    #[error(transparent)]
    Tier(chitin_tiers::Error),
    /// The guest did not come up.
    #[error("the guest has not answered for {} s: in a microVM, --console shows why", limit.as_secs())]
    BootTimeout {
        /// How long it was given.
        limit: Duration,
    },
    /// The agent broke the protocol. The sandbox has been ended.
    #[error("the agent in the sandbox broke the protocol, so the sandbox was ended: {0}")]
    Protocol(Fault),
    /// The sandbox's time was up.
    #[error("the time limit of {} was reached", humane(*limit))]
    Timeout {
        /// The limit.
        limit: Duration,
    },
    /// The sandbox has been stopped.
    #[error("the sandbox has been stopped")]
    Stopped,
    /// A secret could not be had.
    #[error("secret {name}: {reason}")]
    Secret {
        /// Its name.
        name: String,
        /// What failed on which source; never the value.
        reason: String,
    },
    /// A credential could not be fetched, or not be delivered as was asked.
    #[error(transparent)]
    Credential(#[from] chitin_broker::Error),
    /// A policy cannot be read, or cannot be kept.
    #[error(transparent)]
    Policy(#[from] crate::PolicyError),
    /// Egress that cannot be had.
    #[error(transparent)]
    Egress(#[from] crate::EgressError),
    /// An audit could not be carried out.
    #[error("audit: {what}")]
    Audit {
        /// What went wrong.
        what: String,
    },
    /// Only a microVM can be saved and copied.
    #[error("only a microVM can be saved and copied: use the tier ironclaw")]
    NoMicrovm,
    /// It was not started for that, or has been forked.
    #[error(
        "this sandbox cannot be forked: start it with `Builder::forkable(true)`, and fork it once"
    )]
    NotForkable,
    /// That many copies cannot be made at once.
    #[error("{count} copies at once: at most {}", crate::MAX_FORKS)]
    ForkCount {
        /// What was asked for.
        count: usize,
    },
    /// A pool cannot be of this size.
    #[error("a pool of {size}: from 1 to {} monitors can wait", crate::MAX_POOL)]
    PoolSize {
        /// What was asked for.
        size: usize,
    },
    /// A template cannot be had or used.
    #[error(transparent)]
    Template(#[from] crate::TemplateError),
    /// The command that was to warm a template up has failed.
    #[error("the warm-up command failed ({exit:?}): {}", stderr.trim())]
    WarmUp {
        /// How it ended.
        exit: chitin_protocol::Exit,
        /// What it wrote to standard error.
        stderr: String,
    },
    /// Command line and environment do not fit one message.
    #[error(
        "the command and its environment take {len} bytes, over the limit of {}: hand large data in as a file",
        chitin_protocol::MAX_CONTROL
    )]
    CommandTooLong {
        /// Their encoded length in bytes.
        len: usize,
    },
    /// Too much is going on in one sandbox.
    #[error("more than {} streams at once in one sandbox", chitin_protocol::MAX_STREAMS)]
    TooManyStreams,
    /// A copy failed on the host's side.
    #[error("copy {direction} {what}")]
    Copy {
        /// `in` or `out`.
        direction: &'static str,
        /// From where to where.
        what: String,
        /// Why.
        source: chitin_tree::Error,
    },
    /// A copy out held links that lead out of what was copied. Everything else has been copied.
    #[error("copy out {what}: {count} links lead outside of what is copied and were left out: {}", examples.join(", "))]
    LinksRefused {
        /// From where to where.
        what: String,
        /// How many.
        count: u64,
        /// The first few.
        examples: Vec<String>,
    },
    /// The agent could not do what it was asked.
    #[error("in the sandbox")]
    Guest(#[source] Failure),
}

impl From<chitin_tiers::Error> for Error {
    fn from(error: chitin_tiers::Error) -> Error {
        match error {
            chitin_tiers::Error::GuestEnded(end) => Error::GuestEnded(end),
            chitin_tiers::Error::Stopped => Error::Stopped,
            error => Error::Tier(error),
        }
    }
}

impl Error {
    /// The last messages of the guest kernel, where they may explain the error. Untrusted text.
    pub fn guest_log(&self) -> Option<&str> {
        match self {
            Error::GuestEnded(end) if !end.log.is_empty() => Some(&end.log),
            _ => None,
        }
    }
}

fn humane(limit: Duration) -> String {
    if limit.subsec_nanos() == 0 {
        format!("{} s", limit.as_secs())
    } else {
        format!("{} ms", limit.as_millis())
    }
}
