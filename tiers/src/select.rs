//! The selection of a tier: the first of the requested tiers that is available.

use chitin_spec::{Boundary, TierKind};
use serde::Serialize;
use tokio_util::task::TaskTracker;

use crate::docker::DockerTier;
use crate::error::Rejections;
use crate::microvm::{self, MicrovmTier};
use crate::oci::OciTier;
use crate::{Artifacts, Capabilities, Error, Tier, Unavailable};

/// The tier of a sandbox, and the reason for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SelectedTier {
    /// The tier.
    pub tier: TierKind,
    /// Its implementation on this host.
    #[serde(flatten)]
    pub capabilities: Capabilities,
    /// The tiers with precedence, each with the reason why it is unavailable.
    pub passed_over: Vec<RejectedTier>,
}

/// A tier that is unavailable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RejectedTier {
    /// The tier.
    pub tier: TierKind,
    /// The reason.
    #[serde(flatten)]
    pub unavailable: Unavailable,
}

impl SelectedTier {
    /// Returns a microVM as the first choice.
    pub fn microvm() -> SelectedTier {
        SelectedTier {
            tier: TierKind::Ironclaw,
            capabilities: microvm::capabilities(),
            passed_over: Vec::new(),
        }
    }

    /// Returns the isolation boundary of the sandbox.
    pub fn boundary(&self) -> Boundary {
        match self.tier {
            TierKind::Ironclaw => Boundary::Kvm,
            TierKind::Nanoclaw if self.capabilities.implementation.starts_with("runsc") => {
                Boundary::Gvisor
            }
            TierKind::Nanoclaw | TierKind::Nemoclaw => Boundary::Namespaces,
        }
    }

    /// Returns the name of the tier, with a weaker implementation if it has one: `nanoclaw/runc`
    /// shares the host's kernel.
    pub fn name(&self) -> String {
        match self.is_weakened() {
            true => format!("{}/{}", self.tier, self.capabilities.implementation),
            false => self.tier.to_string(),
        }
    }

    /// Returns true if the boundary is weaker than the tier's, as without gVisor.
    pub fn is_weakened(&self) -> bool {
        self.tier == TierKind::Nanoclaw && self.boundary() != Boundary::Gvisor
    }

    /// Returns true if the sandbox is weaker than the first choice. The user must be told.
    pub fn is_weaker_than_requested(&self) -> bool {
        !self.passed_over.is_empty() || self.is_weakened()
    }

    /// Explains the selection in one sentence.
    pub fn explain(&self) -> String {
        if !self.is_weaker_than_requested() {
            return "it is the first choice".into();
        }
        let rejected = self.passed_over.iter();
        let mut reasons: Vec<_> = rejected
            .map(|other| format!("{} is unavailable: {}", other.tier, other.unavailable.reason))
            .collect();
        if self.is_weakened() {
            reasons.extend(self.capabilities.short_of.iter().cloned());
        }
        reasons.join("; ")
    }
}

/// Returns the tier of a kind, made of these artifacts. `cleanup` tracks its work in the
/// background.
pub fn tier_of(kind: TierKind, artifacts: &Artifacts, cleanup: &TaskTracker) -> Box<dyn Tier> {
    match kind {
        TierKind::Ironclaw => Box::new(MicrovmTier(artifacts.clone())),
        TierKind::Nanoclaw => Box::new(OciTier::new(artifacts, cleanup)),
        TierKind::Nemoclaw => Box::new(DockerTier::new(artifacts, cleanup)),
    }
}

/// Selects the first tier that is available.
///
/// # Errors
/// [`Error::NoTier`] with the reason against each.
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
    Err(Error::NoTier(Rejections(passed_over)))
}
