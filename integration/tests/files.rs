//! Files go in and come out whole, and nothing else does.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;

use chitin_integration::{chitin, file};
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};

fn copy(option: &str, from: impl AsRef<Path>, to: impl AsRef<Path>) -> String {
    format!("--{option}={}:{}", from.as_ref().display(), to.as_ref().display())
}

#[test]
fn a_tree_keeps_its_modes_and_links_there_and_back() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir_all(tree.join("sub/empty")).unwrap();
    fs::write(tree.join("sub/run.sh"), "#!/bin/sh\necho ran\n").unwrap();
    fs::set_permissions(tree.join("sub/run.sh"), fs::Permissions::from_mode(0o750)).unwrap();
    fs::write(tree.join("odd name\n"), [0, 255, 10]).unwrap();
    symlink("sub/run.sh", tree.join("link")).unwrap();

    let back = dir.path().join("back");
    let script = "/work/tree/link && stat -c %a /work/tree/sub/run.sh && readlink /work/tree/link && \
                  stat -c %U /work/tree/sub && echo new > /work/tree/sub/new";
    let outcome = chitin("run")
        .arg(copy("copy-in", &tree, "/work/"))
        .arg(copy("copy-out", "/work/tree", &back))
        .args(["--", "sh", "-c", script])
        .outcome();
    assert_eq!(outcome.ok(), "ran\n750\nsub/run.sh\nagent");
    assert_eq!(fs::read(back.join("odd name\n")).unwrap(), [0, 255, 10]);
    assert_eq!(fs::read_link(back.join("link")).unwrap(), Path::new("sub/run.sh"));
    assert_eq!(fs::metadata(back.join("sub/run.sh")).unwrap().mode() & 0o777, 0o750);
    assert_eq!(fs::read_to_string(back.join("sub/new")).unwrap(), "new\n");
    assert!(back.join("sub/empty").is_dir());
}

#[test]
fn any_place_can_be_copied_to_and_only_scratch_is_writable() {
    let dir = tempfile::tempdir().unwrap();
    let config = file(dir.path(), "config.yaml", "a: 1\n").unwrap();
    let script = "cat /shared/deep/config.yaml; \
                  for d in / /usr /etc /shared/deep; do touch $d/x 2>/dev/null && echo $d is writable; done; \
                  for d in /work /tmp /dev/shm; do touch $d/x || echo $d is not; done";
    let outcome = chitin("run")
        .arg(copy("copy-in", config, "/shared/deep/config.yaml"))
        .args(["--", "sh", "-c", script])
        .outcome();
    assert_eq!(outcome.ok(), "a: 1");
}

#[test]
fn large_and_many_files_pass() {
    let dir = tempfile::tempdir().unwrap();
    let many = dir.path().join("many");
    fs::create_dir(&many).unwrap();
    for i in 0..1000 {
        fs::write(many.join(format!("{i}")), format!("{i}\n")).unwrap();
    }
    let large = file(dir.path(), "large", vec![0x5a; 20 << 20]).unwrap();
    let back = dir.path().join("back");
    let outcome = chitin("run")
        .arg(copy("copy-in", many, "/work/many"))
        .arg(copy("copy-in", &large, "/work/large"))
        .arg(copy("copy-out", "/work/large", &back))
        .args(["--", "sh", "-c", "cat /work/many/* | sort -n | tail -n 1; ls /work/many | wc -l"])
        .outcome();
    assert_eq!(outcome.ok(), "999\n1000");
    assert!(fs::read(back).unwrap() == fs::read(large).unwrap());
}

#[test]
fn devices_and_sockets_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let _listener = UnixListener::bind(&socket).unwrap();
    let outcome = chitin("run").arg(copy("copy-in", &socket, "/work/")).args(["--", "true"]).outcome();
    outcome.refused("socket");

    let fifo = dir.path().join("fifo");
    mknodat(CWD, &fifo, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    chitin("run").arg(copy("copy-in", &fifo, "/work/")).args(["--", "true"]).outcome().refused("fifo");

    let device = dir.path().join("null");
    mknodat(CWD, &device, FileType::CharacterDevice, Mode::from_raw_mode(0o600), makedev(1, 3)).unwrap();
    chitin("run").arg(copy("copy-in", &device, "/work/")).args(["--", "true"]).outcome().refused("null");

    let out = dir.path().join("out");
    let outcome = chitin("run")
        .arg(copy("copy-out", "/work/d", &out))
        .args(["--", "sh", "-c", "mkdir d; mkfifo d/fifo; echo x > d/file"])
        .outcome();
    outcome.refused("/work/d/fifo");
}

#[test]
fn no_link_leads_out() {
    let dir = tempfile::tempdir().unwrap();
    let outside = file(dir.path(), "outside", "untouched").unwrap();
    let out = dir.path().join("out");
    let script = format!(
        "mkdir d; ln -s {outside} d/absolute; ln -s ../outside d/climbing; ln -s file d/inside; echo x > d/file"
    );
    let outcome =
        chitin("run").arg(copy("copy-out", "/work/d", &out)).args(["--", "sh", "-c", &script]).outcome();
    outcome.refused("2 links lead outside");
    assert_eq!(fs::read_to_string(out.join("inside")).unwrap(), "x\n");
    assert!(fs::symlink_metadata(out.join("absolute")).is_err());
    assert!(fs::symlink_metadata(out.join("climbing")).is_err());

    // A link on the way, put there by the workload, is not followed inside either.
    let outcome = chitin("run")
        .arg(copy("copy-out", "/work/d/passwd", dir.path().join("p")))
        .args(["--", "ln", "-s", "/etc", "d"])
        .outcome();
    outcome.refused("/work/d");
    assert_eq!(fs::read_to_string(outside).unwrap(), "untouched");
}

#[test]
fn a_result_larger_than_the_guest_is_a_lie() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let outcome = chitin("run --memory 128")
        .arg(copy("copy-out", "/work/f", &out))
        .args(["--", "truncate", "-s", "1T", "f"])
        .outcome();
    outcome.refused("copy out /work/f");
    assert!(!out.exists());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing half-written is left");
}

#[test]
fn what_is_missing_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("missing");
    chitin("run").arg(copy("copy-in", &missing, "/work/")).args(["--", "true"]).outcome().refused("missing");
    let outcome = chitin("run").arg(copy("copy-out", "/work/none", &missing)).args(["--", "true"]).outcome();
    outcome.refused("/work/none");
    let outcome = chitin("run")
        .arg(copy("copy-out", "/work/f", dir.path().join("no/such/dir")))
        .args(["--", "touch", "f"])
        .outcome();
    outcome.refused("no/such");
    // A workload that fails keeps its own code.
    let outcome = chitin("run")
        .arg(copy("copy-out", "/work/none", &missing))
        .args(["--", "sh", "-c", "exit 3"])
        .outcome();
    assert_eq!(outcome.code, 3);
    assert!(outcome.stderr.contains("/work/none"));
    chitin("run --copy-in nocolon -- true").outcome().refused("SRC:DST");
}

#[test]
fn files_are_replaced_whole() {
    let dir = tempfile::tempdir().unwrap();
    let out = file(dir.path(), "out", "before").unwrap();
    let outcome = chitin("run")
        .arg(copy("copy-out", "/work/f", &out))
        .args(["--", "sh", "-c", "echo after > f"])
        .outcome();
    outcome.ok();
    assert_eq!(fs::read_to_string(&out).unwrap(), "after\n");
    chitin("run")
        .arg(copy("copy-out", "/work/f", &out))
        .args(["--", "truncate", "-s", "1T", "f"])
        .outcome()
        .refused("/work/f");
    assert_eq!(fs::read_to_string(&out).unwrap(), "after\n");
}
