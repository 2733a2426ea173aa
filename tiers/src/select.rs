//! Which tier a sandbox gets. The first that was asked for, unless another one was named as acceptable.

use chitin_spec::{Boundary, TierKind};
use serde::Serialize;
use tokio_util::task::TaskTracker;

use crate::docker::DockerTier;
use crate::microvm::{self, MicrovmTier};
use crate::oci::OciTier;
use crate::{Artifacts, Capabilities, Error, Tier, Unavailable};

/// The tier of a sandbox, and why it is that one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SelectedTier {
    /// The tier.
    pub tier: TierKind,
    /// What it is made of here.
    #[serde(flatten)]
    pub capabilities: Capabilities,
    /// Those that were asked for before it, and what each lacks.
    pub passed_over: Vec<RejectedTier>,
}

/// A tier that would have been better.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RejectedTier {
    /// The tier.
    pub tier: TierKind,
    /// Why it cannot be had.
    #[serde(flatten)]
    pub unavailable: Unavailable,
}

impl SelectedTier {
    /// A microVM, as it is where nobody asked for anything else.
    pub fn microvm() -> SelectedTier {
        SelectedTier {
            tier: TierKind::Ironclaw,
            capabilities: microvm::capabilities(),
            passed_over: Vec::new(),
        }
    }

    /// What isolates a sandbox of it.
    pub fn boundary(&self) -> Boundary {
        match self.tier {
            TierKind::Ironclaw => Boundary::Kvm,
            TierKind::Nanoclaw if self.capabilities.implementation.starts_with("runsc") => {
                Boundary::Gvisor
            }
            TierKind::Nanoclaw | TierKind::Nemoclaw => Boundary::Namespaces,
        }
    }

    /// The tier's name, with what it falls short of by: `nanoclaw/runc` has no kernel of its own.
    pub fn name(&self) -> String {
        match self.is_weakened() {
            true => format!("{}/{}", self.tier, self.capabilities.implementation),
            false => self.tier.to_string(),
        }
    }

    /// Whether its wall is weaker than its tier's, as gVisor's tier is without gVisor.
    pub fn is_weakened(&self) -> bool {
        self.tier == TierKind::Nanoclaw && !self.capabilities.implementation.starts_with("runsc")
    }

    /// Whether it is less than what was asked for, which is never to go unsaid.
    pub fn is_less(&self) -> bool {
        !self.passed_over.is_empty() || self.is_weakened()
    }

    /// Why it is this one, in a sentence.
    pub fn why(&self) -> String {
        if !self.is_less() {
            return "it is what was asked for".into();
        }
        let others = self.passed_over.iter();
        let mut reasons: Vec<_> = others
            .map(|other| format!("no {}: {}", other.tier, other.unavailable.reason))
            .collect();
        if self.is_weakened() {
            reasons.extend(self.capabilities.short_of.iter().cloned());
        }
        reasons.join("; ")
    }
}

/// The tier of that kind, made of these files; what it clears away in the background is counted by `cleanup`.
pub fn tier_of(kind: TierKind, artifacts: &Artifacts, cleanup: &TaskTracker) -> Box<dyn Tier> {
    match kind {
        TierKind::Ironclaw => Box::new(MicrovmTier(artifacts.clone())),
        TierKind::Nanoclaw => Box::new(OciTier::new(artifacts, cleanup)),
        TierKind::Nemoclaw => Box::new(DockerTier::new(artifacts, cleanup)),
    }
}

/// The first of these that can be had.
///
/// # Errors
/// [`Error::NoTier`], with what each lacks.
pub async fn select_tier(
    tiers: Vec<Box<dyn Tier>>,
) -> Result<(Box<dyn Tier>, SelectedTier), Error> {
    let mut passed_over = Vec::new();
    for tier in tiers {
        let kind = tier.kind();
        match tier.probe().await {
            Ok(capabilities) => {
                let Capabilities { implementation, version, .. } = &capabilities;
                tracing::info!(tier = %kind, implementation, version, "tier selected");
                return Ok((tier, SelectedTier { tier: kind, capabilities, passed_over }));
            }
            Err(unavailable) => {
                tracing::info!(tier = %kind, reason = unavailable.reason, "tier unavailable");
                passed_over.push(RejectedTier { tier: kind, unavailable });
            }
        }
    }
    let each: Vec<_> =
        passed_over.iter().map(|other| format!("{}: {}", other.tier, other.unavailable)).collect();
    Err(Error::NoTier { missing: each.join("; ") })
}
