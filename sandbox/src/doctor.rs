//! The capabilities of this host, determined by trying them out.

use chitin_spec::TierKind;
use chitin_tiers::microvm::{check_host, judge_checks};
use chitin_tiers::{Artifacts, Capabilities, Unavailable, tier_of};
use chitin_vmm::jail::Jail;
use serde::{Deserialize, Serialize};

pub use chitin_tiers::microvm::Check;

use crate::cleanup;
use crate::kvm_verdict::remember_verdict;

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

impl TierAvailability {
    fn new(tier: TierKind, probed: Result<Capabilities, Unavailable>) -> TierAvailability {
        let (capabilities, unavailable) = match probed {
            Ok(capabilities) => (Some(capabilities), None),
            Err(unavailable) => (None, Some(unavailable)),
        };
        TierAvailability { tier, capabilities, unavailable }
    }
}

/// Determines by running something small whether a tier is available on this host.
pub async fn probe_tier(tier: TierKind, artifacts: &Artifacts) -> TierAvailability {
    let probed = tier_of(tier, artifacts, cleanup::tracker()).try_out().await;
    TierAvailability::new(tier, probed)
}

/// Checks everything that a microVM needs, and probes every tier, side by side. Takes a second or
/// two, and some ten seconds if something of the host hangs.
pub async fn diagnose_host(artifacts: &Artifacts) -> Diagnosis {
    // Side by side: each takes its time when something of the host hangs.
    let ((checks, jail), nanoclaw, nemoclaw) = tokio::join!(
        check_host(artifacts),
        probe_tier(TierKind::Nanoclaw, artifacts),
        probe_tier(TierKind::Nemoclaw, artifacts),
    );
    let ironclaw = TierAvailability::new(TierKind::Ironclaw, judge_checks(&checks));
    remember_finding(artifacts, &checks);
    let tiers = vec![ironclaw, nanoclaw, nemoclaw];
    Diagnosis { ironclaw: checks.iter().all(|check| check.ok), checks, jail, tiers }
}

/// Lets later starts know what the probe of KVM has found, and forget an earlier verdict.
fn remember_finding(artifacts: &Artifacts, checks: &[Check]) {
    if let Some(kvm) = checks.iter().find(|check| check.name == "KVM")
        && kvm.ok
    {
        remember_verdict(artifacts, None);
    }
}
