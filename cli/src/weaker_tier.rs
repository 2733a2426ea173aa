//! The notice about a tier that is weaker than the requested one.

use chitin::{SelectedTier, printable};

use crate::output::notice;

/// Prints a notice if a sandbox is weaker than what was asked for.
pub fn warn_if_weaker(selected: &SelectedTier) {
    if selected.is_weaker_than_requested() {
        let notice = format!("running as {}: {}", selected.name(), selected.explain());
        notice!("chitin: {}", printable(&notice));
    }
}
