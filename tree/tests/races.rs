//! Processes that change a tree while it is copied.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use chitin_tree::{Error, SendOptions, Summary, receive, send};
use common::{Tree, agent, names_below, received};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use tempfile::tempdir;

/// Exchanges two names until `stop` is set.
fn swap_names(a: &Path, b: &Path, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let _ = renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE);
    }
}

/// Repeats `work` for three seconds while `interfere` runs on another thread.
fn race(interfere: impl FnOnce(&AtomicBool) + Send, mut work: impl FnMut()) {
    /// Stops `interfere` also when `work` panics; otherwise the scope would wait forever.
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| interfere(&stop));
        let _stop = Stop(&stop);
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(3) {
            work();
        }
    });
}

/// Counts the outcomes of a race, of which only success and errors of the file system are allowed.
#[derive(Default)]
struct Outcomes {
    received: u32,
    failed: u32,
}

impl Outcomes {
    fn count(&mut self, result: Result<Summary, Error>) {
        match result {
            Ok(_) => self.received += 1,
            Err(Error::Refused { .. } | Error::Filesystem { .. }) => self.failed += 1,
            Err(other) => panic!("{other}"),
        }
    }
}

/// Returns a tree with files, directories and a link, whose directory `sub` is worth swapping.
fn nested_tree() -> Tree {
    Tree::new()
        .directory("")
        .directory("sub")
        .file("a", "a")
        .directory("inner")
        .file("b", "b")
        .symlink("l", "b")
        .directory("new")
        .file("c", "c")
        .end()
        .end()
        .file("z", "z")
        .end()
        .end()
}

#[test]
fn directory_swapped_for_link_is_not_followed() {
    let dir = tempdir().unwrap();
    let path = |name: &str| dir.path().canonicalize().unwrap().join(name);
    fs::create_dir_all(path("to/sub/inner")).unwrap();
    fs::create_dir_all(path("outside/inner")).unwrap();
    symlink(path("outside"), path("to/link")).unwrap();
    let tree = nested_tree();
    let mut outcomes = Outcomes::default();
    race(
        |stop| swap_names(&path("to/sub"), &path("to/link"), stop),
        || outcomes.count(received(&tree, &path("to"))),
    );
    let Outcomes { received, failed } = outcomes;
    assert!(received > 0 && failed > 0, "no race: {received} received, {failed} failed");
    assert_eq!(names_below(&path("outside")), ["inner"]);
}

/// A directory that the receiver has just created may be replaced a moment later.
#[test]
fn new_directory_swapped_for_link_is_not_followed() {
    let dir = tempdir().unwrap();
    let path = |name: &str| dir.path().canonicalize().unwrap().join(name);
    fs::create_dir(path("to")).unwrap();
    fs::create_dir_all(path("outside/inner")).unwrap();
    symlink(path("outside"), path("spare")).unwrap();
    let tree = Tree::new().directory("").directory("new").file("a", "a").end().end();
    let mut outcomes = Outcomes::default();
    race(
        |stop| swap_names(&path("to/new"), &path("spare"), stop),
        || {
            let _ = fs::remove_dir_all(path("to/new")).or_else(|_| fs::remove_file(path("to/new")));
            if !path("spare").is_symlink() {
                let _ = fs::remove_dir_all(path("spare"));
                let _ = symlink(path("outside"), path("spare"));
            }
            outcomes.count(received(&tree, &path("to")));
        },
    );
    // The race is decided by microseconds, and with one processor it may not take place.
    let Outcomes { received, failed } = outcomes;
    assert!(received > 0, "{received} received, {failed} failed");
    assert_eq!(names_below(&path("outside")), ["inner"]);
}

#[test]
fn parent_of_root_swapped_for_link_is_not_followed() {
    let dir = tempdir().unwrap();
    let path = |name: &str| dir.path().canonicalize().unwrap().join(name);
    fs::create_dir_all(path("parent/to")).unwrap();
    fs::create_dir_all(path("outside/to")).unwrap();
    fs::create_dir(path("outside/inner")).unwrap();
    symlink(path("outside"), path("parent link")).unwrap();
    let tree = nested_tree();
    let mut outcomes = Outcomes::default();
    race(
        |stop| swap_names(&path("parent"), &path("parent link"), stop),
        || outcomes.count(receive(tree.0.as_slice(), path("parent/to"), &agent())),
    );
    let Outcomes { received, failed } = outcomes;
    assert!(received > 0 && failed > 0, "no race: {received} received, {failed} failed");
    let mut outside = names_below(&path("outside"));
    outside.sort();
    assert_eq!(outside, ["inner", "to"]);
}

#[test]
fn temporary_swapped_for_link_is_not_followed() {
    let dir = tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::create_dir(path("to")).unwrap();
    fs::write(path("victim"), "unharmed").unwrap();
    let before = path("victim").metadata().unwrap();
    let mut tree = Tree::new().directory("");
    for i in 0..100 {
        tree = tree.file(format!("f{i:03}"), "harm");
    }
    let tree = tree.end();
    race(
        |stop| {
            while !stop.load(Ordering::Relaxed) {
                for name in fs::read_dir(path("to")).unwrap().flatten() {
                    if name.file_name().as_encoded_bytes().starts_with(b".chitin") {
                        let _ = fs::remove_file(name.path());
                        let _ = symlink(path("victim"), name.path());
                    }
                }
            }
        },
        || {
            let _ = received(&tree, &path("to"));
        },
    );
    let after = path("victim").metadata().unwrap();
    assert_eq!(fs::read(path("victim")).unwrap(), b"unharmed");
    assert_eq!(
        (before.mode(), before.mtime(), before.mtime_nsec()),
        (after.mode(), after.mtime(), after.mtime_nsec())
    );
}

#[test]
fn sender_does_not_follow_swapped_entry() {
    let dir = tempdir().unwrap();
    let path = |name: &str| dir.path().canonicalize().unwrap().join(name);
    for (name, text) in [("from/sub", "fine"), ("outside", "SECRET")] {
        fs::create_dir_all(path(name)).unwrap();
        fs::write(path(name).join("a"), text).unwrap();
    }
    fs::write(path("from/file"), "fine").unwrap();
    symlink(path("outside"), path("link")).unwrap();
    symlink(path("outside/a"), path("file link")).unwrap();
    let fifo = rustix::fs::mknodat(CWD, path("fifo"), rustix::fs::FileType::Fifo, 0o600.into(), 0);
    fifo.unwrap();
    // A FIFO must not block the sender either.
    for (victim, trap) in [("from/sub", "link"), ("from/file", "file link"), ("from/file", "fifo")]
    {
        let (mut sent, mut refused) = (0, 0);
        race(
            |stop| swap_names(&path(victim), &path(trap), stop),
            || {
                let mut bytes = Vec::new();
                match send(path("from"), &mut bytes, &SendOptions::agent()) {
                    Ok(_) => sent += 1,
                    Err(Error::Filesystem { .. } | Error::Refused { .. }) => refused += 1,
                    Err(other) => panic!("{other}"),
                }
                assert!(!bytes.windows(6).any(|bytes| bytes == b"SECRET"));
            },
        );
        assert!(sent > 0, "{victim}: {sent} sent, {refused} refused");
        if !path("from/file").is_file() || path("from/file").is_symlink() {
            fs::rename(path(trap), path("from/file")).unwrap();
        }
    }
}
