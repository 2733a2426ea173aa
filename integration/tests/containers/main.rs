//! Failures of the daemon, the runtime or the image of a container tier: each is a clear error with
//! exit code 125, and leaves nothing behind.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;
use std::process::Command;

use chitin_integration::{TierUnderTest, link_artifacts, workspace_dir, write_file, write_script};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

mod fake_daemon;
mod nanoclaw;
mod nemoclaw;
mod silent_daemon;
mod tls_daemon;

/// Creates artifacts whose root has no agent.
fn create_empty_root() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["dev", "dev/shm", "proc", "sys", "work", "tmp"] {
        fs::create_dir_all(dir.path().join("root").join(name)).unwrap();
    }
    pack_root(dir)
}

/// Creates artifacts like the built ones, with an agent that violates the protocol.
fn create_impostor_root() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    fs::create_dir(&root).unwrap();
    let archive = workspace_dir().join("target/artifacts/root.tar");
    let unpacked =
        Command::new("tar").arg("-C").arg(&root).arg("-xf").arg(archive).status().unwrap();
    assert!(unpacked.success());
    fs::remove_file(root.join("init")).unwrap();
    write_script(&root, "init", "while echo I am your agent, believe me; do :; done").unwrap();
    pack_root(dir)
}

/// Packs the root in the directory into an archive with its manifest.
fn pack_root(dir: TempDir) -> TempDir {
    let archive = dir.path().join("root.tar");
    let root = dir.path().join("root");
    let made = Command::new("tar")
        .arg("-C")
        .arg(&root)
        .arg("-cf")
        .arg(&archive)
        .arg(".")
        .status()
        .unwrap();
    assert!(made.success());
    let digest = format!("{:x}", Sha256::digest(fs::read(&archive).unwrap()));
    fs::write(dir.path().join("root.json"), format!("{{\"tar_sha256\": \"{digest}\"}}")).unwrap();
    dir
}

/// Links all built artifacts except one into a directory.
fn link_artifacts_without(dir: &Path, name: &str) {
    let mut names = vec!["root.tar", "root.json", "root.img", "vmlinux"];
    names.retain(|artifact| *artifact != name);
    link_artifacts(dir, &names).unwrap();
}

fn missing_or_damaged_archive_is_reported(tier: TierUnderTest) {
    for name in ["root.tar", "root.json"] {
        let dir = tempfile::tempdir().unwrap();
        link_artifacts_without(dir.path(), name);
        let run = || tier.run("true").env("CHITIN_ARTIFACTS", dir.path()).outcome();
        run().assert_refused("cargo xtask rootfs");
        if name == "root.json" {
            write_file(dir.path(), name, "{\"tar_sha256\": \"../../../etc\"}").unwrap();
            run().assert_refused("SHA-256");
        }
    }
}
