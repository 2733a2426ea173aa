//! The copies of a run: checked before it, made around it, and recorded in its report.

use chitin::{Error, Sandbox, Summary, check_copy_target, printable};
use serde::Serialize;

use super::values::CopySpec;
use crate::error::CliError;
use crate::output::notice;

/// A copy that was tried.
#[derive(Debug, Serialize)]
pub struct CopyRecord {
    /// `in` or `out`.
    direction: &'static str,
    source: String,
    target: String,
    /// The number of files that were copied.
    files: u64,
    /// The number of bytes in them, without holes.
    bytes: u64,
    /// The number of FIFOs, sockets, devices and files of the kernel that were left out.
    left_out: u64,
    /// The first of them, with their kinds.
    left_out_examples: Vec<String>,
    /// The number of links that lead out of the tree, which were left out.
    refused_links: u64,
    /// The first of them, with their targets.
    refused_link_examples: Vec<String>,
    error: Option<String>,
}

impl CopyRecord {
    fn new(
        direction: &'static str,
        copy: &CopySpec,
        result: &Result<Summary, Error>,
    ) -> CopyRecord {
        let (summary, error) = match result {
            Ok(summary) => (summary.clone(), None),
            Err(Error::LinksRefused { summary, .. }) => ((**summary).clone(), None),
            Err(error) => (Summary::default(), Some(chitin::error_chain(error))),
        };
        CopyRecord {
            direction,
            source: copy.source.display().to_string(),
            target: copy.target.display().to_string(),
            files: summary.files,
            bytes: summary.bytes,
            left_out: summary.left_out,
            left_out_examples: summary.left_out_examples,
            refused_links: summary.refused,
            refused_link_examples: summary.refused_examples,
            error,
        }
    }

    /// Names what was left out, which is no error: it has no contents that could be copied.
    fn print_left_out(&self) {
        let CopyRecord { direction, left_out, left_out_examples: examples, .. } = self;
        if *left_out == 0 {
            return;
        }
        let more = match usize::try_from(*left_out) {
            Ok(count) if count == examples.len() => "",
            _ => ", …",
        };
        let line = format!(
            "copy {direction} {} to {}: {left_out} special files were left out: {}{more}",
            self.source,
            self.target,
            examples.join(", "),
        );
        notice!("chitin: {}", printable(&line));
    }
}

/// Checks the sources of copies in.
pub fn check_sources(copies: &[CopySpec]) -> Result<(), CliError> {
    for CopySpec { source, .. } in copies {
        std::fs::symlink_metadata(source)
            .map_err(CliError::io(format!("copy in {}", source.display())))?;
    }
    Ok(())
}

/// Checks the targets of copies out: a run whose results have no place is not worth its time.
pub fn check_targets(copies: &[CopySpec]) -> Result<(), CliError> {
    for (number, CopySpec { target, .. }) in copies.iter().enumerate() {
        // A copy before this one creates the directory.
        let is_inside = |earlier: &CopySpec| target.starts_with(&earlier.target);
        if !copies[..number].iter().any(is_inside) {
            check_copy_target(target)?;
        }
    }
    Ok(())
}

/// Copies in; the first error ends it, because the command would miss its input.
pub async fn copy_in(
    sandbox: &Sandbox,
    copies: &[CopySpec],
    records: &mut Vec<CopyRecord>,
) -> Result<(), CliError> {
    for copy in copies {
        let copied = sandbox.copy_in(&copy.source, &copy.target).await;
        add_record(records, CopyRecord::new("in", copy, &copied));
        copied?;
    }
    Ok(())
}

/// Copies out all that can be copied. Returns the first error and prints the others.
pub async fn copy_out(
    sandbox: &Sandbox,
    copies: &[CopySpec],
    records: &mut Vec<CopyRecord>,
) -> Result<(), CliError> {
    let mut result = Ok(());
    for copy in copies {
        let copied = sandbox.copy_out(&copy.source, &copy.target).await;
        add_record(records, CopyRecord::new("out", copy, &copied));
        result = keep_first_error(result, copied.map(|_| ()).map_err(CliError::from));
    }
    result
}

/// Returns the first of two errors, and prints the second one.
pub fn keep_first_error(
    first: Result<(), CliError>,
    second: Result<(), CliError>,
) -> Result<(), CliError> {
    match (first, second) {
        (Err(first), Err(second)) => {
            second.print();
            Err(first)
        }
        (first, second) => first.and(second),
    }
}

fn add_record(records: &mut Vec<CopyRecord>, record: CopyRecord) {
    record.print_left_out();
    records.push(record);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn copy(target: &std::path::Path) -> CopySpec {
        CopySpec { source: "/work/x".into(), target: target.into() }
    }

    #[test]
    fn target_inside_an_earlier_target_is_accepted() {
        let dir = tempfile::tempdir().unwrap();
        let (tree, inside) = (copy(&dir.path().join("out")), copy(&dir.path().join("out/sub")));
        check_targets(&[tree.clone(), inside.clone()]).unwrap();
        let error = check_targets(&[inside, tree]).unwrap_err();
        assert!(matches!(error, CliError::Sandbox(Error::CopyTarget { .. })), "{error}");
    }

    #[test]
    fn record_names_what_was_left_out() {
        let summary = Summary {
            left_out: 1,
            left_out_examples: vec!["out/fifo (FIFO)".into()],
            ..Summary::default()
        };
        let record = CopyRecord::new("out", &copy("out".as_ref()), &Ok(summary));
        let json = serde_json::to_value(&record).unwrap();
        assert_eq!(json["left_out_examples"][0], "out/fifo (FIFO)");
        assert_eq!(json["error"], serde_json::Value::Null);
        let record = CopyRecord::new("out", &copy("out".as_ref()), &Err(Error::Stopped));
        assert!(serde_json::to_value(&record).unwrap()["error"].is_string());
    }
}
