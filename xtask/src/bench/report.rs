//! Report files of `chitin-bench --json`.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Deserialize;

/// A report, as far as it is needed here.
#[derive(Deserialize)]
pub struct Report {
    #[serde(default)]
    summary: Vec<Row>,
    #[serde(default)]
    booted: Vec<Row>,
    #[serde(default)]
    copied: Vec<Row>,
    #[serde(default)]
    requests: Vec<Row>,
    #[serde(default)]
    answers: Vec<Row>,
    #[serde(default)]
    connections: Vec<Row>,
    peer: Option<Box<Report>>,
    /// The version of the peer.
    #[serde(default)]
    pub version: String,
}

/// One quantity over all runs.
#[derive(Deserialize, Debug, Clone)]
pub struct Row {
    pub name: String,
    pub min: f64,
    pub median: f64,
    pub p99: f64,
    pub max: f64,
}

impl Report {
    pub fn read(path: &Path) -> Result<Report> {
        let json = fs::read(path).with_context(|| format!("read {}", path.display()))?;
        serde_json::from_slice(&json).with_context(|| format!("in {}", path.display()))
    }

    /// Returns the report of the peer.
    pub fn peer(&self) -> Result<&Report> {
        self.peer.as_deref().context("a report without its peer")
    }

    /// Returns all rows; those of a group have its name in front of theirs.
    pub fn rows(&self) -> Vec<Row> {
        let groups = [
            ("booted", &self.booted),
            ("copied", &self.copied),
            ("requests", &self.requests),
            ("answers", &self.answers),
            ("connections", &self.connections),
        ];
        let grouped = groups.into_iter().flat_map(|(group, rows)| {
            rows.iter().map(move |row| Row { name: format!("{group} {}", row.name), ..row.clone() })
        });
        self.summary.iter().cloned().chain(grouped).collect()
    }

    /// Returns the median of a row.
    pub fn median(&self, row: &str) -> Result<f64> {
        let found = self.rows().into_iter().find(|found| found.name == row);
        Ok(found.with_context(|| format!("a report without the row `{row}`"))?.median)
    }
}
