use std::io;
use std::path::PathBuf;
use std::time::Duration;

use chitin_protocol::{Failure, Fault};

/// What can go wrong with a sandbox. Each variant says what failed and on what; its source, if any, says why.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file Chitin itself needs is not there.
    #[error("no {what} at {}: {remedy}", path.display())]
    Artifact {
        /// What it is, in words.
        what: &'static str,
        /// Where it was looked for.
        path: PathBuf,
        /// What to do.
        remedy: &'static str,
    },
    /// The monitor's process could not be started.
    #[error("start {}", path.display())]
    Spawn {
        /// The program.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
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
    /// The monitor could not start the guest. The message is the monitor's own.
    #[error("start the microVM: {reason}")]
    Monitor {
        /// What the monitor says, with the remedy.
        reason: String,
    },
    /// The guest ended before it was told to.
    #[error("{0}")]
    GuestEnded(GuestEnd),
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
    /// A secret cannot be kept out of the sandbox as was asked.
    #[error("{reason}")]
    Proxy {
        /// Which secret, and why; never the value.
        reason: String,
    },
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
    /// None of the tiers that would do can be had.
    #[error("no tier that would do can be had here: {missing}")]
    NoTier {
        /// Each of them, with what it lacks and what to do.
        missing: String,
    },
    /// A container could not be started. The message is its runtime's own.
    #[error("start a container with {engine}: {reason}")]
    Container {
        /// The program behind it.
        engine: String,
        /// What it says.
        reason: String,
    },
    /// A policy puts a file where a container has no room for one.
    #[error("{} cannot be put into a container: {reason}", path.display())]
    Place {
        /// Where it was to be.
        path: PathBuf,
        /// Why it cannot be there, and where it could.
        reason: String,
    },
    /// A sandbox has ended, and its remains could not be cleared away.
    #[error("could not clear away {what}")]
    Left {
        /// What is left, and where.
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

impl From<crate::credential::SetupError> for Error {
    fn from(error: crate::credential::SetupError) -> Error {
        Error::Proxy { reason: error.to_string() }
    }
}

/// How a guest ended that was not told to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the guest ended before it was told to: {reason}")]
pub struct GuestEnd {
    /// Who ended it and why, in words.
    pub reason: String,
    /// The last messages of the guest kernel. Untrusted text.
    pub log: String,
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
