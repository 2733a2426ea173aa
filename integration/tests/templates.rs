//! Copies of a template: they resume its processes, and share no state.

use std::collections::HashSet;
use std::fs::{self, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use chitin_integration::{Chitin, canary, chitin, unix_time};

fn chitin_with_templates(templates: &Path, args: &str) -> Chitin {
    chitin(args).env("CHITIN_TEMPLATES", templates)
}

#[test]
fn template_copies_resume_and_share_nothing() {
    let dir = tempfile::tempdir().unwrap();
    // A process that continues in every copy, and writes to its memory and to a file.
    let warm_up = "(n=0; while :; do n=$((n + 1)); echo $n > /tmp/count; sleep 0.02; done) \
                   >/dev/null 2>&1 & sleep 0.2; echo warm > /work/w";
    chitin_with_templates(dir.path(), "template build t --memory 128 --warm-up")
        .arg(warm_up)
        .outcome()
        .assert_success();
    let list = chitin_with_templates(dir.path(), "template ls").outcome();
    assert!(
        list.assert_success().lines().any(|line| line.starts_with("t ") && line.contains("128MiB")),
        "{list:?}"
    );

    let script = "cat /work/w; ls /work | wc -l; echo mine > /work/mine; \
                  a=$(cat /tmp/count); sleep 0.3; b=$(cat /tmp/count); \
                  test $b -gt $a && echo alive; \
                  head -c 16 /dev/urandom | od -An -tx1; \
                  cat /proc/sys/kernel/random/boot_id; uname -n; \
                  python3 -c 'import uuid; print(uuid.uuid4())'; date +%s";
    let mut seen = HashSet::new();
    for _ in 0..3 {
        let before = unix_time();
        let outcome =
            chitin_with_templates(dir.path(), "run --template t -- sh -c").arg(script).outcome();
        let lines: Vec<&str> = outcome.assert_success().lines().collect();
        assert_eq!(lines[..3], ["warm", "1", "alive"], "{outcome:?}");
        for unique in &lines[3..7] {
            assert!(seen.insert((*unique).to_owned()), "{unique} twice");
        }
        let clock: u64 = lines[7].parse().unwrap();
        assert!((before..=unix_time()).contains(&clock), "{clock}");
    }
    chitin_with_templates(dir.path(), "template rm t").outcome().assert_success();
    chitin_with_templates(dir.path(), "run --template t -- true")
        .outcome()
        .assert_refused("template `t`");
}

#[test]
fn generator_in_process_memory_is_reseeded() {
    let dir = tempfile::tempdir().unwrap();
    let program = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/programs/vdso_random.py");
    let source = fs::read_to_string(program).unwrap();
    let warm_up = format!(
        "cat > /work/random.py <<'END'\n{source}END\npython3 /work/random.py >/tmp/log 2>&1 &\n\
         for i in $(seq 60); do test -s /tmp/draws && exit 0; sleep 0.5; done; cat /tmp/log; exit 1"
    );
    chitin_with_templates(dir.path(), "template build t --memory 128 --warm-up")
        .arg(warm_up)
        .outcome()
        .assert_success();
    let draw = || {
        let run = "run --template t -- sh -c";
        let outcome = chitin_with_templates(dir.path(), run)
            .arg("sleep 1; head -c -33 /tmp/draws; cat /tmp/log >&2")
            .outcome();
        outcome.assert_success().lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let (one, other) = (draw(), draw());
    let common = one.iter().zip(&other).take_while(|(one, other)| one == other).count();
    let (one, other): (HashSet<_>, HashSet<_>) =
        (one[common..].iter().collect(), other[common..].iter().collect());
    // Drawn before the template was saved, and after it was copied.
    assert!(common > 0 && !one.is_empty() && !other.is_empty(), "{common} {one:?} {other:?}");
    assert!(one.is_disjoint(&other), "{one:?} {other:?}");
}

#[test]
fn secret_is_in_template_copy_not_in_template() {
    let dir = tempfile::tempdir().unwrap();
    chitin_with_templates(dir.path(), "template build t --memory 128").outcome().assert_success();
    let run = "run --template t --secret TOKEN=env:TOKEN -- sh -c";
    let outcome = chitin_with_templates(dir.path(), run)
        .arg("cat $TOKEN_FILE")
        .env("TOKEN", "canary-77aa")
        .outcome();
    assert_eq!(outcome.assert_success(), "canary-77aa");
    canary::assert_no_file_contains(&[dir.path()], "canary-77aa");
}

#[test]
fn modified_template_is_rejected() {
    let dir = tempfile::tempdir().unwrap();
    chitin_with_templates(dir.path(), "template build t --memory 128").outcome().assert_success();
    let t = dir.path().join("t");
    let original = fs::read(t.join("state")).unwrap();
    fs::set_permissions(t.join("state"), Permissions::from_mode(0o600)).unwrap();
    for position in [0, 8, 12, 30, 60, original.len() / 2, original.len() - 1] {
        let mut bytes = original.clone();
        bytes[position] ^= 1;
        fs::write(t.join("state"), bytes).unwrap();
        let outcome = chitin_with_templates(dir.path(), "run --template t -- true").outcome();
        assert_eq!(outcome.code, 125, "byte {position}: {outcome:?}");
        assert_eq!(outcome.stderr.lines().count(), 1, "{}", outcome.stderr);
    }
    fs::write(t.join("state"), &original).unwrap();
    chitin_with_templates(dir.path(), "run --template t -- echo fine").outcome().assert_success();

    fs::set_permissions(t.join("memory"), Permissions::from_mode(0o600)).unwrap();
    OpenOptions::new().write(true).open(t.join("memory")).unwrap().write_all(b"x").unwrap();
    chitin_with_templates(dir.path(), "run --template t -- true")
        .outcome()
        .assert_refused("template `t` was changed");
}

#[test]
fn failed_template_build_leaves_no_files() {
    let dir = tempfile::tempdir().unwrap();
    chitin_with_templates(dir.path(), "template build ../t").outcome().assert_refused("../t");
    let outcome = chitin_with_templates(dir.path(), "template build t --memory 128 --warm-up")
        .arg("echo half done; echo broken >&2; exit 7")
        .outcome();
    outcome.assert_refused("exited with code 7");
    outcome.assert_refused("half done; broken");
    chitin_with_templates(dir.path(), "template inspect t")
        .outcome()
        .assert_refused("template `t`");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn policy_written_into_a_manifest_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    chitin_with_templates(dir.path(), "template build t --memory 128").outcome().assert_success();
    let path = dir.path().join("t/template.json");
    let text = fs::read_to_string(&path).unwrap();
    let edited = text.replace("\"policy\": null", "\"policy\": \"digest\"");
    assert_ne!(edited, text);
    for (bytes, refused) in [(edited, true), (text, false)] {
        fs::remove_file(&path).unwrap();
        fs::write(&path, bytes).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o400)).unwrap();
        let outcome = chitin_with_templates(dir.path(), "run --template t -- true").outcome();
        match refused {
            true => outcome.assert_refused("template `t` was changed"),
            false => assert_eq!(outcome.assert_success(), ""),
        }
    }
}

#[test]
fn foreign_directory_is_named_and_kept() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("photos")).unwrap();
    fs::write(dir.path().join("photos/cat.jpg"), "meow").unwrap();
    let list = chitin_with_templates(dir.path(), "template ls").outcome();
    assert_eq!(list.code, 0, "{list:?}");
    assert!(list.stderr.contains("photos is not a template"), "{list:?}");
    chitin_with_templates(dir.path(), "template rm photos")
        .outcome()
        .assert_refused("photos is not a template");
    assert!(dir.path().join("photos/cat.jpg").exists());
}

#[test]
fn templates_that_others_can_change_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), Permissions::from_mode(0o777)).unwrap();
    for args in ["template ls", "template build t --memory 128", "run --template t -- true"] {
        let outcome = chitin_with_templates(dir.path(), args).outcome();
        outcome.assert_refused("chmod go-w");
    }
}
