//! The committed medians, `benches/figures.json`, and the comparison with them.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::suite::BENCHES;
use crate::workspace;

/// The tolerated difference to the committed median, in percent. Two runs of the same build differ
/// by less than one.
pub const TOLERANCE: f64 = 3.0;

/// Medians by name: that of the benchmark, and that of the row.
pub type Figures = BTreeMap<String, f64>;

fn path() -> PathBuf {
    workspace::root_dir().join("benches/figures.json")
}

pub fn read_figures() -> Result<Figures> {
    let path = path();
    let json = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_slice(&json).with_context(|| format!("in {}", path.display()))
}

pub fn write_figures(figures: &Figures) -> Result<()> {
    let path = path();
    let json = serde_json::to_string_pretty(figures)? + "\n";
    fs::write(&path, json).with_context(|| format!("write {}", path.display()))
}

/// Returns a line for each figure that is worse than the committed one, or missing.
pub fn compare_figures(committed: &Figures, measured: &Figures) -> Vec<String> {
    let mut lines = Vec::new();
    for (name, before) in committed {
        let first = name.split(' ').next();
        let more_is_better =
            BENCHES.iter().any(|bench| bench.more_is_better && first == Some(bench.name));
        let Some(now) = measured.get(name) else {
            lines.push(format!("{name}: no longer measured"));
            continue;
        };
        let change = 100.0 * (now - before) / before.max(f64::EPSILON);
        let worse = if more_is_better { -change } else { change };
        if worse > TOLERANCE {
            lines.push(format!("{name}: {now:.3} instead of {before:.3}, {worse:.1} % worse"));
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_time_or_less_throughput_is_worse() {
        let figures =
            |values: [(&str, f64); 3]| values.map(|(name, value)| (name.to_owned(), value)).into();
        let before = figures([("boot agent", 100.0), ("throughput in", 100.0), ("gone", 1.0)]);
        let now = figures([("boot agent", 104.0), ("throughput in", 104.0), ("new", 1.0)]);
        assert_eq!(
            compare_figures(&before, &now),
            ["boot agent: 104.000 instead of 100.000, 4.0 % worse", "gone: no longer measured"]
        );
        assert_eq!(compare_figures(&now, &now), Vec::<String>::new());
        let slower = figures([("boot agent", 1.0), ("throughput in", 96.0), ("gone", 1.0)]);
        assert_eq!(compare_figures(&before, &slower).len(), 1);
    }
}
