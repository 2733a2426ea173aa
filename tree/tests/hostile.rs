//! Streams that no honest sender writes, and people who change the tree while it is worked on.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use chitin_tree::{Breach, Error, Limit, MAX_DEPTH, MAX_EXAMPLES, SendOptions, receive, send};
use common::{Tree, agent, host, names, received, sent};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use tempfile::tempdir;

fn malformed(tree: &Tree) -> Breach {
    let dir = tempdir().unwrap();
    let result = received(tree, &dir.path().join("to"));
    let left = walk(dir.path());
    assert!(!left.iter().any(|name| name.contains(".chitin")), "{left:?}");
    match result {
        Err(Error::Malformed { breach, path }) => {
            assert!(path.starts_with(dir.path()));
            breach
        }
        other => panic!("{other:?}"),
    }
}

/// All names below a directory.
fn walk(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        found.push(entry.file_name().to_string_lossy().into());
        if entry.file_type().unwrap().is_dir() {
            found.extend(walk(&entry.path()));
        }
    }
    found
}

#[test]
fn names_that_lead_elsewhere_are_breaches() {
    for name in ["", ".", "..", "/", "/etc", "a/b", "../a", "a\0b", "a/"] {
        for tree in [
            Tree::new().directory("").file(name, "x"),
            Tree::new().directory("").directory(name),
            Tree::new().directory("").symlink(name, "x"),
            Tree::new().directory("").directory("d").file(name, "x"),
        ] {
            assert_eq!(malformed(&tree), Breach::BadName, "{name:?}");
        }
    }
    for tree in
        [Tree::new().file("a", ""), Tree::new().directory(".."), Tree::new().symlink("/", "x")]
    {
        assert_eq!(malformed(&tree), Breach::BadName);
    }
}

#[test]
fn names_come_once_and_in_order() {
    for (first, second) in [("a", "a"), ("b", "a"), ("aa", "a"), ("\u{e9}", "z")] {
        assert_eq!(
            malformed(&Tree::new().directory("").file(first, "").file(second, "")),
            Breach::Unsorted
        );
    }
    // Above all not a link, and then something through it.
    let tree = Tree::new().directory("").symlink("a", "..").directory("a").file("b", "");
    assert_eq!(malformed(&tree), Breach::Unsorted);
    // Each directory has its own order.
    let dir = tempdir().unwrap();
    let tree = Tree::new().directory("").directory("b").file("a", "").end().file("c", "").end();
    received(&tree, &dir.path().join("to")).unwrap();
}

#[test]
fn records_have_their_places() {
    for (tree, kind) in [
        (Tree::new().end(), 6),
        (Tree::new().end_file(0), 5),
        (Tree::new().data(0, "x"), 4),
        (Tree::new().directory("").data(0, "x"), 4),
        (Tree::new().directory("").end_file(0), 5),
        (Tree::new().open_file("").end(), 6),
        (Tree::new().open_file("").file("", ""), 2),
        (Tree::new().open_file("").directory("d"), 1),
        (Tree::new().open_file("").symlink("l", "x"), 3),
    ] {
        assert_eq!(malformed(&tree), Breach::Misplaced(kind));
    }
    for kind in [0, 7, 255] {
        assert_eq!(malformed(&Tree::new().bytes([kind])), Breach::UnknownKind(kind));
        assert_eq!(malformed(&Tree::new().open_file("").bytes([kind])), Breach::UnknownKind(kind));
    }
}

#[test]
fn data_has_its_place() {
    let file = || Tree::new().open_file("");
    for tree in [
        file().data(0, ""),
        file().data(1, "a").data(0, "b"),
        file().data(0, "ab").data(1, "c"),
        file().data(0, "ab").end_file(1),
        file().data_head(u64::MAX, 1),
        file().data_head(u64::MAX - 1, u32::MAX),
        file().data_head(i64::MAX as u64, 1),
        file().end_file(u64::MAX),
        file().end_file(1 << 63),
    ] {
        assert_eq!(malformed(&tree), Breach::BadData);
    }
}

#[test]
fn after_the_tree_nothing_is_taken_for_it() {
    let dir = tempdir().unwrap();
    let to = dir.path().join("to");
    received(&Tree::new().directory("").end().file("a", "").bytes([0; 100]), &to).unwrap();
    assert_eq!(names(&to), [""; 0]);
}

#[test]
fn a_copy_that_ends_early_says_so_and_leaves_no_half_a_file() {
    let whole = Tree::new()
        .directory_mode("", 0o750)
        .file("a", "complete")
        .directory_mode("d", 0o705)
        .symlink("l", "x")
        .file("z", "not complete")
        .end()
        .end();
    for len in 0..whole.0.len() {
        let dir = tempdir().unwrap();
        let to = dir.path().join("to");
        let error = received(&Tree(whole.0[..len].to_vec()), &to).unwrap_err();
        assert!(matches!(error, Error::EndedEarly { .. }) && error.is_broken_stream(), "{error}");
        assert!(error.to_string().ends_with(": the copy ended early"), "{error}");
        let left = walk(dir.path());
        assert!(
            left.iter().all(|name| ["to", "a", "d", "l", "z"].contains(&name.as_str())),
            "{left:?}"
        );
        // What is there has its mode, though not all of it is.
        for (name, mode) in [("", 0o750), ("d", 0o705)] {
            if let Ok(meta) = to.join(name).metadata() {
                assert_eq!(meta.mode() & 0o777, mode);
            }
        }
    }
    // What was there before stays.
    let dir = tempdir().unwrap();
    let to = dir.path().join("to");
    fs::write(&to, "old").unwrap();
    received(&Tree::new().open_file("").data(0, "new"), &to).unwrap_err();
    assert_eq!(fs::read(&to).unwrap(), b"old");
    assert_eq!(names(dir.path()), ["to"]);
}

#[test]
fn links_out_of_the_tree_are_left_out_and_told() {
    let dir = tempdir().unwrap();
    let to = dir.path().join("to");
    let tree = Tree::new()
        .directory("")
        .symlink("a", "/etc/passwd")
        .symlink("b", "../out")
        .directory("d")
        .symlink("fine", "../e/f")
        .symlink("out", "../../x\n")
        .symlink("twice", "e/..")
        .end()
        .symlink("fine", "d/fine")
        .file("z", "still copied")
        .end();
    let summary = received(&tree, &to).unwrap();
    assert_eq!((summary.refused, summary.links, summary.files), (4, 2, 1));
    let at = |name: &str| to.join(name).display().to_string();
    assert_eq!(
        summary.refused_examples,
        [
            format!("{} -> /etc/passwd", at("a")),
            format!("{} -> ../out", at("b")),
            format!("{} -> ../../x\\n", at("d/out")),
            format!("{} -> e/..", at("d/twice")),
        ]
    );
    assert_eq!(names(&to), ["d", "fine", "z"]);
    assert_eq!(names(&to.join("d")), ["fine"]);

    let kept = dir.path().join("kept");
    let summary = receive(tree.0.as_slice(), &kept, &agent()).unwrap();
    assert_eq!((summary.refused, summary.links), (0, 6));
    assert_eq!(fs::read_link(kept.join("a")).unwrap(), Path::new("/etc/passwd"));

    // A root that is a link is in no tree.
    let summary = received(&Tree::new().symlink("", "kept"), &dir.path().join("link")).unwrap();
    assert_eq!(summary.refused, 1);
    assert_eq!(names(dir.path()), ["kept", "to"]);

    let mut many = Tree::new().directory("");
    for i in 0..1000 {
        many = many.symlink(format!("{i:04}"), "/");
    }
    let summary = received(&many.end(), &dir.path().join("many")).unwrap();
    assert_eq!((summary.refused, summary.refused_examples.len()), (1000, MAX_EXAMPLES));
}

#[test]
fn links_that_are_there_already_are_not_followed() {
    let dir = tempdir().unwrap();
    let (to, outside) = (dir.path().join("to"), dir.path().join("outside"));
    fs::create_dir(&to).unwrap();
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("victim"), "unharmed").unwrap();
    symlink(&outside, to.join("d")).unwrap();
    symlink(outside.join("victim"), to.join("f")).unwrap();
    symlink(outside.join("new"), to.join("g")).unwrap();
    let error = received(&Tree::new().directory("").directory("d").file("a", ""), &to).unwrap_err();
    assert!(matches!(error, Error::Refused { .. }), "{error}");
    received(&Tree::new().directory("").file("f", "x").file("g", "y").end(), &to).unwrap();
    assert_eq!(fs::read(outside.join("victim")).unwrap(), b"unharmed");
    assert_eq!(names(&outside), ["victim"]);
    assert_eq!(fs::read(to.join("f")).unwrap(), b"x");
    assert!(!to.join("g").is_symlink());
}

#[test]
fn an_endless_file_meets_its_limit() {
    /// A file that goes on for ever.
    struct Endless(u64, Vec<u8>);
    impl Read for Endless {
        fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
            if self.1.is_empty() {
                self.1 = Tree::new().data(self.0, [7; 1000]).0;
                self.0 += 1000;
            }
            let len = out.len().min(self.1.len());
            out[..len].copy_from_slice(&self.1[..len]);
            self.1.drain(..len);
            Ok(len)
        }
    }
    let dir = tempdir().unwrap();
    let mut options = host();
    options.max_bytes = 1_000_000;
    let endless = Endless(0, Tree::new().open_file("").0);
    let error = receive(endless, dir.path().join("to"), &options).unwrap_err();
    assert!(matches!(error, Error::Limit { limit: Limit::Bytes(1_000_000), .. }), "{error}");
    assert_eq!(names(dir.path()), [""; 0]);
}

#[test]
fn holes_count_like_data() {
    let dir = tempdir().unwrap();
    let to = dir.path().join("to");
    let mut options = host();
    options.max_bytes = 1000;
    let limited = |tree: &Tree| match receive(tree.0.as_slice(), &to, &options) {
        Err(Error::Limit { limit: Limit::Bytes(1000), .. }) => true,
        Ok(_) => false,
        other => panic!("{other:?}"),
    };
    assert!(limited(&Tree::new().open_file("").end_file(1 << 62)));
    assert!(limited(&Tree::new().open_file("").end_file(1001)));
    assert!(limited(&Tree::new().open_file("").data(1000, "x").end_file(1001)));
    assert!(!limited(&Tree::new().open_file("").data(999, "x").end_file(1000)));
    // All files together.
    fs::remove_file(&to).unwrap();
    let both = Tree::new().directory("").file("a", [0; 600]).file("b", [0; 401]).end();
    assert!(limited(&both));
    assert_eq!(names(&to), ["a"]);
    // A length that would be a large allocation, if one believed it.
    options.max_bytes = 1 << 62;
    let tree = Tree::new().open_file("").data_head(0, u32::MAX).bytes("only this");
    let error = receive(tree.0.as_slice(), dir.path().join("x"), &options).unwrap_err();
    assert!(matches!(error, Error::EndedEarly { .. }), "{error}");
}

#[test]
fn ten_million_entries_meet_their_limit() {
    /// Empty directories for ever, each made and ended.
    struct Endless(u32, Vec<u8>);
    impl Read for Endless {
        fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
            if self.1.is_empty() {
                self.1 = Tree::new().symlink(format!("{:08}", self.0), "/").0;
                self.0 += 1;
            }
            let len = out.len().min(self.1.len());
            out[..len].copy_from_slice(&self.1[..len]);
            self.1.drain(..len);
            Ok(len)
        }
    }
    let dir = tempdir().unwrap();
    let mut options = host();
    options.max_entries = 100_000;
    let endless = Endless(0, Tree::new().directory("").0);
    let error = receive(endless, dir.path().join("to"), &options).unwrap_err();
    assert!(matches!(error, Error::Limit { limit: Limit::Entries(100_000), .. }), "{error}");
}

#[test]
fn depth_and_length_of_paths_are_bounded() {
    let nest = |depth: usize, name: &str| {
        let mut tree = Tree::new().directory("");
        for _ in 1..depth {
            tree = tree.directory(name);
        }
        (0..depth).fold(tree, |tree, _| tree.end())
    };
    let dir = tempdir().unwrap();
    received(&nest(MAX_DEPTH, "d"), &dir.path().join("to")).unwrap();
    let error = received(&nest(MAX_DEPTH + 1, "d"), &dir.path().join("to")).unwrap_err();
    assert!(matches!(error, Error::Limit { limit: Limit::Depth, .. }), "{error}");
    let error = received(&nest(20, &"d".repeat(255)), &dir.path().join("x")).unwrap_err();
    assert!(matches!(error, Error::Limit { limit: Limit::Path, .. }), "{error}");
    received(&nest(16, &"d".repeat(255)), &dir.path().join("y")).unwrap();
}

#[test]
fn noise_is_never_more_than_an_error() {
    let dir = tempdir().unwrap();
    let sound = Tree::new()
        .directory("")
        .file("a", "some text")
        .directory("d")
        .symlink("l", "../a")
        .end()
        .open_file("s")
        .data(5, "x")
        .end_file(9)
        .end();
    let mut state = 1_u64;
    for round in 0..1000 {
        let mut bytes = sound.0.clone();
        for _ in 0..=round % 3 {
            // A linear congruence is noise enough, and the same one each time.
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let at = usize::try_from(state >> 33).unwrap() % bytes.len();
            bytes[at] = state.to_le_bytes()[3];
        }
        let mut options = host();
        options.max_bytes = 1 << 20;
        let to = dir.path().join("to");
        let _ = receive(bytes.as_slice(), &to, &options);
        assert!(names(dir.path()).iter().all(|name| name == "to"));
        let _ = fs::remove_dir_all(&to).or_else(|_| fs::remove_file(&to));
    }
}

/// Exchanges two names until it is told to stop.
fn swap(a: &Path, b: &Path, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let _ = renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE);
    }
}

/// Runs `work` again and again while `meddle` is at it, until both have had a good while together.
fn meddle(meddle: impl FnOnce(&AtomicBool) + Send, mut work: impl FnMut()) {
    /// Stops the meddler also when `work` panics, for which the scope would wait for ever.
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| meddle(&stop));
        let _stop = Stop(&stop);
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(3) {
            work();
        }
    });
}

#[test]
fn a_directory_swapped_for_a_link_leads_nothing_out() {
    let dir = tempdir().unwrap();
    let path = |name: &str| dir.path().canonicalize().unwrap().join(name);
    fs::create_dir_all(path("to/sub/inner")).unwrap();
    fs::create_dir_all(path("outside/inner")).unwrap();
    symlink(path("outside"), path("to/link")).unwrap();
    let tree = Tree::new()
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
        .end();
    let (mut arrived, mut refused) = (0, 0);
    meddle(
        |stop| swap(&path("to/sub"), &path("to/link"), stop),
        || match received(&tree, &path("to")) {
            Ok(_) => arrived += 1,
            Err(Error::Refused { .. } | Error::Local { .. }) => refused += 1,
            Err(other) => panic!("{other}"),
        },
    );
    assert!(arrived > 0 && refused > 0, "no race: {arrived} arrived, {refused} refused");
    assert_eq!(walk(&path("outside")), ["inner"]);

    // A directory that has just been made is a directory of somebody else's a moment later.
    symlink(path("outside"), path("spare")).unwrap();
    let new = Tree::new().directory("").directory("new").file("a", "a").end().end();
    let (mut arrived, mut refused) = (0, 0);
    meddle(
        |stop| swap(&path("to/new"), &path("spare"), stop),
        || {
            let _ = fs::remove_dir_all(path("to/new")).or_else(|_| fs::remove_file(path("to/new")));
            if !path("spare").is_symlink() {
                let _ = fs::remove_dir_all(path("spare"));
                let _ = symlink(path("outside"), path("spare"));
            }
            match received(&new, &path("to")) {
                Ok(_) => arrived += 1,
                Err(Error::Refused { .. } | Error::Local { .. }) => refused += 1,
                Err(other) => panic!("{other}"),
            }
        },
    );
    // A race that is won or lost by microseconds, and with one processor may not take place.
    assert!(arrived > 0, "{arrived} arrived, {refused} refused");
    assert_eq!(walk(&path("outside")), ["inner"]);

    // The same with the way to the root, where links are not followed either.
    fs::create_dir_all(path("way/to")).unwrap();
    fs::create_dir(path("outside/to")).unwrap();
    symlink(path("outside"), path("way link")).unwrap();
    let (mut arrived, mut refused) = (0, 0);
    meddle(
        |stop| swap(&path("way"), &path("way link"), stop),
        || match receive(tree.0.as_slice(), path("way/to"), &agent()) {
            Ok(_) => arrived += 1,
            Err(Error::Refused { .. } | Error::Local { .. }) => refused += 1,
            Err(other) => panic!("{other}"),
        },
    );
    assert!(arrived > 0 && refused > 0, "no race: {arrived} arrived, {refused} refused");
    let mut outside = walk(&path("outside"));
    outside.sort();
    assert_eq!(outside, ["inner", "to"]);
}

#[test]
fn a_temporary_file_swapped_for_a_link_leads_nothing_out() {
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
    meddle(
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
fn a_sender_is_not_led_out_either() {
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
    // A FIFO must not make it wait either.
    for (victim, trap) in [("from/sub", "link"), ("from/file", "file link"), ("from/file", "fifo")]
    {
        let (mut sent, mut refused) = (0, 0);
        meddle(
            |stop| swap(&path(victim), &path(trap), stop),
            || {
                let mut bytes = Vec::new();
                match send(path("from"), &mut bytes, &SendOptions::agent()) {
                    Ok(_) => sent += 1,
                    Err(Error::Local { .. } | Error::Refused { .. }) => refused += 1,
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

#[test]
fn a_reader_that_fails_is_not_mistaken_for_an_end() {
    struct Fails;
    impl Read for Fails {
        fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
            Err(std::io::Error::from_raw_os_error(104))
        }
    }
    let dir = tempdir().unwrap();
    let error = receive(Fails, dir.path().join("to"), &host()).unwrap_err();
    assert!(
        matches!(&error, Error::Stream(source) if source.raw_os_error() == Some(104)),
        "{error}"
    );
    File::create(dir.path().join("a")).unwrap();
    let full = File::options().write(true).open("/dev/full").unwrap();
    let error = send(dir.path().join("a"), full, &SendOptions::host()).unwrap_err();
    assert!(matches!(error, Error::Stream(_)) && error.is_broken_stream());
    assert!(!sent(&dir.path().join("a")).is_empty());
}
