//! How a sandbox is isolated: the tier that is asked for, and the boundary that comes of it.

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
    /// A microVM with a kernel of its own.
    Ironclaw,
    /// gVisor, or a hardened container where runsc is absent.
    Nanoclaw,
    /// A hardened container of a Docker daemon.
    Nemoclaw,
}

impl TierKind {
    /// All of them, the strongest first.
    pub const ALL: [TierKind; 3] = [TierKind::Ironclaw, TierKind::Nanoclaw, TierKind::Nemoclaw];

    /// Its name in files and options.
    pub fn name(self) -> &'static str {
        match self {
            TierKind::Ironclaw => "ironclaw",
            TierKind::Nanoclaw => "nanoclaw",
            TierKind::Nemoclaw => "nemoclaw",
        }
    }
}

impl FromStr for TierKind {
    type Err = String;

    fn from_str(text: &str) -> Result<TierKind, String> {
        let found = TierKind::ALL.into_iter().find(|tier| tier.name() == text);
        found.ok_or_else(|| {
            format!("it is none of {}", TierKind::ALL.map(TierKind::name).join(", "))
        })
    }
}

impl fmt::Display for TierKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The isolation boundary of a running sandbox. One tier can have several: `nanoclaw` without gVisor has namespaces alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Boundary {
    /// A microVM with a kernel of its own.
    Kvm,
    /// gVisor's kernel in user space.
    Gvisor,
    /// Namespaces and filters of the host's kernel: runc, crun, Docker.
    Namespaces,
}

impl Boundary {
    /// All of them, strongest first.
    pub const ALL: [Boundary; 3] = [Boundary::Kvm, Boundary::Gvisor, Boundary::Namespaces];

    /// How a person calls it.
    pub fn name(self) -> &'static str {
        match self {
            Boundary::Kvm => "microVM",
            Boundary::Gvisor => "gVisor",
            Boundary::Namespaces => "container",
        }
    }
}
