//! Files go in and come out whole, and nothing else does.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use chitin::TierKind;
use chitin_integration::{Chitin, On, file};
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};

on_every_tier!(
    a_tree_keeps_its_modes_and_links_there_and_back,
    scratch_can_be_copied_to_and_in_a_microvm_any_place,
    many_files_pass,
    large_files_pass,
    sparse_files_pass,
    odd_names_pass,
    deep_trees_pass,
    empty_files_and_directories_pass,
    devices_and_sockets_are_refused,
    no_link_leads_out,
    a_result_larger_than_the_guest_is_a_lie,
    what_is_missing_is_named,
    files_are_replaced_whole,
    what_a_run_that_failed_has_made_comes_out,
    what_a_run_that_was_ended_has_made_stays_inside,
);

fn copy(option: &str, from: impl AsRef<Path>, to: impl AsRef<Path>) -> String {
    format!("--{option}={}:{}", from.as_ref().display(), to.as_ref().display())
}

/// Copies `source` in, runs a script beside it, and copies it out as `back`.
fn there_and_back(on: On, source: &Path, back: &Path, script: &str) -> Chitin {
    let inside = Path::new("/work").join(source.file_name().expect("a name"));
    on.with("")
        .arg(copy("copy-in", source, "/work/"))
        .arg(copy("copy-out", inside, back))
        .args(["--", "sh", "-c", script])
}

fn a_tree_keeps_its_modes_and_links_there_and_back(on: On) {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir_all(tree.join("sub/empty")).unwrap();
    fs::write(tree.join("sub/run.sh"), "#!/bin/sh\necho ran\n").unwrap();
    fs::set_permissions(tree.join("sub/run.sh"), fs::Permissions::from_mode(0o750)).unwrap();
    symlink("sub/run.sh", tree.join("link")).unwrap();
    let back = dir.path().join("back");
    let script = "tree/link && find tree/sub/run.sh -printf '%m\\n' && readlink tree/link && find tree/sub -maxdepth 0 -printf '%u\\n' && echo new > tree/sub/new";
    let outcome = there_and_back(on, &tree, &back, script).outcome();
    assert_eq!(outcome.ok(), "ran\n750\nsub/run.sh\nagent");
    assert_eq!(fs::read_link(back.join("link")).unwrap(), Path::new("sub/run.sh"));
    assert_eq!(fs::metadata(back.join("sub/run.sh")).unwrap().mode() & 0o777, 0o750);
    assert_eq!(fs::read_to_string(back.join("sub/new")).unwrap(), "new\n");
    assert!(back.join("sub/empty").is_dir());
}

fn scratch_can_be_copied_to_and_in_a_microvm_any_place(on: On) {
    let dir = tempfile::tempdir().unwrap();
    let config = file(dir.path(), "config.yaml", "a: 1\n").unwrap();
    let script =
        "cat /shared/deep/config.yaml; echo x 2>/dev/null > /shared/deep/x || echo read-only";
    let to = |place: &str| {
        on.with("").arg(copy("copy-in", &config, place)).args(["--", "sh", "-c", script]).outcome()
    };
    let anywhere = to("/shared/deep/config.yaml");
    match on.tier {
        TierKind::Ironclaw => assert_eq!(anywhere.ok(), "a: 1\nread-only"),
        // The root of a container is read-only for its agent as well.
        TierKind::Nanoclaw | TierKind::Nemoclaw => {
            anywhere.refused("open the path to /shared/deep: Read-only file system");
        }
    }
    for scratch in ["/work", "/tmp"] {
        let script = format!("cat {scratch}/deep/config.yaml");
        let outcome = on
            .with("")
            .arg(copy("copy-in", &config, format!("{scratch}/deep/config.yaml")))
            .args(["--", "sh", "-c", &script])
            .outcome();
        assert_eq!(outcome.ok(), "a: 1");
    }
}

fn many_files_pass(on: On) {
    let dir = tempfile::tempdir().unwrap();
    let many = dir.path().join("many");
    fs::create_dir(&many).unwrap();
    for i in 0..1000 {
        fs::write(many.join(format!("{i}")), format!("{i}\n")).unwrap();
    }
    let back = dir.path().join("back");
    let outcome = there_and_back(
        on,
        &many,
        &back,
        "cat many/* | sort -n | tail -n 1; set -- many/*; echo $#",
    )
    .outcome();
    assert_eq!(outcome.ok(), "999\n1000");
    for i in 0..1000 {
        assert_eq!(fs::read_to_string(back.join(format!("{i}"))).unwrap(), format!("{i}\n"));
    }
}

fn large_files_pass(on: On) {
    let dir = tempfile::tempdir().unwrap();
    let data: Vec<u8> =
        (0..20u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let large = PathBuf::from(file(dir.path(), "large", &data).unwrap());
    let back = dir.path().join("back");
    assert_eq!(
        there_and_back(on, &large, &back, "wc -c < large").outcome().ok(),
        (20 << 20).to_string()
    );
    assert!(fs::read(back).unwrap() == data);
}

fn sparse_files_pass(on: On) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sparse");
    let sparse = File::create(&path).unwrap();
    sparse.set_len(24 << 20).unwrap();
    sparse.write_all_at(b"middle", 12 << 20).unwrap();
    let back = dir.path().join("back");
    let script = "wc -c < sparse; tail -c +12582913 sparse | head -c 6";
    assert_eq!(there_and_back(on, &path, &back, script).outcome().ok(), "25165824\nmiddle");
    assert!(fs::read(back).unwrap() == fs::read(path).unwrap());
}

fn odd_names_pass(on: On) {
    let dir = tempfile::tempdir().unwrap();
    let odd = dir.path().join("odd");
    fs::create_dir(&odd).unwrap();
    let long = [b'n'; 255];
    let names: [&[u8]; 8] = [
        b"with space",
        b"line\nfeed\n",
        b"-rf",
        b"*",
        "ünïcode".as_bytes(),
        b"\xff\xfe",
        b"...",
        &long,
    ];
    for name in names {
        fs::write(odd.join(OsStr::from_bytes(name)), name).unwrap();
    }
    let back = dir.path().join("back");
    let outcome = there_and_back(on, &odd, &back, "find odd -type f -printf x | wc -c").outcome();
    assert_eq!(outcome.ok(), names.len().to_string());
    for name in names {
        assert_eq!(fs::read(back.join(OsStr::from_bytes(name))).unwrap(), name);
    }
}

fn deep_trees_pass(on: On) {
    let dir = tempfile::tempdir().unwrap();
    let deep = dir.path().join("deep");
    let bottom: PathBuf = (0..60).map(|i| format!("level-{i}")).collect();
    fs::create_dir_all(deep.join(&bottom)).unwrap();
    fs::write(deep.join(&bottom).join("file"), "found").unwrap();
    let back = dir.path().join("back");
    let outcome = there_and_back(on, &deep, &back, "cat $(find deep -name file)").outcome();
    assert_eq!(outcome.ok(), "found");
    assert_eq!(fs::read_to_string(back.join(bottom).join("file")).unwrap(), "found");
}

fn empty_files_and_directories_pass(on: On) {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir_all(tree.join("nothing")).unwrap();
    fs::write(tree.join("empty"), "").unwrap();
    let back = dir.path().join("back");
    there_and_back(on, &tree, &back, "test -d tree/nothing && test -f tree/empty").outcome().ok();
    assert!(back.join("nothing").is_dir());
    assert_eq!(fs::read(back.join("empty")).unwrap(), b"");
}

fn devices_and_sockets_are_refused(on: On) {
    let dir = tempfile::tempdir().unwrap();
    let refused = |path: &Path, words: &str| {
        on.with("")
            .arg(copy("copy-in", path, "/work/"))
            .args(["--", "true"])
            .outcome()
            .refused(words);
    };
    let socket = dir.path().join("socket");
    let _listener = UnixListener::bind(&socket).unwrap();
    refused(&socket, "socket");
    let fifo = dir.path().join("fifo");
    mknodat(CWD, &fifo, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    refused(&fifo, "fifo");
    let device = dir.path().join("null");
    mknodat(CWD, &device, FileType::CharacterDevice, Mode::from_raw_mode(0o600), makedev(1, 3))
        .unwrap();
    refused(&device, "null");

    let out = dir.path().join("out");
    let outcome = on
        .with("")
        .arg(copy("copy-out", "/work/d", &out))
        .args(["--", "sh", "-c", "mkdir d; mkfifo d/fifo; echo x > d/file"])
        .outcome();
    outcome.refused("/work/d/fifo");
}

fn no_link_leads_out(on: On) {
    let dir = tempfile::tempdir().unwrap();
    let outside = file(dir.path(), "outside", "untouched").unwrap();
    let out = dir.path().join("out");
    let script = format!(
        "mkdir d; ln -s {outside} d/absolute; ln -s ../outside d/climbing; ln -s file d/inside; echo x > d/file"
    );
    let outcome = on
        .with("")
        .arg(copy("copy-out", "/work/d", &out))
        .args(["--", "sh", "-c", &script])
        .outcome();
    outcome.refused("2 links lead outside");
    assert_eq!(fs::read_to_string(out.join("inside")).unwrap(), "x\n");
    assert!(fs::symlink_metadata(out.join("absolute")).is_err());
    assert!(fs::symlink_metadata(out.join("climbing")).is_err());

    // A link on the way, put there by the workload, is not followed inside either.
    let outcome = on
        .with("")
        .arg(copy("copy-out", "/work/d/passwd", dir.path().join("p")))
        .args(["--", "ln", "-s", "/etc", "d"])
        .outcome();
    outcome.refused("/work/d");
    assert_eq!(fs::read_to_string(outside).unwrap(), "untouched");
}

fn a_result_larger_than_the_guest_is_a_lie(on: On) {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let outcome = on
        .with("--memory 128")
        .arg(copy("copy-out", "/work/f", &out))
        .args(["--", "truncate", "-s", "1T", "f"])
        .outcome();
    outcome.refused("copy out /work/f");
    assert!(!out.exists());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing half-written is left");
}

fn what_is_missing_is_named(on: On) {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("missing");
    on.with("")
        .arg(copy("copy-in", &missing, "/work/"))
        .args(["--", "true"])
        .outcome()
        .refused("missing");
    let out = |from: &str, to: &Path, script: &str| {
        on.with("").arg(copy("copy-out", from, to)).args(["--", "sh", "-c", script]).outcome()
    };
    out("/work/none", &missing, "true").refused("/work/none");
    out("/work/f", &dir.path().join("no/such/dir"), "touch f").refused("no/such");
    on.with("--copy-in nocolon -- true").outcome().refused("SRC:DST");
}

fn files_are_replaced_whole(on: On) {
    let dir = tempfile::tempdir().unwrap();
    let out = file(dir.path(), "out", "before").unwrap();
    let run = |script: &str| {
        on.with("")
            .arg(copy("copy-out", "/work/f", &out))
            .args(["--", "sh", "-c", script])
            .outcome()
    };
    run("echo after > f").ok();
    assert_eq!(fs::read_to_string(&out).unwrap(), "after\n");
    run("truncate -s 1T f").refused("/work/f");
    assert_eq!(fs::read_to_string(&out).unwrap(), "after\n");
}

fn what_a_run_that_failed_has_made_comes_out(on: On) {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let run = |script: &str| {
        on.with("")
            .arg(copy("copy-out", "/work/f", &out))
            .args(["--", "sh", "-c", script])
            .outcome()
    };
    assert_eq!(run("echo log > f; exit 3").code, 3);
    assert_eq!(fs::read_to_string(&out).unwrap(), "log\n");
    // It keeps its own code also where there is nothing.
    let outcome = run("exit 4");
    assert_eq!(outcome.code, 4);
    assert!(outcome.stderr.contains("/work/f"), "{outcome:?}");
}

fn what_a_run_that_was_ended_has_made_stays_inside(on: On) {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let outcome = on
        .with("--timeout 15s")
        .arg(copy("copy-out", "/work/f", &out))
        .args(["--", "sh", "-c", "echo half > f; echo up; sleep 600"])
        .outcome();
    assert_eq!((outcome.code, outcome.text()), (124, "up"));
    assert!(!out.exists());
}
