//! Files copied in and out: contents, modes, names, links, and refused kinds.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use chitin::TierKind;
use chitin_integration::{Chitin, Outcome, TierUnderTest, pseudo_random_bytes, write_file};
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};

on_every_tier!(
    files_move_between_scratch_directories,
    tree_round_trip_keeps_modes_and_links,
    copy_in_outside_scratch_needs_microvm,
    dot_copies_contents_of_directory,
    thousand_files_round_trip,
    large_file_round_trips,
    sparse_file_round_trips,
    unusual_file_names_round_trip,
    deep_tree_round_trips,
    empty_files_and_directories_round_trip,
    devices_and_sockets_as_source_are_rejected,
    special_files_in_trees_are_left_out_and_named,
    other_copies_are_made_after_a_failed_one,
    copied_out_modes_obey_the_umask,
    symlink_does_not_escape_destination,
    file_larger_than_guest_is_not_copied_out,
    missing_copy_path_is_reported,
    copied_out_file_is_replaced_atomically,
    files_of_failed_run_are_copied_out,
    files_of_timed_out_run_are_copied_out,
);

fn copy_option(option: &str, from: impl AsRef<Path>, to: impl AsRef<Path>) -> String {
    format!("--{option}={}:{}", from.as_ref().display(), to.as_ref().display())
}

/// Copies `/work/f` out after a script.
fn copy_out_f(tier: TierUnderTest, out: impl AsRef<Path>, script: &str) -> Outcome {
    let run = tier.run_with("").arg(copy_option("copy-out", "/work/f", out));
    run.args(["--", "sh", "-c", script]).outcome()
}

/// Copies `source` in, runs a script next to it, and copies it out as `back`.
fn copy_round_trip(tier: TierUnderTest, source: &Path, back: &Path, script: &str) -> Chitin {
    let inside = Path::new("/work").join(source.file_name().expect("a name"));
    tier.run_with("")
        .arg(copy_option("copy-in", source, "/work/"))
        .arg(copy_option("copy-out", inside, back))
        .args(["--", "sh", "-c", script])
}

fn files_move_between_scratch_directories(tier: TierUnderTest) {
    let program = "import errno, os, shutil
def attempt(call, *paths):
    try: call(*paths); return 'done'
    except OSError as e: return errno.errorcode[e.errno]
open('/tmp/a', 'w').write('content')
print(attempt(os.rename, '/tmp/a', '/work/a'), attempt(os.link, '/tmp/a', '/work/a'))
shutil.move('/tmp/a', '/work/b')
print(open('/work/b').read(), os.path.exists('/tmp/a'))
os.system('mv /work/b /tmp/c && mv /tmp/c /var/tmp/d && mv /var/tmp/d /dev/shm/e')
print(open('/dev/shm/e').read())
os.mkdir('/work/d'); open('/work/d/f', 'w')
print(attempt(os.rename, '/work/d/f', '/work/g'), attempt(os.link, '/work/g', '/work/d/h'))";
    // Each is a mount, because everything around them is read-only.
    assert_eq!(
        tier.run_python(program).outcome().assert_success(),
        "EXDEV EXDEV\ncontent False\ncontent\ndone done"
    );
}

fn tree_round_trip_keeps_modes_and_links(tier: TierUnderTest) {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir_all(tree.join("sub/empty")).unwrap();
    fs::write(tree.join("sub/run.sh"), "#!/bin/sh\necho ran\n").unwrap();
    fs::set_permissions(tree.join("sub/run.sh"), fs::Permissions::from_mode(0o750)).unwrap();
    symlink("sub/run.sh", tree.join("link")).unwrap();
    let back = dir.path().join("back");
    let script = "tree/link && find tree/sub/run.sh -printf '%m\\n' && readlink tree/link && \
                  find tree/sub -maxdepth 0 -printf '%u\\n' && echo new > tree/sub/new";
    let outcome = copy_round_trip(tier, &tree, &back, script).outcome();
    assert_eq!(outcome.assert_success(), "ran\n750\nsub/run.sh\nagent");
    assert_eq!(fs::read_link(back.join("link")).unwrap(), Path::new("sub/run.sh"));
    assert_eq!(fs::metadata(back.join("sub/run.sh")).unwrap().mode() & 0o777, 0o750);
    assert_eq!(fs::read_to_string(back.join("sub/new")).unwrap(), "new\n");
    assert!(back.join("sub/empty").is_dir());
}

fn dot_copies_contents_of_directory(tier: TierUnderTest) {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("sub")).unwrap();
    fs::write(dir.path().join("sub/f"), "f").unwrap();
    let out = dir.path().join("out");
    let mut chitin = tier.run_with("--copy-in .:/work/ --copy-out /work/sub/.:out/").args([
        "--",
        "sh",
        "-c",
        "cat sub/f && echo g > sub/g && touch top && echo own",
    ]);
    chitin.command().current_dir(dir.path());
    assert_eq!(chitin.outcome().assert_success(), "fown");
    assert_eq!(fs::read_to_string(out.join("g")).unwrap(), "g\n");
}

fn copy_in_outside_scratch_needs_microvm(tier: TierUnderTest) {
    let dir = tempfile::tempdir().unwrap();
    let config = write_file(dir.path(), "config.yaml", "a: 1\n").unwrap();
    let script =
        "cat /shared/deep/config.yaml; echo x 2>/dev/null > /shared/deep/x || echo read-only";
    let outcome = tier
        .run_with("")
        .arg(copy_option("copy-in", &config, "/shared/deep/config.yaml"))
        .args(["--", "sh", "-c", script])
        .outcome();
    match tier.kind {
        TierKind::Ironclaw => assert_eq!(outcome.assert_success(), "a: 1\nread-only"),
        // The root of a container is read-only for its agent too.
        TierKind::Nanoclaw | TierKind::Nemoclaw => {
            outcome.assert_refused("/shared/deep: Read-only file system");
        }
    }
    for scratch in ["/work", "/tmp"] {
        let script = format!("cat {scratch}/deep/config.yaml");
        let outcome = tier
            .run_with("")
            .arg(copy_option("copy-in", &config, format!("{scratch}/deep/config.yaml")))
            .args(["--", "sh", "-c", &script])
            .outcome();
        assert_eq!(outcome.assert_success(), "a: 1");
    }
}

fn thousand_files_round_trip(tier: TierUnderTest) {
    let dir = tempfile::tempdir().unwrap();
    let many = dir.path().join("many");
    fs::create_dir(&many).unwrap();
    for i in 0..1000 {
        fs::write(many.join(format!("{i}")), format!("{i}\n")).unwrap();
    }
    let back = dir.path().join("back");
    let outcome = copy_round_trip(
        tier,
        &many,
        &back,
        "cat many/* | sort -n | tail -n 1; set -- many/*; echo $#",
    )
    .outcome();
    assert_eq!(outcome.assert_success(), "999\n1000");
    for i in 0..1000 {
        assert_eq!(fs::read_to_string(back.join(format!("{i}"))).unwrap(), format!("{i}\n"));
    }
}

fn large_file_round_trips(tier: TierUnderTest) {
    let dir = tempfile::tempdir().unwrap();
    let data = pseudo_random_bytes(20 << 20);
    let large = PathBuf::from(write_file(dir.path(), "large", &data).unwrap());
    let back = dir.path().join("back");
    assert_eq!(
        copy_round_trip(tier, &large, &back, "wc -c < large").outcome().assert_success(),
        (20 << 20).to_string()
    );
    assert!(fs::read(back).unwrap() == data);
}

fn sparse_file_round_trips(tier: TierUnderTest) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sparse");
    let sparse = File::create(&path).unwrap();
    sparse.set_len(24 << 20).unwrap();
    sparse.write_all_at(b"middle", 12 << 20).unwrap();
    let back = dir.path().join("back");
    let script = "wc -c < sparse; tail -c +12582913 sparse | head -c 6";
    assert_eq!(
        copy_round_trip(tier, &path, &back, script).outcome().assert_success(),
        "25165824\nmiddle"
    );
    assert!(fs::read(back).unwrap() == fs::read(path).unwrap());
}

fn unusual_file_names_round_trip(tier: TierUnderTest) {
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
    let outcome =
        copy_round_trip(tier, &odd, &back, "find odd -type f -printf x | wc -c").outcome();
    assert_eq!(outcome.assert_success(), names.len().to_string());
    for name in names {
        assert_eq!(fs::read(back.join(OsStr::from_bytes(name))).unwrap(), name);
    }
}

fn deep_tree_round_trips(tier: TierUnderTest) {
    let dir = tempfile::tempdir().unwrap();
    let deep = dir.path().join("deep");
    let bottom: PathBuf = (0..60).map(|i| format!("level-{i}")).collect();
    fs::create_dir_all(deep.join(&bottom)).unwrap();
    fs::write(deep.join(&bottom).join("file"), "found").unwrap();
    let back = dir.path().join("back");
    let outcome = copy_round_trip(tier, &deep, &back, "cat $(find deep -name file)").outcome();
    assert_eq!(outcome.assert_success(), "found");
    assert_eq!(fs::read_to_string(back.join(bottom).join("file")).unwrap(), "found");
}

fn empty_files_and_directories_round_trip(tier: TierUnderTest) {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir_all(tree.join("nothing")).unwrap();
    fs::write(tree.join("empty"), "").unwrap();
    let back = dir.path().join("back");
    copy_round_trip(tier, &tree, &back, "test -d tree/nothing && test -f tree/empty")
        .outcome()
        .assert_success();
    assert!(back.join("nothing").is_dir());
    assert_eq!(fs::read(back.join("empty")).unwrap(), b"");
}

fn devices_and_sockets_as_source_are_rejected(tier: TierUnderTest) {
    let dir = tempfile::tempdir().unwrap();
    let refused = |path: &Path, words: &str| {
        tier.run_with("")
            .arg(copy_option("copy-in", path, "/work/"))
            .args(["--", "true"])
            .outcome()
            .assert_refused(words);
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
}

fn special_files_in_trees_are_left_out_and_named(tier: TierUnderTest) {
    let dir = tempfile::tempdir().unwrap();
    let (tree, back) = (dir.path().join("tree"), dir.path().join("back"));
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("file"), "in").unwrap();
    let _listener = UnixListener::bind(tree.join("a.sock")).unwrap();
    mknodat(CWD, tree.join("fifo"), FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    let report = dir.path().join("report.json");
    // Not with ls, which needs a system call that a gVisor of 2022 refuses.
    let script = "echo tree/*; mkfifo tree/pipe; echo out > tree/z";
    let outcome = tier
        .run_with("")
        .arg(copy_option("copy-in", &tree, "/work/"))
        .arg(copy_option("copy-out", "/work/tree", &back))
        .arg(format!("--report={}", report.display()))
        .args(["--", "sh", "-c", script])
        .outcome();
    assert_eq!(outcome.assert_success(), "tree/file");
    for name in ["tree/a.sock", "tree/fifo", "back/pipe"] {
        assert!(outcome.stderr.contains(name), "{outcome:?}");
    }
    assert_eq!(fs::read_to_string(back.join("z")).unwrap(), "out\n");
    let report: serde_json::Value = serde_json::from_slice(&fs::read(report).unwrap()).unwrap();
    let left_out = |number: usize| report["copies"][number]["left_out"].as_u64();
    assert_eq!((left_out(0), left_out(1)), (Some(2), Some(1)));
}

fn other_copies_are_made_after_a_failed_one(tier: TierUnderTest) {
    let dir = tempfile::tempdir().unwrap();
    let [missing, first, second] = ["missing", "first", "second"].map(|name| dir.path().join(name));
    let outcome = tier
        .run_with("")
        .arg(copy_option("copy-out", "/work/none", &missing))
        .arg(copy_option("copy-out", "/work/f", &first))
        .arg(copy_option("copy-out", "/work/f", &second))
        .args(["--", "sh", "-c", "echo done > f"])
        .outcome();
    outcome.assert_refused("/work/none");
    for copied in [first, second] {
        assert_eq!(fs::read_to_string(copied).unwrap(), "done\n");
    }
    assert!(!missing.exists());
}

fn copied_out_modes_obey_the_umask(tier: TierUnderTest) {
    let dir = tempfile::tempdir().unwrap();
    let probe = dir.path().join("probe");
    fs::create_dir(&probe).unwrap();
    let allowed = fs::metadata(&probe).unwrap().mode() & 0o777;
    let out = dir.path().join("out");
    copy_out_f(tier, &out, "echo x > f; chmod 7777 f").assert_success();
    assert_eq!(fs::metadata(&out).unwrap().mode() & 0o7777, allowed);
}

fn symlink_does_not_escape_destination(tier: TierUnderTest) {
    let dir = tempfile::tempdir().unwrap();
    let outside = write_file(dir.path(), "outside", "untouched").unwrap();
    let out = dir.path().join("out");
    let script = format!(
        "mkdir d; ln -s {outside} d/absolute; ln -s ../outside d/climbing; \
         ln -s file d/inside; echo x > d/file"
    );
    let outcome = tier
        .run_with("")
        .arg(copy_option("copy-out", "/work/d", &out))
        .args(["--", "sh", "-c", &script])
        .outcome();
    outcome.assert_refused("2 links");
    assert_eq!(fs::read_to_string(out.join("inside")).unwrap(), "x\n");
    assert!(fs::symlink_metadata(out.join("absolute")).is_err());
    assert!(fs::symlink_metadata(out.join("climbing")).is_err());

    // A link that the workload put into the path is not followed inside either.
    let outcome = tier
        .run_with("")
        .arg(copy_option("copy-out", "/work/d/passwd", dir.path().join("p")))
        .args(["--", "ln", "-s", "/etc", "d"])
        .outcome();
    outcome.assert_refused("/work/d");
    assert_eq!(fs::read_to_string(outside).unwrap(), "untouched");
}

fn file_larger_than_guest_is_not_copied_out(tier: TierUnderTest) {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let outcome = tier
        .run_with("--memory 128")
        .arg(copy_option("copy-out", "/work/f", &out))
        .args(["--", "truncate", "-s", "1T", "f"])
        .outcome();
    outcome.assert_refused("/work/f");
    assert!(!out.exists());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "a partial file is left");
}

fn missing_copy_path_is_reported(tier: TierUnderTest) {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("missing");
    tier.run_with("")
        .arg(copy_option("copy-in", &missing, "/work/"))
        .args(["--", "true"])
        .outcome()
        .assert_refused("missing");
    let out = |from: &str, to: &Path, script: &str| {
        tier.run_with("")
            .arg(copy_option("copy-out", from, to))
            .args(["--", "sh", "-c", script])
            .outcome()
    };
    out("/work/none", &missing, "true").assert_refused("/work/none");
    out("/work/f", &dir.path().join("no/such/dir"), "touch f").assert_refused("no/such");
    tier.run_with("--copy-in nocolon -- true").outcome().assert_usage_error("SRC:DST");
}

fn copied_out_file_is_replaced_atomically(tier: TierUnderTest) {
    let dir = tempfile::tempdir().unwrap();
    let out = write_file(dir.path(), "out", "before").unwrap();
    let run = |script: &str| copy_out_f(tier, &out, script);
    run("echo after > f").assert_success();
    assert_eq!(fs::read_to_string(&out).unwrap(), "after\n");
    run("truncate -s 1T f").assert_refused("/work/f");
    assert_eq!(fs::read_to_string(&out).unwrap(), "after\n");
}

fn files_of_failed_run_are_copied_out(tier: TierUnderTest) {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let run = |script: &str| copy_out_f(tier, &out, script);
    assert_eq!(run("echo log > f; exit 3").code, 3);
    assert_eq!(fs::read_to_string(&out).unwrap(), "log\n");
    // A missing file does not change the exit code.
    let outcome = run("exit 4");
    assert_eq!(outcome.code, 4);
    assert!(outcome.stderr.contains("/work/f"), "{outcome:?}");
}

fn files_of_timed_out_run_are_copied_out(tier: TierUnderTest) {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let outcome = tier
        .run_with("--timeout 15s")
        .arg(copy_option("copy-out", "/work/f", &out))
        .args(["--", "sh", "-c", "echo half > f; echo up; sleep 600"])
        .outcome();
    assert_eq!((outcome.code, outcome.stdout_text()), (124, "up"));
    assert_eq!(fs::read_to_string(&out).unwrap(), "half\n");
}
