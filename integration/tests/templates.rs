//! Copies of a template are fast, whole, and each one's own.

use std::collections::HashSet;
use std::fs::{self, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use chitin_integration::{Chitin, canary, chitin, unix_time};

fn with(templates: &Path, args: &str) -> Chitin {
    chitin(args).env("CHITIN_TEMPLATES", templates)
}

#[test]
fn copies_go_on_where_the_template_stopped_and_share_nothing() {
    let dir = tempfile::tempdir().unwrap();
    // A process that lives on in every copy, and writes to its memory and to a file.
    let warm_up = "(n=0; while :; do n=$((n + 1)); echo $n > /tmp/count; sleep 0.02; done) >/dev/null 2>&1 & sleep 0.2; echo warm > /work/w";
    with(dir.path(), "template build t --memory 128 --warm-up").arg(warm_up).outcome().ok();
    let list = with(dir.path(), "template ls").outcome();
    assert!(
        list.ok().lines().any(|line| line.starts_with("t ") && line.contains("128MiB")),
        "{list:?}"
    );

    let script = "cat /work/w; ls /work | wc -l; echo mine > /work/mine; a=$(cat /tmp/count); sleep 0.3; b=$(cat /tmp/count); \
                  test $b -gt $a && echo alive; \
                  head -c 16 /dev/urandom | od -An -tx1; cat /proc/sys/kernel/random/boot_id; uname -n; \
                  python3 -c 'import uuid; print(uuid.uuid4())'; date +%s";
    let mut seen = HashSet::new();
    for _ in 0..3 {
        let before = unix_time();
        let outcome = with(dir.path(), "run --template t -- sh -c").arg(script).outcome();
        let lines: Vec<&str> = outcome.ok().lines().collect();
        assert_eq!(lines[..3], ["warm", "1", "alive"], "{outcome:?}");
        for own in &lines[3..7] {
            assert!(seen.insert((*own).to_owned()), "{own} twice");
        }
        let clock: u64 = lines[7].parse().unwrap();
        assert!((before..=unix_time()).contains(&clock), "{clock}");
    }
    with(dir.path(), "template rm t").outcome().ok();
    with(dir.path(), "run --template t -- true").outcome().refused("there is no template `t`");
}

#[test]
fn secrets_are_given_to_copies_and_never_to_templates() {
    let dir = tempfile::tempdir().unwrap();
    with(dir.path(), "template build t --memory 128").outcome().ok();
    let run = "run --template t --secret TOKEN=env:TOKEN -- sh -c";
    let outcome =
        with(dir.path(), run).arg("cat $TOKEN_FILE").env("TOKEN", "canary-77aa").outcome();
    assert_eq!(outcome.ok(), "canary-77aa");
    canary::assert_no_file_holds(&[dir.path()], "canary-77aa");
}

#[test]
fn a_template_that_was_touched_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    with(dir.path(), "template build t --memory 128").outcome().ok();
    let t = dir.path().join("t");
    let original = fs::read(t.join("state")).unwrap();
    fs::set_permissions(t.join("state"), Permissions::from_mode(0o600)).unwrap();
    for position in [0, 8, 12, 30, 60, original.len() / 2, original.len() - 1] {
        let mut bytes = original.clone();
        bytes[position] ^= 1;
        fs::write(t.join("state"), bytes).unwrap();
        let outcome = with(dir.path(), "run --template t -- true").outcome();
        assert_eq!(outcome.code, 125, "byte {position}: {outcome:?}");
        assert_eq!(outcome.stderr.lines().count(), 1, "{}", outcome.stderr);
    }
    fs::write(t.join("state"), &original).unwrap();
    with(dir.path(), "run --template t -- echo fine").outcome().ok();

    fs::set_permissions(t.join("memory"), Permissions::from_mode(0o600)).unwrap();
    OpenOptions::new().write(true).open(t.join("memory")).unwrap().write_all(b"x").unwrap();
    with(dir.path(), "run --template t -- true")
        .outcome()
        .refused("was changed, replaced or moved");
}

#[test]
fn what_cannot_be_a_template_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    with(dir.path(), "template build ../t").outcome().refused("no name of a template");
    with(dir.path(), "template build t --memory 128 --warm-up")
        .arg("echo broken >&2; exit 3")
        .outcome()
        .refused("broken");
    with(dir.path(), "template inspect t").outcome().refused("there is no template");
    let left: Vec<_> =
        fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| name == "key"), "{left:?}");
}
