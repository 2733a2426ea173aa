//! The removal of what earlier runs have left behind.

use chitin_spec::TierKind;
use chitin_tiers::{Artifacts, Pruned, tier_of};

use crate::cleanup;
use crate::error::Error;

/// Removes what earlier runs have left on a tier: containers of processes that have ended, images
/// of other roots. Removes nothing that a process may still use.
///
/// # Errors
/// The tier is unavailable, or does not answer.
pub async fn prune_tier(tier: TierKind, artifacts: &Artifacts) -> Result<Vec<Pruned>, Error> {
    Ok(tier_of(tier, artifacts, cleanup::tracker()).prune().await?)
}
