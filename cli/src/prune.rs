//! `chitin prune`: removes what earlier runs have left behind.

use chitin::{Artifacts, Error, TierError, TierKind, printable, prune_tier};

use crate::error::CliError;
use crate::output::{notice, output};

/// Arguments of `chitin prune`.
#[derive(clap::Args)]
#[command(after_help = "\
Removes containers whose process has ended, and images of other versions of the root. It removes
nothing that a running sandbox uses, and nothing that Chitin did not create. Later runs remove most
of it by themselves.

Exit code: 0 if nothing is left, 1 if something could not be removed.

Examples:
  chitin prune
  chitin prune --tier nemoclaw")]
pub struct Args {
    /// Prune this tier only, and fail if it is unavailable
    #[arg(long)]
    tier: Option<TierKind>,
}

/// Prunes the tiers of this host, and prints a line for each object.
pub async fn prune_host(args: &Args) -> Result<u8, CliError> {
    let artifacts = Artifacts::locate();
    let mut code = 0;
    for tier in TierKind::ALL.into_iter().filter(|tier| args.tier.is_none_or(|only| only == *tier))
    {
        let pruned = match prune_tier(tier, &artifacts).await {
            // A tier that this host does not have has left nothing.
            Err(Error::Tier(TierError::NoTier(_))) if args.tier.is_none() => continue,
            pruned => pruned?,
        };
        for found in pruned {
            match found.error {
                None => output!("removed {}", printable(&found.object)),
                Some(error) => {
                    code = 1;
                    notice!("chitin: remove {}: {}", printable(&found.object), printable(&error));
                }
            }
        }
    }
    Ok(code)
}
