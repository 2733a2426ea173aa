use std::io;
use std::path::PathBuf;

/// What can go wrong with a tier. Each variant says what failed and on what; its source, if any, says why.
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
        /// The cause, for programs: `KvmPermission` if the user may not open `/dev/kvm`.
        code: chitin_vmm::FailureCode,
        /// What the monitor says, with the remedy.
        reason: String,
    },
    /// The guest ended before it was told to.
    #[error("{0}")]
    GuestEnded(GuestEnd),
    /// The sandbox has been stopped.
    #[error("the sandbox has been stopped")]
    Stopped,
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
