use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};

use super::*;

/// A monitor whose probe answers with this JSON.
fn fake_monitor(dir: &Path, answer: &str) -> Artifacts {
    let monitor = dir.join("monitor");
    fs::write(&monitor, format!("#!/bin/sh\necho '{answer}'\n")).unwrap();
    fs::set_permissions(&monitor, Permissions::from_mode(0o755)).unwrap();
    Artifacts { kernel: "kernel".into(), root_image: "image".into(), monitor }
}

/// Returns true if this machine has no `/dev/kvm`, on which every verdict depends.
fn has_no_device() -> bool {
    let missing = !Path::new("/dev/kvm").exists();
    if missing {
        println!("SKIPPED: there is no /dev/kvm to judge");
    }
    missing
}

#[test]
fn verdict_is_remembered_until_something_changes() {
    if has_no_device() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (memory, artifacts) = (dir.path().join("memory"), fake_monitor(dir.path(), "a"));
    assert!(recall_from(&memory, &artifacts).is_none());
    remember_in(&memory, &artifacts, Some("too slow"));
    let error = recall_from(&memory, &artifacts).unwrap();
    assert_eq!(error.code(), Some(FailureCode::KvmUnusable));

    // Another monitor may know better.
    let other = fake_monitor(dir.path(), "b");
    assert!(recall_from(&memory, &other).is_none());
    let artifacts = fake_monitor(dir.path(), "a");
    // Another boot.
    let text = fs::read_to_string(memory.join(FILE)).unwrap();
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    fs::write(memory.join(FILE), text.replace(boot.trim(), "earlier")).unwrap();
    assert!(recall_from(&memory, &artifacts).is_none());
    fs::write(memory.join(FILE), &text).unwrap();
    assert!(recall_from(&memory, &artifacts).is_some());
    // A probe that succeeds.
    remember_in(&memory, &artifacts, None);
    assert!(recall_from(&memory, &artifacts).is_none());
}

#[test]
fn verdict_of_another_user_is_not_read() {
    if has_no_device() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (memory, artifacts) = (dir.path().join("memory"), fake_monitor(dir.path(), "a"));
    remember_in(&memory, &artifacts, Some("too slow"));
    // Others may write to the directory.
    fs::set_permissions(&memory, Permissions::from_mode(0o777)).unwrap();
    assert!(recall_from(&memory, &artifacts).is_none());
    fs::set_permissions(&memory, Permissions::from_mode(0o700)).unwrap();
    assert!(recall_from(&memory, &artifacts).is_some());
    // A link in place of the file, and of the directory.
    fs::rename(memory.join(FILE), dir.path().join("elsewhere")).unwrap();
    symlink(dir.path().join("elsewhere"), memory.join(FILE)).unwrap();
    assert!(recall_from(&memory, &artifacts).is_none());
    let link = dir.path().join("link");
    symlink(&memory, &link).unwrap();
    remember_in(&link, &artifacts, Some("too slow"));
    assert!(fs::symlink_metadata(memory.join(FILE)).unwrap().is_symlink());
}

#[test]
fn malformed_verdict_is_ignored() {
    let dir = tempfile::tempdir().unwrap();
    let artifacts = fake_monitor(dir.path(), "a");
    let memory = dir.path().join("memory");
    fs::create_dir(&memory).unwrap();
    for text in ["", "{", "[]", &"x".repeat(1 << 20)] {
        fs::write(memory.join(FILE), text).unwrap();
        assert!(recall_from(&memory, &artifacts).is_none());
    }
}

#[tokio::test]
async fn probe_ends_a_slow_start_within_two_seconds() {
    let dir = tempfile::tempdir().unwrap();
    let answer = r#"{"usable":false,"reason":"it emulates","elapsed_ns":null}"#;
    let artifacts = fake_monitor(dir.path(), answer);
    let started = std::time::Instant::now();
    let error = watch_slow_start(&artifacts).await;
    // Root's memory is shared with other runs, and this verdict is about no real monitor.
    remember_verdict(&artifacts, None);
    assert_eq!(error.code(), Some(FailureCode::KvmUnusable));
    assert!(started.elapsed() >= SLOW_START, "{:?}", started.elapsed());

    // A usable KVM, and a monitor that does not answer, end nothing.
    for answer in [r#"{"usable":true,"reason":null,"elapsed_ns":1}"#, "nonsense"] {
        let artifacts = fake_monitor(dir.path(), answer);
        let limit = SLOW_START + Duration::from_millis(900);
        assert!(tokio::time::timeout(limit, watch_slow_start(&artifacts)).await.is_err());
    }
}
