//! Measurements of Chitin and of a peer in turns, so that a change of the host's load meets both.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::error::BenchError;

/// The results of Chitin and those of the peer, in order.
pub struct Turns<T> {
    pub chitin: Vec<T>,
    pub peer: Vec<T>,
}

/// The number of measurements.
#[derive(Clone, Copy)]
pub struct RunCount {
    /// Runs that come first and are not counted: they find caches cold.
    pub warm_up: u32,
    /// Runs that are counted.
    pub counted: u32,
}

/// Measures Chitin and the peer, if there is one, in turns.
///
/// `unit` names a run in the progress bar.
pub async fn measure_in_turns<T>(
    count: RunCount,
    unit: &str,
    mut measure: impl AsyncFnMut() -> Result<T, BenchError>,
    mut measure_peer: Option<impl AsyncFnMut() -> Result<T, BenchError>>,
) -> Result<Turns<T>, BenchError> {
    let progress = new_progress_bar(count.counted, unit);
    let mut turns = Turns { chitin: Vec::new(), peer: Vec::new() };
    for run in 0..count.warm_up.saturating_add(count.counted) {
        let chitin = measure().await?;
        let peer = match &mut measure_peer {
            Some(measure_peer) => Some(measure_peer().await?),
            None => None,
        };
        if run >= count.warm_up {
            turns.chitin.push(chitin);
            turns.peer.extend(peer);
            progress.inc(1);
        }
    }
    progress.finish_and_clear();
    Ok(turns)
}

/// Returns a progress bar on standard error, hidden where that is no terminal.
pub fn new_progress_bar(length: u32, unit: &str) -> ProgressBar {
    let target = match std::io::stderr().is_terminal() {
        true => ProgressDrawTarget::stderr(),
        false => ProgressDrawTarget::hidden(),
    };
    let style = ProgressStyle::with_template(&format!("{{bar:40}} {{pos}}/{{len}} {unit}"))
        .unwrap_or(ProgressStyle::default_bar());
    ProgressBar::with_draw_target(Some(length.into()), target).with_style(style)
}
