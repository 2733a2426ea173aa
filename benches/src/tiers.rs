//! The tiers that a benchmark measures.

use std::str::FromStr;

use chitin::TierKind;

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
