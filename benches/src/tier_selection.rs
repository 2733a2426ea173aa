//! The value of `--tier` where several tiers can be meant.

use std::str::FromStr;

use chitin::{ParseTierError, TierKind};

/// The tiers to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TierSelection {
    /// This tier, which must be available.
    One(TierKind),
    /// Every tier that is available.
    All,
}

impl TierSelection {
    /// Returns the selected tiers, the strongest first.
    pub fn to_vec(self) -> Vec<TierKind> {
        match self {
            TierSelection::One(tier) => vec![tier],
            TierSelection::All => TierKind::ALL.to_vec(),
        }
    }
}

impl FromStr for TierSelection {
    type Err = String;

    fn from_str(text: &str) -> Result<TierSelection, String> {
        match text {
            "all" => Ok(TierSelection::All),
            _ => text
                .parse()
                .map(TierSelection::One)
                .map_err(|error: ParseTierError| format!("{error}, or `all`")),
        }
    }
}
