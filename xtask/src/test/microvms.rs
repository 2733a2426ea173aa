//! The tests that boot microVMs, on this machine or on emulated KVM hosts.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;

use anyhow::{Context, Result};
use serde_json::Value;

use super::selection::{END_TO_END, Scope, Selection, Tier};
use crate::parts::Part;
use crate::process::{capture_output, new_command};
use crate::workspace;

/// Emulated hosts at the same time, of 4 GiB of memory each.
const MAX_HOSTS: usize = 4;
/// Parts of the suite for each of them, so that one that hangs costs little.
const PARTS_PER_HOST: usize = 3;
/// Tests for each part: a part costs the boot of an emulated host.
const MIN_PART_TESTS: usize = 12;
/// Tests that measure milliseconds, which mean something on the deterministic clock only.
const DETERMINISTIC: [&str; 2] =
    ["forked_clock_matches_host_clock", "connect_latency_is_close_to_exec_latency"];
/// A test of so many guests that it takes as long as all others together.
const LONGEST: &str = "five_hundred_microvms_leak_nothing";

/// Returns the number of emulated hosts at the same time: a processor of an emulated host is one
/// thread here.
pub fn host_count() -> usize {
    thread::available_parallelism().map_or(1, |count| count.get().min(MAX_HOSTS))
}

/// Returns the command that runs the selected tests on this machine.
pub fn local_command(selection: &Selection) -> Command {
    let mut command = new_command("cargo", ["nextest", "run", "--profile", "microvm"]);
    command.args(selection.scope.options()).args(selection.options(None));
    command.current_dir(workspace::root_dir());
    command
}

/// Compiles the tests here, because a processor of an emulated host is a hundred times slower, and
/// returns the parts to run there, the longest first.
pub fn nested_parts(selection: &Selection) -> Result<Vec<Part>> {
    let command = nextest_command(selection.scope)?;
    let part = |name: &str, options: &[&str], more: &[String]| {
        let options = options.iter().map(|word| (*word).to_owned()).collect();
        let command = command.iter().chain(more).cloned().collect();
        Part::nested(format!("microvm {name}"), options, command)
    };
    let mut parts = Vec::new();
    let mut rest = selection.count(Tier::Ironclaw);
    if selection.contains(LONGEST) {
        parts.push(part("500", &[], &selection.options(Some(&format!("test({LONGEST})")))));
        rest -= 1;
    }
    let not_longest = selection.options(Some(&format!("not test({LONGEST})")));
    let count = rest.div_ceil(MIN_PART_TESTS).min(host_count() * PARTS_PER_HOST);
    parts.extend((1..=count).map(|number| {
        let partition = ["--partition".to_owned(), format!("count:{number}/{count}")];
        part(&format!("{number}/{count}"), &[], &[&not_longest[..], &partition].concat())
    }));
    if DETERMINISTIC.iter().any(|test| selection.contains(test)) {
        let tests = DETERMINISTIC.map(|test| format!("test({test})")).join(" | ");
        parts.push(part("clock", &["--icount"], &selection.options(Some(&tests))));
    }
    Ok(parts)
}

/// Returns the command of nextest on an emulated host, which sees the files of this machine: it
/// gets the two lists that Cargo would make.
fn nextest_command(scope: Scope) -> Result<Vec<String>> {
    let dir = workspace::target_dir().join("nested-out");
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    let (binaries, metadata) = (dir.join("binaries.json"), dir.join("metadata.json"));
    let list = ["nextest", "list", "--list-type", "binaries-only", "--message-format", "json"];
    let listed = read_cargo(new_command("cargo", list).args(scope.options()))?;
    write_file(&binaries, &keep_end_to_end_binaries(&listed)?)?;
    write_file(
        &metadata,
        &read_cargo(&mut new_command("cargo", ["metadata", "--format-version", "1"]))?,
    )?;
    let words = [
        "cargo-nextest",
        "nextest",
        "run",
        "--binaries-metadata",
        &binaries.to_string_lossy(),
        "--cargo-metadata",
        &metadata.to_string_lossy(),
        "--profile",
        "microvm",
        "--no-tests",
        "pass",
        // With other work on this machine an emulated host can be so slow that its own clock runs
        // out. A test that fails is tried again, and called flaky if it passes then.
        "--retries",
        "2",
    ];
    Ok(words.map(str::to_owned).into())
}

/// Removes the other binaries from a list of nextest, which would run each of them there to list
/// its tests.
fn keep_end_to_end_binaries(listed: &str) -> Result<String> {
    let mut list: Value =
        serde_json::from_str(listed).context("read nextest's list of test binaries")?;
    list["rust-binaries"]
        .as_object_mut()
        .context("nextest's list has no test binaries")?
        // `chitin-integration` is the library, `chitin-integration::run` a file of tests.
        .retain(|id, _| id.split("::").next() == Some(END_TO_END));
    Ok(list.to_string())
}

fn read_cargo(command: &mut Command) -> Result<String> {
    capture_output(command.current_dir(workspace::root_dir()))
}

fn write_file(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_binaries_are_removed_from_the_list() {
        let listed = r#"{"rust-binaries": {
            "chitin": {}, "chitin-integration": {}, "chitin-integration::run": {}
        }}"#;
        let kept: Value = serde_json::from_str(&keep_end_to_end_binaries(listed).unwrap()).unwrap();
        let kept: Vec<_> = kept["rust-binaries"].as_object().unwrap().keys().collect();
        assert_eq!(kept, ["chitin-integration", "chitin-integration::run"]);
    }
}
