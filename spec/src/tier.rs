//! The tiers that isolate a sandbox, and the boundaries that they result in.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A way to isolate a sandbox, the strongest first.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "lowercase")]
#[schemars(rename = "Runtime")]
pub enum TierKind {
    /// A microVM with its own kernel.
    Ironclaw,
    /// gVisor, or a hardened container where runsc is missing.
    Nanoclaw,
    /// A hardened container of a Docker daemon.
    Nemoclaw,
}

impl TierKind {
    /// All tiers, the strongest first.
    pub const ALL: [TierKind; 3] = [TierKind::Ironclaw, TierKind::Nanoclaw, TierKind::Nemoclaw];

    /// Returns the name that files and options use.
    pub fn name(self) -> &'static str {
        match self {
            TierKind::Ironclaw => "ironclaw",
            TierKind::Nanoclaw => "nanoclaw",
            TierKind::Nemoclaw => "nemoclaw",
        }
    }
}

/// A text that does not name a tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a tier: choose one of {}", TierKind::ALL.map(TierKind::name).join(", "))]
pub struct ParseTierError;

impl FromStr for TierKind {
    type Err = ParseTierError;

    fn from_str(text: &str) -> Result<TierKind, ParseTierError> {
        TierKind::ALL.into_iter().find(|tier| tier.name() == text).ok_or(ParseTierError)
    }
}

impl fmt::Display for TierKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One tier, or all of them: the value of a `--tier` that can mean several.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TierSelection {
    /// This tier, which must be available.
    One(TierKind),
    /// Every tier that is available: `all`.
    All,
}

impl TierSelection {
    /// Returns the selected tiers, the strongest first.
    pub fn to_vec(self) -> Vec<TierKind> {
        match self {
            TierSelection::One(tier) => vec![tier],
            TierSelection::All => TierKind::ALL.to_vec(),
        }
    }
}

/// A text that is neither a tier nor `all`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{ParseTierError}, or `all`")]
pub struct ParseTierSelectionError;

impl FromStr for TierSelection {
    type Err = ParseTierSelectionError;

    fn from_str(text: &str) -> Result<TierSelection, ParseTierSelectionError> {
        match text {
            "all" => Ok(TierSelection::All),
            _ => text.parse().map(TierSelection::One).map_err(|_| ParseTierSelectionError),
        }
    }
}

/// The isolation boundary of a running sandbox. One tier can have several: `nanoclaw` without
/// gVisor has namespaces only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Boundary {
    /// A microVM with its own kernel.
    Kvm,
    /// gVisor's kernel in user space.
    Gvisor,
    /// Namespaces and filters of the host's kernel: runc, crun, Docker.
    Namespaces,
}

impl Boundary {
    /// All boundaries, the strongest first.
    pub const ALL: [Boundary; 3] = [Boundary::Kvm, Boundary::Gvisor, Boundary::Namespaces];

    /// Returns the name for people.
    pub fn name(self) -> &'static str {
        match self {
            Boundary::Kvm => "microVM",
            Boundary::Gvisor => "gVisor",
            Boundary::Namespaces => "container",
        }
    }
}
