//! The capabilities of this host, determined by trying them out.

use chitin_spec::TierKind;
use chitin_tiers::microvm::check_host;
use chitin_tiers::{Artifacts, Capabilities, Unavailable, tier_of};
use chitin_vmm::jail::Jail;
use serde::{Deserialize, Serialize};

pub use chitin_tiers::microvm::Check;

use crate::cleanup;

/// The findings about this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diagnosis {
    /// True if a microVM can run here: every check has passed.
    pub ironclaw: bool,
    /// The requirements of a microVM, one by one.
    pub checks: Vec<Check>,
    /// The parts of a monitor's jail that this host has. `None` if the jail cannot be set up, which
    /// is one of the checks.
    pub jail: Option<Jail>,
    /// The tiers, the strongest first.
    pub tiers: Vec<TierAvailability>,
}

/// The availability of a tier on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TierAvailability {
    /// The tier.
    pub tier: TierKind,
    /// The implementation, if the tier is available.
    pub capabilities: Option<Capabilities>,
    /// The missing part, if the tier is unavailable.
    pub unavailable: Option<Unavailable>,
}

/// Determines by trying whether a tier is available on this host.
pub async fn probe_tier(tier: TierKind, artifacts: &Artifacts) -> TierAvailability {
    let probed = tier_of(tier, artifacts, cleanup::tracker()).probe().await;
    let (capabilities, unavailable) = match probed {
        Ok(capabilities) => (Some(capabilities), None),
        Err(unavailable) => (None, Some(unavailable)),
    };
    TierAvailability { tier, capabilities, unavailable }
}

/// Checks everything that a microVM needs, and probes every tier. Ends within some ten seconds,
/// whatever the host does.
pub async fn diagnose_host(artifacts: &Artifacts) -> Diagnosis {
    let (checks, jail) = check_host(artifacts).await;
    let mut tiers = Vec::new();
    for tier in TierKind::ALL {
        tiers.push(probe_tier(tier, artifacts).await);
    }
    Diagnosis { ironclaw: checks.iter().all(|check| check.ok), checks, jail, tiers }
}
