//! Attributes that a copy preserves, and entries that it replaces, merges and refuses, between two
//! honest sides.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, SystemTime};

use chitin_tree::{
    Error, FileKind, Limit, LinkPolicy, Lookup, ReceiveOptions, Refusal, SendOptions, check_target,
    create_dirs, receive, send,
};
use common::{agent, describe_tree, host, names, sent};
use tempfile::tempdir;

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

/// Copies within one process, and checks that the counts of both sides are equal.
fn copy(from: &Path, to: &Path, options: &ReceiveOptions) -> Result<chitin_tree::Summary, Error> {
    let (reader, writer) = std::io::pipe().unwrap();
    std::thread::scope(|scope| {
        let sending = scope.spawn(move || send(from, writer, &SendOptions::host()));
        let received = receive(reader, to, options)?;
        let sent = sending.join().unwrap().unwrap();
        assert_eq!(
            (sent.files, sent.directories, sent.bytes),
            (received.files, received.directories, received.bytes)
        );
        Ok(received)
    })
}

#[test]
fn copied_tree_equals_source() {
    let dir = tempdir().unwrap();
    let from = dir.path().join("from");
    fs::create_dir_all(from.join("sub/deep/empty")).unwrap();
    fs::write(from.join("empty"), "").unwrap();
    fs::write(from.join("small"), "hello").unwrap();
    fs::write(
        from.join("large"),
        (0..3_000_000_u32).flat_map(u32::to_le_bytes).collect::<Vec<_>>(),
    )
    .unwrap();
    fs::write(from.join("sub").join(OsStr::from_bytes(b"not\xffutf8\n\x1b[1m")), "x").unwrap();
    fs::write(from.join("sub").join("n".repeat(255)), "long").unwrap();
    symlink("small", from.join("link")).unwrap();
    symlink("../../small", from.join("sub/deep/up")).unwrap();
    symlink(OsStr::from_bytes(b"nowhere\xfe"), from.join("dangling")).unwrap();
    fs::hard_link(from.join("small"), from.join("twin")).unwrap();
    let old = SystemTime::UNIX_EPOCH - Duration::new(1_000_000, 1);
    File::options().write(true).open(from.join("small")).unwrap().set_modified(old).unwrap();
    for (name, bits) in [
        ("small", 0o600),
        ("large", 0o444),
        ("empty", 0o000),
        ("sub/deep/empty", 0o700),
        ("sub/deep", 0o555),
    ] {
        set_mode(&from.join(name), bits);
    }

    for (name, options) in [("host", host()), ("agent", agent())] {
        let to = dir.path().join(name);
        // Only root can read the file of mode 000.
        if rustix::process::geteuid().is_root() {
            let summary = copy(&from, &to, &options).unwrap();
            assert_eq!(describe_tree(&from), describe_tree(&to));
            assert_eq!(
                (summary.files, summary.directories, summary.links, summary.refused),
                (6, 4, 3, 0)
            );
            assert_eq!(to.join("twin").metadata().unwrap().nlink(), 1);
        }
    }
    set_mode(&from.join("sub/deep"), 0o755);
}

#[test]
fn same_tree_gives_same_bytes() {
    let dir = tempdir().unwrap();
    for name in ["b", "a", "C", "aa", "a.b", "ü"] {
        fs::write(dir.path().join(name), name).unwrap();
    }
    let bytes = sent(dir.path());
    assert_eq!(bytes, sent(dir.path()));
    let to = dir.path().join("to");
    receive(bytes.as_slice(), &to, &host()).unwrap();
    assert_eq!(bytes, sent(&to));
}

#[test]
fn single_file_replaces_existing_file() {
    let dir = tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    fs::write(&from, "new").unwrap();
    copy(&from, &to, &host()).unwrap();
    assert_eq!(fs::read(&to).unwrap(), b"new");

    // The old file itself is not changed: it may be open or linked elsewhere.
    fs::write(&to, "old").unwrap();
    set_mode(&to, 0o400);
    fs::hard_link(&to, dir.path().join("other name")).unwrap();
    let mut opened = File::open(&to).unwrap();
    copy(&from, &to, &host()).unwrap();
    let mut text = String::new();
    opened.read_to_string(&mut text).unwrap();
    assert_eq!(
        (text.as_str(), fs::read(dir.path().join("other name")).unwrap()),
        ("old", b"old".to_vec())
    );
    assert_eq!(fs::read(&to).unwrap(), b"new");
    assert_eq!(names(dir.path()), ["from", "other name", "to"]);
}

#[test]
fn setuid_and_sticky_bits_are_dropped() {
    let dir = tempdir().unwrap();
    let from = dir.path().join("from");
    fs::create_dir(&from).unwrap();
    fs::write(from.join("su"), "").unwrap();
    set_mode(&from.join("su"), 0o6755);
    set_mode(&from, 0o1777);
    copy(&from, &dir.path().join("to"), &host()).unwrap();
    assert_eq!(dir.path().join("to").metadata().unwrap().mode() & 0o7777, 0o777);
    assert_eq!(dir.path().join("to/su").metadata().unwrap().mode() & 0o7777, 0o755);
}

#[test]
fn holes_are_preserved() {
    let dir = tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    let file = File::create(&from).unwrap();
    file.set_len(2 << 30).unwrap();
    file.write_all_at(b"first", 0).unwrap();
    file.write_all_at(b"middle", (1 << 30) + 4093).unwrap();
    let bytes = sent(&from);
    assert!(bytes.len() < 64 << 10, "{} bytes for two islands", bytes.len());

    receive(bytes.as_slice(), &to, &host()).unwrap();
    let meta = to.metadata().unwrap();
    assert_eq!(meta.len(), 2 << 30);
    assert!(meta.blocks() < 1024, "{} blocks", meta.blocks());
    let copy = File::open(&to).unwrap();
    let mut text = [0; 8];
    copy.read_exact_at(&mut text, (1 << 30) + 4092).unwrap();
    assert_eq!(&text, b"\0middle\0");

    // A file that is one hole, then with data at its end.
    let file = File::create(&from).unwrap();
    file.set_len(1 << 30).unwrap();
    assert!(sent(&from).len() < 64);
    file.write_all_at(b"end", (1 << 30) - 3).unwrap();
    receive(sent(&from).as_slice(), &to, &host()).unwrap();
    assert_eq!(to.metadata().unwrap().len(), 1 << 30);
    File::open(&to).unwrap().read_exact_at(&mut text[..3], (1 << 30) - 3).unwrap();
    assert_eq!(&text[..3], b"end");
}

#[test]
fn existing_directory_is_merged_and_keeps_mode() {
    let dir = tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    fs::create_dir_all(from.join("sub")).unwrap();
    fs::write(from.join("sub/a"), "new").unwrap();
    set_mode(&from, 0o777);
    set_mode(&from.join("sub"), 0o777);
    fs::create_dir_all(to.join("sub")).unwrap();
    fs::write(to.join("sub/a"), "old").unwrap();
    fs::write(to.join("sub/b"), "kept").unwrap();
    set_mode(&to, 0o700);
    set_mode(&to.join("sub"), 0o750);
    copy(&from, &to, &host()).unwrap();
    assert_eq!(fs::read(to.join("sub/a")).unwrap(), b"new");
    assert_eq!(fs::read(to.join("sub/b")).unwrap(), b"kept");
    assert_eq!(to.metadata().unwrap().mode() & 0o777, 0o700);
    assert_eq!(to.join("sub").metadata().unwrap().mode() & 0o777, 0o750);
}

#[test]
fn other_kind_at_destination_is_refused() {
    let dir = tempdir().unwrap();
    let (file, from) = (dir.path().join("file"), dir.path().join("from"));
    fs::write(&file, "x").unwrap();
    fs::create_dir(&from).unwrap();
    let assert_mismatch =
        |result: Result<_, Error>, existing: FileKind, incoming: FileKind| match result {
            Err(Error::Refused { refusal, .. }) => {
                assert_eq!(refusal, Refusal::KindMismatch { existing, incoming })
            }
            other => panic!("{other:?}"),
        };
    let to = dir.path().join("to");
    fs::create_dir(&to).unwrap();
    assert_mismatch(copy(&file, &to, &host()), FileKind::Directory, FileKind::File);
    assert_mismatch(copy(&file, Path::new("/"), &host()), FileKind::Directory, FileKind::File);
    assert_mismatch(copy(&file, Path::new("/"), &agent()), FileKind::Directory, FileKind::File);
    fs::remove_dir(&to).unwrap();
    fs::write(&to, "kept").unwrap();
    assert_mismatch(copy(&from, &to, &host()), FileKind::File, FileKind::Directory);
    assert_eq!(fs::read(&to).unwrap(), b"kept");
    fs::remove_file(&to).unwrap();
    symlink(&from, &to).unwrap();
    assert_mismatch(copy(&from, &to, &agent()), FileKind::Symlink, FileKind::Directory);
    fs::remove_file(&to).unwrap();
    let _socket = UnixListener::bind(&to).unwrap();
    assert_mismatch(copy(&file, &to, &host()), FileKind::Socket, FileKind::File);
    assert_mismatch(copy(&file, Path::new("/dev/null"), &host()), FileKind::Device, FileKind::File);
    assert_mismatch(
        copy(&from, Path::new("/dev/null"), &host()),
        FileKind::Device,
        FileKind::Directory,
    );
}

#[test]
fn other_kind_inside_tree_is_refused() {
    let dir = tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    fs::create_dir(&from).unwrap();
    fs::create_dir(&to).unwrap();
    fs::write(from.join("a"), "x").unwrap();
    let _socket = UnixListener::bind(to.join("a")).unwrap();
    let assert_mismatch = |existing: FileKind| match copy(&from, &to, &host()) {
        Err(Error::Refused { path, refusal }) => {
            let incoming = FileKind::File;
            assert_eq!(refusal, Refusal::KindMismatch { existing, incoming });
            assert_eq!(path, to.join("a"));
        }
        other => panic!("{other:?}"),
    };
    assert_mismatch(FileKind::Socket);
    fs::remove_file(to.join("a")).unwrap();
    fs::create_dir(to.join("a")).unwrap();
    assert_mismatch(FileKind::Directory);
    assert_eq!(names(&to), ["a"]);
}

#[test]
fn host_follows_links_to_root() {
    let dir = tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::create_dir(path("real")).unwrap();
    fs::write(path("real/a"), "x").unwrap();
    symlink("real", path("link")).unwrap();
    assert_eq!(sent(&path("link")), sent(&path("real")));
    assert_eq!(sent(&path("link/a")), sent(&path("real/a")));

    fs::create_dir(path("results")).unwrap();
    symlink("results", path("out")).unwrap();
    copy(&path("real"), &path("out"), &host()).unwrap();
    assert_eq!(names(&path("results")), ["a"]);
    copy(&path("real"), &path("out/"), &host()).unwrap();
    symlink("results/a", path("a")).unwrap();
    fs::write(path("results/a"), "old").unwrap();
    copy(&path("real/a"), &path("a"), &host()).unwrap();
    assert_eq!(fs::read(path("results/a")).unwrap(), b"x");
    assert!(path("a").is_symlink());

    symlink("nowhere", path("dangling")).unwrap();
    let error = copy(&path("real"), &path("dangling"), &host()).unwrap_err();
    assert!(matches!(error, Error::Filesystem { .. }), "{error}");
    assert_eq!(error.errno(), rustix::io::Errno::NOENT.raw_os_error());
    assert!(matches!(
        send(path("dangling"), std::io::sink(), &SendOptions::host()),
        Err(Error::Filesystem { .. })
    ));
}

#[test]
fn agent_refuses_links_in_path() {
    let dir = tempdir().unwrap();
    let path = |name: &str| dir.path().canonicalize().unwrap().join(name);
    fs::create_dir(path("real")).unwrap();
    fs::write(path("real/a"), "x").unwrap();
    symlink("real", path("link")).unwrap();
    symlink("a", path("real/b")).unwrap();
    send(path("real/a"), std::io::sink(), &SendOptions::agent()).unwrap();
    for name in ["link", "link/a", "real/b"] {
        let error = send(path(name), std::io::sink(), &SendOptions::agent()).unwrap_err();
        assert!(
            matches!(error, Error::Refused { refusal: Refusal::LinkInPath, .. }),
            "{name}: {error}"
        );
    }
    let tree = sent(&path("real"));
    let error = receive(tree.as_slice(), path("link/new"), &agent()).unwrap_err();
    assert!(matches!(error, Error::Refused { refusal: Refusal::LinkInPath, .. }), "{error}");
    let error = create_dirs(path("link/new"), 0o755, None).unwrap_err();
    assert!(matches!(error, Error::Refused { refusal: Refusal::LinkInPath, .. }), "{error}");
    for bad in ["relative", "/tmp/../etc", ""] {
        let error = receive(tree.as_slice(), bad, &agent()).unwrap_err();
        assert!(
            matches!(error, Error::Refused { refusal: Refusal::InvalidPath, .. }),
            "{bad}: {error}"
        );
        let error = create_dirs(bad, 0o755, None).unwrap_err();
        assert!(
            matches!(error, Error::Refused { refusal: Refusal::InvalidPath, .. }),
            "{bad}: {error}"
        );
    }
    assert_eq!(names(&path("real")), ["a", "b"]);
    // A file replaces a link, which does not follow it.
    fs::remove_file(path("link")).unwrap();
    symlink("real/a", path("link")).unwrap();
    fs::write(path("new"), "new").unwrap();
    receive(sent(&path("new")).as_slice(), path("link"), &agent()).unwrap();
    assert_eq!(
        (fs::read(path("link")).unwrap(), fs::read(path("real/a")).unwrap()),
        (b"new".to_vec(), b"x".to_vec())
    );
}

#[test]
fn create_dirs_creates_missing_parents() {
    let dir = tempdir().unwrap();
    let path = |name: &str| dir.path().canonicalize().unwrap().join(name);
    create_dirs(path("a/b/c"), 0o751, None).unwrap();
    create_dirs(path("a/b/c"), 0o700, None).unwrap();
    create_dirs("/", 0o700, None).unwrap();
    for name in ["a", "a/b", "a/b/c"] {
        assert_eq!(path(name).metadata().unwrap().mode() & 0o7777, 0o751);
    }
    fs::write(path("file"), "").unwrap();
    let error = create_dirs(path("file/x"), 0o755, None).unwrap_err();
    assert_eq!(error.errno(), rustix::io::Errno::NOTDIR.raw_os_error(), "{error}");
}

#[test]
fn receiver_as_root_sets_owner() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root may change the owner of a file");
        return;
    }
    let dir = tempdir().unwrap();
    let path = |name: &str| dir.path().canonicalize().unwrap().join(name);
    fs::create_dir_all(path("from/sub")).unwrap();
    fs::write(path("from/sub/a"), "").unwrap();
    symlink("a", path("from/sub/l")).unwrap();
    create_dirs(path("x/y"), 0o755, Some((1000, 1001))).unwrap();
    receive(
        sent(&path("from")).as_slice(),
        path("x/y/to"),
        &ReceiveOptions::agent((1000, 1001), 0),
    )
    .unwrap();
    for name in ["x", "x/y", "x/y/to", "x/y/to/sub", "x/y/to/sub/a", "x/y/to/sub/l"] {
        let meta = path(name).symlink_metadata().unwrap();
        assert_eq!((meta.uid(), meta.gid()), (1000, 1001), "{name}");
    }
}

#[test]
fn special_file_as_root_is_refused() {
    let dir = tempdir().unwrap();
    let refused = |path: &Path, options: &SendOptions| match send(path, std::io::sink(), options) {
        Err(Error::Refused { path: refused, refusal }) => {
            assert_eq!(refused, path);
            refusal
        }
        other => panic!("{other:?}"),
    };
    let socket = dir.path().canonicalize().unwrap().join("x.sock");
    let _socket = UnixListener::bind(&socket).unwrap();
    for options in [SendOptions::host(), SendOptions::agent()] {
        let kind = |kind| Refusal::UnsupportedKind(kind);
        assert_eq!(refused(&socket, &options), kind(FileKind::Socket));
        assert_eq!(refused(Path::new("/dev/null"), &options), kind(FileKind::Device));
        for path in ["/proc/cpuinfo", "/sys/kernel"] {
            assert_eq!(refused(Path::new(path), &options), Refusal::KernelFilesystem);
        }
    }
    assert_eq!(
        refused(Path::new("/proc/self/net"), &SendOptions::host()),
        Refusal::KernelFilesystem
    );
}

#[test]
fn special_files_in_tree_are_left_out_and_named() {
    let dir = tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    fs::create_dir_all(from.join("sub")).unwrap();
    fs::write(from.join("a"), "first").unwrap();
    fs::write(from.join("sub/z"), "last").unwrap();
    let _socket = UnixListener::bind(from.join("b.sock")).unwrap();
    let mode = rustix::fs::Mode::RUSR;
    let fifo = from.join("sub/fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    let summary = copy(&from, &to, &host()).unwrap();
    assert_eq!((summary.files, summary.directories, summary.left_out), (2, 2, 2));
    let name = |name: &str, kind: &str| format!("{} ({kind})", to.join(name).display());
    assert_eq!(summary.left_out_examples, [name("b.sock", "socket"), name("sub/fifo", "FIFO")]);
    assert_eq!(names(&to), ["a", "sub"]);
    assert_eq!(fs::read(to.join("sub/z")).unwrap(), b"last");
    // The sender knows them as well.
    let sent = send(&from, std::io::sink(), &SendOptions::host()).unwrap();
    assert_eq!(sent.left_out, 2);
}

#[test]
fn host_applies_the_umask_to_new_entries() {
    let dir = tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    fs::create_dir(&from).unwrap();
    fs::write(from.join("f"), "").unwrap();
    set_mode(&from.join("f"), 0o777);
    set_mode(&from, 0o777);
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
    copy(&from, &to, &ReceiveOptions { umask: 0o027, ..host() }).unwrap();
    assert_eq!((mode(&to), mode(&to.join("f"))), (0o750, 0o750));
    // The host takes that of its process.
    let probe = dir.path().join("probe");
    fs::create_dir(&probe).unwrap();
    let umask = ReceiveOptions::host(0, 0).umask;
    assert_eq!(u32::from(0o777 & !umask), mode(&probe));
}

#[test]
fn target_is_checked_before_a_copy() {
    let dir = tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::write(path("file"), "").unwrap();
    for good in ["new", "file", ".", "new/"] {
        check_target(path(good)).unwrap();
    }
    let missing = check_target(path("no/such")).unwrap_err();
    assert_eq!(missing.errno(), rustix::io::Errno::NOENT.raw_os_error(), "{missing}");
    let below_file = check_target(path("file/x")).unwrap_err();
    assert_eq!(below_file.errno(), rustix::io::Errno::NOTDIR.raw_os_error(), "{below_file}");
    symlink("nowhere", path("dangling")).unwrap();
    assert!(check_target(path("dangling")).is_err());
    let _socket = UnixListener::bind(path("socket")).unwrap();
    for bad in [path("socket"), "/dev/null".into()] {
        let error = check_target(&bad).unwrap_err();
        let mismatch = |refusal| matches!(refusal, Refusal::KindMismatch { .. });
        assert!(matches!(error, Error::Refused { refusal, .. } if mismatch(refusal)), "{error}");
    }
}

#[test]
fn sender_limits_entries_and_depth() {
    let dir = tempdir().unwrap();
    for name in 0..10 {
        fs::write(dir.path().join(name.to_string()), "").unwrap();
    }
    let options = SendOptions { max_entries: 10, lookup: Lookup::FollowLinks };
    let error = send(dir.path(), std::io::sink(), &options).unwrap_err();
    assert!(matches!(error, Error::Limit { limit: Limit::Entries(10), .. }), "{error}");
    send(dir.path(), std::io::sink(), &SendOptions { max_entries: 11, ..options }).unwrap();

    let deep = dir.path().join("d/".repeat(128));
    fs::create_dir_all(&deep).unwrap();
    let error = send(dir.path(), std::io::sink(), &SendOptions::host()).unwrap_err();
    assert!(matches!(error, Error::Limit { limit: Limit::Depth, .. }), "{error}");
    fs::remove_dir(&deep).unwrap();
    let to = tempdir().unwrap();
    copy(dir.path(), &to.path().join("to"), &host()).unwrap();
    assert_eq!(describe_tree(dir.path()), describe_tree(&to.path().join("to")));
}

#[test]
fn growing_or_shrinking_file_is_copied() {
    /// Changes the size of the file after its first data has been written.
    struct Resizer<'a>(&'a File, Option<u64>, Vec<u8>);
    impl Write for Resizer<'_> {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            if self.2.len() > 1000
                && let Some(size) = self.1.take()
            {
                self.0.set_len(size)?;
            }
            self.2.extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let dir = tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    for (size, least, most) in
        [(1 << 20, 600_000, 600_000), (300_000, 300_000, 300_000), (0, 100_000, 300_000)]
    {
        fs::write(&from, vec![7; 600_000]).unwrap();
        let file = File::options().write(true).open(&from).unwrap();
        let mut resizer = Resizer(&file, Some(size), Vec::new());
        send(&from, &mut resizer, &SendOptions::host()).unwrap();
        receive(resizer.2.as_slice(), &to, &host()).unwrap();
        let copied = fs::read(&to).unwrap();
        assert!((least..=most).contains(&copied.len()), "{} of {size}", copied.len());
        assert!(copied.iter().all(|byte| *byte == 7));
    }
}

#[test]
fn missing_source_or_parent_is_enoent() {
    let dir = tempdir().unwrap();
    for options in [SendOptions::host(), SendOptions::agent()] {
        let error = send(dir.path().join("no/such"), std::io::sink(), &options).unwrap_err();
        assert_eq!(error.errno(), rustix::io::Errno::NOENT.raw_os_error(), "{error}");
    }
    fs::write(dir.path().join("a"), "").unwrap();
    let tree = sent(&dir.path().join("a"));
    for options in [host(), agent()] {
        let error = receive(tree.as_slice(), dir.path().join("no/such"), &options).unwrap_err();
        assert_eq!(error.errno(), rustix::io::Errno::NOENT.raw_os_error(), "{error}");
    }
    let options = ReceiveOptions { links: LinkPolicy::Keep, ..host() };
    receive(tree.as_slice(), dir.path().join("b"), &options).unwrap();
}
