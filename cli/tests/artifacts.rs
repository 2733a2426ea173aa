//! The files next to the program are used only if no other user can replace them.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

/// Exit code of `chitin run` if Chitin failed, and not the workload.
const FAILED: i32 = 125;

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

/// Creates `bin/chitin` with a monitor that leaves a mark, and artifacts that are none.
fn create_tree() -> tempfile::TempDir {
    let tree = tempfile::tempdir().unwrap();
    for dir in ["bin", "artifacts"] {
        fs::create_dir(tree.path().join(dir)).unwrap();
        set_mode(&tree.path().join(dir), 0o755);
    }
    fs::copy(env!("CARGO_BIN_EXE_chitin"), tree.path().join("bin/chitin")).unwrap();
    let monitor = format!("#!/bin/sh\n> {}\n", tree.path().join("ran").display());
    for (file, content, mode) in [
        ("bin/chitin-vmm", monitor.as_str(), 0o755),
        ("artifacts/vmlinux", "kernel", 0o644),
        ("artifacts/root.img", "image", 0o644),
    ] {
        fs::write(tree.path().join(file), content).unwrap();
        set_mode(&tree.path().join(file), mode);
    }
    tree
}

fn run_chitin(tree: &Path, args: &[&str]) -> Output {
    let mut chitin = Command::new(tree.join("bin/chitin"));
    chitin.env_remove("CHITIN_ARTIFACTS").env_remove("CHITIN_VMM");
    chitin.args(args).output().unwrap()
}

#[test]
fn artifacts_of_another_user_are_not_used() {
    for place in ["artifacts", "artifacts/vmlinux", "artifacts/root.img", "bin", "bin/chitin-vmm"] {
        let tree = create_tree();
        set_mode(&tree.path().join(place), 0o777);
        let output = run_chitin(tree.path(), &["run", "--", "true"]);
        assert_eq!(output.status.code(), Some(FAILED), "{place}");
        let message = String::from_utf8(output.stderr).unwrap();
        let variable = if place.starts_with("bin") { "CHITIN_VMM" } else { "CHITIN_ARTIFACTS" };
        assert!(message.contains(variable) && message.contains(place), "{message}");
        assert!(!tree.path().join("ran").exists(), "{place}: the monitor ran");
    }
}

#[test]
fn monitor_of_another_user_is_not_probed() {
    let tree = create_tree();
    assert_eq!(run_chitin(tree.path(), &["doctor"]).status.code(), Some(1));
    assert!(tree.path().join("ran").exists(), "a trusted monitor is asked for its support");
    fs::remove_file(tree.path().join("ran")).unwrap();
    set_mode(&tree.path().join("bin/chitin-vmm"), 0o777);
    assert_eq!(run_chitin(tree.path(), &["doctor"]).status.code(), Some(1));
    assert!(!tree.path().join("ran").exists());
}
