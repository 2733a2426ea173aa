use std::fmt;
use std::io;
use std::path::PathBuf;

use chitin_spec::EndCause;
use chitin_vmm::{FailureCode, HostError};

use crate::RejectedTier;
use crate::artifacts::ArtifactKind;
use crate::trusted_path::UntrustedPath;

/// An error of a tier. Each variant names the operation and its object; a source has the cause.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file that every microVM needs is missing.
    #[error("no {kind} at {}: {}", path.display(), kind.remedy())]
    Artifact {
        /// Kind of file.
        kind: ArtifactKind,
        /// Path at which it was expected.
        path: PathBuf,
    },
    /// Another user could replace a file that was found relative to the running program.
    #[error(
        "the {kind} {} was found next to this program, but another user can replace it: {cause}; \
         or set {} to a location that you trust",
        path.display(),
        kind.variable()
    )]
    UntrustedArtifact {
        /// Kind of file.
        kind: ArtifactKind,
        /// The file.
        path: PathBuf,
        /// The place that another user can change, part of the message.
        cause: UntrustedPath,
    },
    /// A program could not be started.
    #[error("start {}{}", path.display(), explain_spawn(source))]
    Spawn {
        /// The program.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// The host refused an operation that processes can usually do.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The monitor could not start the guest.
    #[error("start the microVM: {message}")]
    Monitor {
        /// The cause, for programs: `KvmPermission` if the user may not open `/dev/kvm`.
        code: FailureCode,
        /// The monitor's message, with the remedy.
        message: String,
    },
    /// The guest ended before it was told to.
    #[error("{0}")]
    GuestEnded(GuestEnd),
    /// The sandbox has been stopped.
    #[error("the sandbox has been stopped")]
    Stopped,
    /// No acceptable tier is available.
    #[error("no acceptable tier is available on this host: {0}")]
    NoTier(Rejections),
    /// A container could not be started.
    #[error("start a container with {engine}: {source}")]
    Container {
        /// The program that runs containers.
        engine: String,
        /// Cause.
        source: ContainerError,
    },
    /// A policy places a file where a container cannot have it.
    #[error("{} cannot be copied into a container: {reason}", path.display())]
    Path {
        /// Path in the sandbox.
        path: PathBuf,
        /// Cause, with the remedy.
        reason: PathError,
    },
    /// The sandbox has ended, and something of it could not be removed.
    #[error("could not remove {leftover}")]
    Leftover {
        /// The object and its location.
        leftover: String,
    },
}

/// Names the limit behind a process that could not be created.
fn explain_spawn(source: &io::Error) -> String {
    match source.kind() {
        io::ErrorKind::WouldBlock => format!(": {}", chitin_text::explain_refused_process()),
        _ => String::new(),
    }
}

/// The cause of a failed start of a container.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// The engine or the agent reported this message. Untrusted text.
    #[error("{0}")]
    Reported(String),
    /// The daemon's host has fewer CPUs than the sandbox.
    #[error("{requested} CPUs are more than the {available} of its host: lower --cpus")]
    TooManyCpus {
        /// CPUs of the sandbox.
        requested: u8,
        /// CPUs of the host.
        available: i64,
    },
    /// The agent did not answer in time.
    #[error("the agent did not answer")]
    Silent,
    /// The start was cancelled.
    #[error("the start was cancelled")]
    Cancelled,
    /// The archive of the root differs from its manifest, or cannot be unpacked.
    #[error("{0}")]
    Root(String),
}

/// The reason why a container cannot have a file at a path.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// A directory above it is a file or link of the image.
    #[error("the image has another file at {}", .0.display())]
    NotADirectory(PathBuf),
    /// gVisor's kernel has no Landlock, which enforces the files of a policy.
    #[error(
        "gVisor has no Landlock, which enforces the files of a policy: choose the tier ironclaw or \
         nemoclaw"
    )]
    NoLandlock,
    /// Its directory belongs to the image.
    #[error(
        "{} belongs to the image and is read-only: choose a directory that the image does not have",
        .0.display()
    )]
    ImageDirectory(PathBuf),
}

/// The tiers that were tried, each with the reason why it is unavailable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejections(pub Vec<RejectedTier>);

impl fmt::Display for Rejections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, rejected) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            write!(f, "{separator}{}: {}", rejected.tier, rejected.unavailable)?;
        }
        Ok(())
    }
}

/// The end of a guest that was not told to end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the guest ended before it was told to: {reason}")]
pub struct GuestEnd {
    /// Cause, for programs.
    pub cause: EndCause,
    /// Cause, for people.
    pub reason: String,
    /// Last messages of the guest kernel. Untrusted text.
    pub log: String,
}
