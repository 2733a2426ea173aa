//! The tiers: the ways to isolate a sandbox.
//!
//! A tier is anything that returns a byte stream to an agent. Commands, files, egress and
//! credentials are written once, above that stream.
//!
//! ```text
//!   probe ──▶ Capabilities or Unavailable       leaves nothing running
//!   launch ──▶ LaunchedInstance: stream and Instance ──wait_for_end──▶ cause
//!                                            └──stop──▶ nothing is left
//! ```
#![forbid(unsafe_code)]

pub mod archive;
mod artifacts;
mod baseline;
pub mod clock;
mod container;
mod docker;
mod error;
mod launch;
pub mod microvm;
mod oci;
mod select;
mod trusted_path;

use std::fmt;
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::time::Duration;

use chitin_spec::{ReachedLimits, TierKind};
use serde::{Deserialize, Serialize};

pub use self::container::take_leftovers;
pub use artifacts::{ArtifactKind, Artifacts};
pub use baseline::BaselineContainer;
pub use error::{ContainerError, Error, GuestEnd, PathError, Rejections};
pub use launch::{BOOT_LIMIT, GuestFiles, LaunchSpec, ReadOnlyPath};
pub use select::{RejectedTier, SelectedTier, select_tier, tier_of};
pub use trusted_path::{UntrustedPath, UntrustedReason};

/// The future that the methods of a tier return.
pub type Pending<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A way to isolate a sandbox.
pub trait Tier: Send + Sync {
    /// Returns the kind of tier.
    fn kind(&self) -> TierKind;

    /// Finds out within seconds, by trying, whether the tier is available on this host. May be
    /// called at any time.
    fn probe(&self) -> Pending<'_, Result<Capabilities, Unavailable>>;

    /// Finds out whether a sandbox can run, by running something as small as possible in one. Takes
    /// longer than [`probe`](Tier::probe), and leaves nothing running either.
    fn try_out(&self) -> Pending<'_, Result<Capabilities, Unavailable>> {
        self.probe()
    }

    /// Removes what earlier runs have left behind, and nothing that a process may still use.
    fn prune(&self) -> Pending<'_, Result<Vec<Pruned>, Error>> {
        Box::pin(std::future::ready(Ok(Vec::new())))
    }

    /// Starts a sandbox.
    ///
    /// The caller still has to wait for the agent. The tier leaves nothing behind if the launch
    /// fails, or if its future is dropped.
    fn launch<'a>(&'a self, spec: &'a LaunchSpec) -> Pending<'a, Result<LaunchedInstance, Error>>;
}

/// A started sandbox. It ends when either side closes the stream, and at the latest when it is
/// dropped.
pub trait Instance: fmt::Debug + Send {
    /// Releases what only the start needed. Called once the agent has answered.
    fn release_start_resources(&mut self) {}

    /// Returns the time within which the agent must answer.
    fn start_limit(&self) -> Duration {
        BOOT_LIMIT
    }

    /// Returns the limits that were reached since the last call, as far as the host observes them
    /// and the agent cannot.
    fn reached_limits(&mut self) -> ReachedLimits {
        ReachedLimits::default()
    }

    /// Waits until the service that runs the sandbox no longer answers, so that nothing sent to the
    /// sandbox arrives. Never returns where no service does.
    fn wait_until_silent(&self) -> Pending<'static, ()> {
        Box::pin(std::future::pending())
    }

    /// Waits for the end of the sandbox or of the stream, and returns the cause.
    fn wait_for_end(&mut self) -> Pending<'_, Error>;

    /// Ends the sandbox and waits until nothing of it is left. May be called again.
    fn stop(&mut self) -> Pending<'_, Result<(), Error>>;

    /// Returns the monitor of a microVM, which can also save and copy the guest.
    fn monitor(&mut self) -> Option<&mut microvm::Monitor> {
        None
    }
}

/// The result of a launch.
#[derive(Debug)]
pub struct LaunchedInstance {
    /// The handle that ends the sandbox and reports the cause of its end.
    pub instance: Box<dyn Instance>,
    /// The channel to the agent.
    pub stream: UnixStream,
    /// Begin of the launch, `CLOCK_MONOTONIC` nanoseconds.
    pub spawned: u64,
}

/// The implementation of a tier on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// The program, and its platform if it has several: `runsc/ptrace`.
    pub implementation: String,
    /// The version that the program reports.
    pub version: String,
    /// The stronger implementations that were tried first, each with the reason against it.
    #[serde(default)]
    pub short_of: Vec<String>,
}

impl Capabilities {
    /// Returns the known faults of this version that a workload meets, and the remedy at the end.
    pub fn list_known_faults(&self) -> &'static [&'static str] {
        match self.implementation.starts_with("runsc/") {
            true => oci::gvisor::list_known_faults(&self.version),
            false => &[],
        }
    }
}

/// An object that an earlier run had left behind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pruned {
    /// The object and its location.
    pub object: String,
    /// The reason why it could not be removed, if it could not.
    pub error: Option<String>,
}

/// The reason why a tier is unavailable on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{reason}: {remedy}")]
pub struct Unavailable {
    /// Cause.
    pub reason: String,
    /// Remedy.
    pub remedy: String,
}
