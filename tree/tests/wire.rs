//! The format, byte for byte.
//!
//! A change here is a change of the channel's protocol. It needs a review, a line in
//! `docs/tree-format.md`, and a higher protocol version once a release has shipped.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::Path;
use std::time::{Duration, SystemTime};

use common::{describe_tree, host, sent};
use tempfile::tempdir;

fn set_mode_and_time(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    let time = SystemTime::UNIX_EPOCH + Duration::new(1_700_000_000, 123_456_789);
    File::open(path).unwrap().set_modified(time).unwrap();
}

#[test]
fn tree_format_matches_snapshot() {
    let dir = tempdir().unwrap();
    let root = dir.path().join("root");
    fs::create_dir_all(root.join("d")).unwrap();
    fs::write(root.join("f"), "hi").unwrap();
    let sparse = File::create(root.join("s")).unwrap();
    sparse.set_len(1 << 20).unwrap();
    sparse.write_all_at(&[1; 4096], 8192).unwrap();
    symlink("../x", root.join("d/l")).unwrap();
    for (name, mode) in [("d", 0o700), ("f", 0o644), ("s", 0o600), (".", 0o755)] {
        set_mode_and_time(&root.join(name), mode);
    }
    let time = "00f1536500000000 15cd5b07";
    let wire = [
        // directory, no name, mode 0755
        &format!("01 00 ed01 {time}"),
        // directory "d", mode 0700
        &format!("01 01 c001 {time} 64"),
        // link "l" to "../x"
        "03 01 0400 6c 2e2e2f78",
        // end of "d"
        "06",
        // file "f", mode 0644; data at 0, 2 bytes; end at 2
        &format!("02 01 a401 {time} 66"),
        "04 0000000000000000 02000000 6869",
        "05 0200000000000000",
        // file "s", mode 0600; data at 8192, 4096 bytes; end at 1 MiB
        &format!("02 01 8001 {time} 73"),
        &format!("04 0020000000000000 00100000 {}", "01".repeat(4096)),
        "05 0000100000000000",
        // end of the root
        "06",
    ];
    let bytes = sent(&root);
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hex, wire.concat().replace(' ', ""));

    let to = dir.path().join("to");
    chitin_tree::receive(bytes.as_slice(), &to, &host()).unwrap();
    assert_eq!(describe_tree(&root), describe_tree(&to));
}

#[test]
fn left_out_entry_matches_snapshot() {
    let dir = tempdir().unwrap();
    let root = dir.path().join("root");
    fs::create_dir(&root).unwrap();
    let mode = rustix::fs::Mode::RUSR;
    let fifo = root.join("p");
    rustix::fs::mknodat(rustix::fs::CWD, fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    set_mode_and_time(&root, 0o755);
    let bytes = sent(&root);
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let wire = ["0100ed01", "00f1536500000000", "15cd5b07", "07", "01", "01", "70", "06"];
    assert_eq!(hex, wire.concat());
}
