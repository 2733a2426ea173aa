//! What this host can do, and why not: found out by trying, not by looking.

use chitin_spec::TierKind;
use chitin_tiers::microvm::check_host;
use chitin_tiers::{Artifacts, Capabilities, Tier, Unavailable, tier_of};
use chitin_vmm::jail::Jail;
use serde::{Deserialize, Serialize};

pub use chitin_tiers::microvm::Check;

use crate::cleanup;

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diagnosis {
    /// Whether a microVM can run here: every check is well.
    pub ironclaw: bool,
    /// What a microVM needs, one by one.
    pub checks: Vec<Check>,
    /// What the jail of a monitor is like here; none if it cannot be closed, which is one of the checks.
    pub jail: Option<Jail>,
    /// The ways to isolate a sandbox, the strongest first.
    pub tiers: Vec<Availability>,
}

/// Whether a tier can be had.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Availability {
    /// The tier.
    pub tier: TierKind,
    /// What it is made of, where it can be had.
    pub capabilities: Option<Capabilities>,
    /// What is missing, where it cannot.
    pub unavailable: Option<Unavailable>,
}

impl Availability {
    /// Finds out whether this host has that tier, by trying.
    pub async fn find(tier: TierKind, artifacts: &Artifacts) -> Availability {
        Availability::of(tier_of(tier, artifacts, cleanup::tracker()).as_ref()).await
    }

    async fn of(tier: &dyn Tier) -> Availability {
        let (capabilities, unavailable) = match tier.probe().await {
            Ok(capabilities) => (Some(capabilities), None),
            Err(unavailable) => (None, Some(unavailable)),
        };
        Availability { tier: tier.kind(), capabilities, unavailable }
    }
}

/// Looks at everything a microVM needs. Ends within some ten seconds, whatever the host does.
pub async fn diagnose(artifacts: &Artifacts) -> Diagnosis {
    let (checks, jail) = check_host(artifacts).await;
    let mut tiers = Vec::new();
    for kind in TierKind::ALL {
        tiers.push(Availability::find(kind, artifacts).await);
    }
    Diagnosis { ironclaw: checks.iter().all(|check| check.ok), checks, jail, tiers }
}
