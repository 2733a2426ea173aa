//! Which tiers a command is about, and what a tier turned out to be.

use std::str::FromStr;

use chitin::{SelectedTier, TierKind};

use crate::failure::printable;

/// Says aloud where a sandbox is less than what was asked for.
pub fn announce(chosen: &SelectedTier) {
    if chosen.is_less() {
        eprintln!(
            "chitin: {}",
            printable(&format!("running as {}: {}", chosen.name(), chosen.why()))
        );
    }
}

/// The value of `--tier` where several can be meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tiers {
    /// This one, and it has to be there.
    One(TierKind),
    /// Each that this host has.
    All,
}

impl Tiers {
    /// Them, the strongest first.
    pub fn list(self) -> Vec<TierKind> {
        match self {
            Tiers::One(tier) => vec![tier],
            Tiers::All => TierKind::ALL.to_vec(),
        }
    }
}

impl FromStr for Tiers {
    type Err = String;

    fn from_str(text: &str) -> Result<Tiers, String> {
        match text {
            "all" => Ok(Tiers::All),
            _ => text.parse().map(Tiers::One).map_err(|error: String| format!("{error}, nor all")),
        }
    }
}
