//! The program with standard streams that cannot be written to, and with ignored signals.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{File, OpenOptions};
use std::process::{Command, Stdio};

fn chitin(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_chitin"));
    command.args(args).stdin(Stdio::null());
    command
}

fn full() -> File {
    OpenOptions::new().write(true).open("/dev/full").unwrap()
}

/// A pipe whose reader has gone.
fn closed_pipe() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    writer.into()
}

const RESULTS: [&[&str]; 3] = [&["doctor", "--host"], &["policy", "schema"], &["run", "--help"]];

#[test]
fn full_standard_output_is_an_error() {
    for args in RESULTS {
        let output = chitin(args).stdout(full()).output().unwrap();
        assert_eq!(output.status.code(), Some(125), "{args:?}: {output:?}");
        let line = String::from_utf8(output.stderr).unwrap();
        assert!(line.starts_with("chitin: write to standard output: "), "{line}");
    }
}

#[test]
fn reader_that_has_gone_is_no_error() {
    for args in RESULTS {
        let status = chitin(args).stdout(closed_pipe()).status().unwrap();
        assert_eq!(status.code(), Some(0), "{args:?}");
    }
}

#[test]
fn full_standard_error_keeps_the_exit_code() {
    for args in [&["run"][..], &["run", "--tier", "x", "--", "true"], &["policy", "check", "/none"]]
    {
        let expected = chitin(args).output().unwrap().status;
        for stderr in [full().into(), closed_pipe()] {
            let status = chitin(args).stderr(stderr).status().unwrap();
            assert_eq!(status.code(), expected.code(), "{args:?}");
        }
    }
    let status =
        chitin(&["doctor", "--host", "-vvv"]).stdout(Stdio::null()).stderr(full()).status();
    assert_eq!(status.unwrap().code(), Some(0));
}
