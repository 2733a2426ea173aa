//! Reports: the figures of Chitin and of a peer that was measured in the same run.

use std::path::Path;

use serde::Serialize;

use crate::error::BenchError;
use crate::peer::{Peer, PeerInfo};

/// The JSON report of a benchmark.
#[derive(Serialize)]
pub struct Report<T> {
    /// The version of Chitin.
    chitin: &'static str,
    /// The memory of each sandbox, where the benchmark chooses it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<u64>,
    /// The bytes of each transfer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size_mib: Option<u64>,
    /// The figures of Chitin.
    #[serde(flatten)]
    pub figures: T,
    /// The same figures of the peer.
    #[serde(skip_serializing_if = "Option::is_none")]
    peer: Option<PeerReport<T>>,
}

/// A peer and its figures.
#[derive(Serialize)]
struct PeerReport<T> {
    #[serde(flatten)]
    peer: PeerInfo,
    #[serde(flatten)]
    figures: T,
}

impl<T> Report<T> {
    /// Pairs the figures of Chitin with those of the peer.
    pub fn new(figures: T, peer: Option<(&Peer, T)>) -> Self {
        Self {
            chitin: env!("CARGO_PKG_VERSION"),
            memory_mib: None,
            size_mib: None,
            figures,
            peer: peer.map(|(peer, figures)| PeerReport { peer: peer.info(), figures }),
        }
    }

    /// Prints both, each by `print_figures`, those of the peer below `peer_title` and its name.
    pub fn print(&self, peer_title: &str, print_figures: impl Fn(&T)) {
        print_figures(&self.figures);
        if let Some(report) = &self.peer {
            println!("{peer_title} {}", report.peer.title());
            print_figures(&report.figures);
        }
    }
}

/// Writes a value as indented JSON.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<(), BenchError> {
    let failed = || BenchError::io(format!("write {}", path.display()));
    let mut json = serde_json::to_vec_pretty(value).map_err(|error| failed()(error.into()))?;
    json.push(b'\n');
    std::fs::write(path, json).map_err(failed())
}
