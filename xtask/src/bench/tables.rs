//! The tables of `docs/benchmarks.md`, each between two comments that name it.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::report::{Report, Row};
use super::suite::{KIB, PEER_ROWS, PeerRow, ROOT_ROWS, report_path};
use crate::workspace;

/// The document, and the text that its tables are replaced in.
pub struct Document {
    path: PathBuf,
    text: String,
}

impl Document {
    pub fn read() -> Result<Document> {
        let path = workspace::root_dir().join("docs/benchmarks.md");
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        Ok(Document { path, text })
    }

    /// Replaces the table of this name.
    pub fn replace_table(&mut self, name: &str, table: &str) -> Result<()> {
        let (open, close) = (format!("<!-- {name} -->\n"), format!("<!-- end of {name} -->"));
        let (start, end) = (self.text.find(&open))
            .zip(self.text.find(&close))
            .with_context(|| format!("docs/benchmarks.md has no place for the table `{name}`"))?;
        self.text.replace_range(start + open.len()..end, table);
        Ok(())
    }

    pub fn write(&self) -> Result<()> {
        fs::write(&self.path, &self.text)
            .with_context(|| format!("write {}", self.path.display()))?;
        eprintln!("bench: the tables of {} are written", self.path.display());
        Ok(())
    }
}

/// Formats the rows of a report.
pub fn format_table(rows: &[Row], unit: f64) -> String {
    let digits = if unit == KIB { 0 } else { 2 };
    let mut text = String::from("| | min | median | p99 | spread |\n|---|---|---|---|---|\n");
    for Row { name, min, median, p99, max } in rows {
        let spread = 100.0 * (max - min) / median.max(1.0);
        let [min, median, p99] =
            [min, median, p99].map(|value| format!("{:.digits$}", value / unit));
        let _ = writeln!(text, "| {name} | {min} | {median} | {p99} | {spread:.1} % |");
    }
    text
}

/// Formats the comparison with a peer, from the reports in a directory.
pub fn format_peer_table(dir: &Path) -> Result<String> {
    let mut text = String::new();
    for PeerRow { title, bench, row, unit, digits } in PEER_ROWS {
        let report = Report::read(&report_path(dir, bench))?;
        let peer = report.peer()?;
        if text.is_empty() {
            let version = &peer.version;
            let _ = writeln!(text, "| | Chitin | {version} | Chitin ÷ Firecracker |");
            text.push_str("|---|---|---|---|\n");
        }
        let (chitin, peer) = (report.median(row)? / unit, peer.median(row)? / unit);
        let ratio = chitin / peer.max(f64::EPSILON);
        let _ = writeln!(text, "| {title} | {chitin:.digits$} | {peer:.digits$} | {ratio:.2} |");
    }
    Ok(text)
}

/// Formats the comparison of both root devices, from the reports in a directory.
pub fn format_root_table(dir: &Path) -> Result<String> {
    let mut text = String::from("| | virtio-blk | virtio-pmem, DAX |\n|---|---|---|\n");
    for PeerRow { title, bench: suffix, row, unit, digits } in ROOT_ROWS {
        let value = |device: &str| {
            let report = Report::read(&report_path(dir, &format!("root-{device}{suffix}")))?;
            Ok::<_, anyhow::Error>(report.peer()?.median(row)? / unit)
        };
        let (blk, pmem) = (value("blk")?, value("pmem")?);
        let _ = writeln!(text, "| {title} | {blk:.digits$} | {pmem:.digits$} |");
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::super::suite::BENCHES;
    use super::*;

    #[test]
    fn document_has_a_place_for_every_table() {
        let mut document = Document::read().unwrap();
        for bench in &BENCHES {
            document.replace_table(bench.name, "new\n").unwrap();
        }
        for table in ["peer", "root device"] {
            document.replace_table(table, "new\n").unwrap();
        }
        assert_eq!(document.text.matches("new\n<!-- end of").count(), BENCHES.len() + 2);
    }
}
