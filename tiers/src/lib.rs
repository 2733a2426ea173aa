//! How a sandbox is isolated. A tier is anything that returns a byte stream to an agent; all the rest is written
//! once, above it.
//!
//! ```text
//!   probe ──▶ Capabilities or Unavailable          nothing is started that outlives it
//!   launch ──▶ Launched: stream and Instance ──ended──▶ why
//!                                            └──stop──▶ nothing of it is left
//! ```
#![forbid(unsafe_code)]

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

use std::fmt;
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::time::Duration;

use chitin_spec::TierKind;
use serde::{Deserialize, Serialize};

pub use artifacts::Artifacts;
pub use baseline::BaselineContainer;
pub use error::{Error, GuestEnd};
pub use launch::{BOOT_LIMIT, GuestFiles, LaunchSpec, ReadOnlyPath};
pub use select::{RejectedTier, SelectedTier, select_tier, tier_of};

/// What a tier answers when it is done with it.
pub type Pending<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A way to isolate a sandbox.
pub trait Tier: Send + Sync {
    /// Which one it is.
    fn kind(&self) -> TierKind;

    /// Finds out, by trying and within seconds, whether it can be had here. May be called at any time.
    fn probe(&self) -> Pending<'_, Result<Capabilities, Unavailable>>;

    /// Starts a sandbox. That the agent answers is for the caller to see; that nothing is left where this fails, or is
    /// dropped half-way, is the tier's.
    fn launch<'a>(&'a self, plan: &'a LaunchSpec) -> Pending<'a, Result<Launched, Error>>;
}

/// A sandbox that was started. It ends when the stream is closed, whoever closes it and however; dropping it does so at the
/// latest.
pub trait Instance: fmt::Debug + Send {
    /// The agent has answered: what was there for the start only can go.
    fn answered(&mut self) {}

    /// What has not answered by then never will.
    fn start_limit(&self) -> Duration {
        BOOT_LIMIT
    }

    /// Why it ended, or the stream did. Waits until it has.
    fn ended(&mut self) -> Pending<'_, Error>;

    /// Ends it and waits until nothing of it is left. May be repeated.
    fn stop(&mut self) -> Pending<'_, Result<(), Error>>;

    /// The monitor of a microVM, which can do more: templates, copies.
    fn monitor(&mut self) -> Option<&mut microvm::Monitor> {
        None
    }
}

/// What comes of a launch.
#[derive(Debug)]
pub struct Launched {
    /// Ends it, and says why it ended.
    pub instance: Box<dyn Instance>,
    /// To the agent.
    pub stream: UnixStream,
    /// When it was begun, `CLOCK_MONOTONIC` nanoseconds.
    pub spawned: u64,
}

/// What a tier is made of on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// The program behind it, and the way it works where it has several: `runsc/ptrace`.
    pub implementation: String,
    /// Its version, in its own words.
    pub version: String,
    /// What the tier would rather be made of, and why each is not it.
    #[serde(default)]
    pub short_of: Vec<String>,
}

/// Why a tier cannot be had on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{reason}: {remedy}")]
pub struct Unavailable {
    /// What is missing.
    pub reason: String,
    /// What to do.
    pub remedy: String,
}
