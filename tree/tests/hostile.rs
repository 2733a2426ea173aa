//! Streams that no honest sender writes.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use chitin_tree::{Error, FormatError, Limit, MAX_DEPTH, MAX_EXAMPLES, SendOptions, receive, send};
use common::{Tree, agent, host, names, names_below, received, sent};
use tempfile::tempdir;

fn malformed(tree: &Tree) -> FormatError {
    let dir = tempdir().unwrap();
    let result = received(tree, &dir.path().join("to"));
    let left = names_below(dir.path());
    assert!(!left.iter().any(|name| name.contains(".chitin")), "{left:?}");
    match result {
        Err(Error::Malformed { error, path }) => {
            assert!(path.starts_with(dir.path()));
            error
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn unsafe_name_is_format_error() {
    for name in ["", ".", "..", "/", "/etc", "a/b", "../a", "a\0b", "a/"] {
        for tree in [
            Tree::new().directory("").file(name, "x"),
            Tree::new().directory("").directory(name),
            Tree::new().directory("").symlink(name, "x"),
            Tree::new().directory("").directory("d").file(name, "x"),
        ] {
            assert_eq!(malformed(&tree), FormatError::InvalidName, "{name:?}");
        }
    }
    for tree in
        [Tree::new().file("a", ""), Tree::new().directory(".."), Tree::new().symlink("/", "x")]
    {
        assert_eq!(malformed(&tree), FormatError::InvalidName);
    }
}

#[test]
fn invalid_left_out_entry_is_format_error() {
    let root = || Tree::new().directory("");
    assert_eq!(malformed(&Tree::new().bytes([7, 0, 1])), FormatError::InvalidName);
    assert_eq!(malformed(&root().bytes([7, 0, 1])), FormatError::InvalidName);
    assert_eq!(malformed(&root().bytes([7, 1, 1]).bytes("/")), FormatError::InvalidName);
    for code in [0, 5, 255] {
        let tree = root().bytes([7, 1, code]).bytes("a");
        assert_eq!(malformed(&tree), FormatError::UnknownLeftOut(code));
    }
    let unsorted = root().file("b", "").bytes([7, 1, 1]).bytes("a");
    assert_eq!(malformed(&unsorted), FormatError::UnsortedName);
}

#[test]
fn left_out_entries_are_limited() {
    let dir = tempdir().unwrap();
    let mut tree = Tree::new().directory("");
    for number in 0..100 {
        tree = tree.bytes([7, 3, 2]).bytes(format!("{number:03}"));
    }
    let tree = tree.bytes([6]);
    let summary = received(&tree, &dir.path().join("to")).unwrap();
    assert_eq!((summary.left_out, summary.left_out_examples.len()), (100, MAX_EXAMPLES));
    let options = chitin_tree::ReceiveOptions { max_entries: 50, ..host() };
    let error = receive(tree.0.as_slice(), dir.path().join("to"), &options).unwrap_err();
    assert!(matches!(error, Error::Limit { limit: Limit::Entries(50), .. }), "{error}");
}

#[test]
fn duplicate_or_unsorted_name_is_format_error() {
    for (first, second) in [("a", "a"), ("b", "a"), ("aa", "a"), ("\u{e9}", "z")] {
        assert_eq!(
            malformed(&Tree::new().directory("").file(first, "").file(second, "")),
            FormatError::UnsortedName
        );
    }
    // Above all, a link and then an entry below it.
    let tree = Tree::new().directory("").symlink("a", "..").directory("a").file("b", "");
    assert_eq!(malformed(&tree), FormatError::UnsortedName);
    // The order starts again in each directory.
    let dir = tempdir().unwrap();
    let tree = Tree::new().directory("").directory("b").file("a", "").end().file("c", "").end();
    received(&tree, &dir.path().join("to")).unwrap();
}

#[test]
fn misplaced_record_is_format_error() {
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
        (Tree::new().open_file("").bytes([7, 1, 1]).bytes("p"), 7),
    ] {
        assert_eq!(malformed(&tree), FormatError::MisplacedRecord(kind));
    }
    for kind in [0, 8, 255] {
        assert_eq!(malformed(&Tree::new().bytes([kind])), FormatError::UnknownRecord(kind));
        assert_eq!(
            malformed(&Tree::new().open_file("").bytes([kind])),
            FormatError::UnknownRecord(kind)
        );
    }
}

#[test]
fn overlapping_or_oversized_data_is_format_error() {
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
        assert_eq!(malformed(&tree), FormatError::InvalidData);
    }
}

#[test]
fn bytes_after_tree_are_ignored() {
    let dir = tempdir().unwrap();
    let to = dir.path().join("to");
    received(&Tree::new().directory("").end().file("a", "").bytes([0; 100]), &to).unwrap();
    assert_eq!(names(&to), [""; 0]);
}

#[test]
fn truncated_copy_leaves_no_partial_file() {
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
        let left = names_below(dir.path());
        assert!(
            left.iter().all(|name| ["to", "a", "d", "l", "z"].contains(&name.as_str())),
            "{left:?}"
        );
        // Existing directories have their modes, although they are incomplete.
        for (name, mode) in [("", 0o750), ("d", 0o705)] {
            if let Ok(meta) = to.join(name).metadata() {
                assert_eq!(meta.mode() & 0o777, mode);
            }
        }
    }
    // An existing file remains.
    let dir = tempdir().unwrap();
    let to = dir.path().join("to");
    fs::write(&to, "old").unwrap();
    received(&Tree::new().open_file("").data(0, "new"), &to).unwrap_err();
    assert_eq!(fs::read(&to).unwrap(), b"old");
    assert_eq!(names(dir.path()), ["to"]);
}

#[test]
fn escaping_links_are_omitted_and_reported() {
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

    // The target of a root that is a link is outside of any tree.
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
fn existing_links_are_not_followed() {
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

/// An endless stream: a beginning, followed by one generated piece after the other.
struct Generator<F> {
    next_index: u64,
    pending: Vec<u8>,
    generate: F,
}

impl<F: Fn(u64) -> Tree> Generator<F> {
    fn new(beginning: Tree, generate: F) -> Generator<F> {
        Generator { next_index: 0, pending: beginning.0, generate }
    }
}

impl<F: Fn(u64) -> Tree> Read for Generator<F> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        if self.pending.is_empty() {
            self.pending = (self.generate)(self.next_index).0;
            self.next_index += 1;
        }
        let len = out.len().min(self.pending.len());
        out[..len].copy_from_slice(&self.pending[..len]);
        self.pending.drain(..len);
        Ok(len)
    }
}

#[test]
fn endless_file_exceeds_byte_limit() {
    let dir = tempdir().unwrap();
    let mut options = host();
    options.max_bytes = 1_000_000;
    let file = Generator::new(Tree::new().open_file(""), |n| Tree::new().data(n * 1000, [7; 1000]));
    let error = receive(file, dir.path().join("to"), &options).unwrap_err();
    assert!(matches!(error, Error::Limit { limit: Limit::Bytes(1_000_000), .. }), "{error}");
    assert_eq!(names(dir.path()), [""; 0]);
}

#[test]
fn holes_count_toward_byte_limit() {
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
    // The limit applies to the sum of all files.
    fs::remove_file(&to).unwrap();
    let both = Tree::new().directory("").file("a", [0; 600]).file("b", [0; 401]).end();
    assert!(limited(&both));
    assert_eq!(names(&to), ["a"]);
    // An announced length that would be a large allocation if it were believed.
    options.max_bytes = 1 << 62;
    let tree = Tree::new().open_file("").data_head(0, u32::MAX).bytes("only this");
    let error = receive(tree.0.as_slice(), dir.path().join("x"), &options).unwrap_err();
    assert!(matches!(error, Error::EndedEarly { .. }), "{error}");
}

#[test]
fn endless_entries_exceed_entry_limit() {
    let dir = tempdir().unwrap();
    let mut options = host();
    options.max_entries = 100_000;
    let links =
        Generator::new(Tree::new().directory(""), |n| Tree::new().symlink(format!("{n:08}"), "/"));
    let error = receive(links, dir.path().join("to"), &options).unwrap_err();
    assert!(matches!(error, Error::Limit { limit: Limit::Entries(100_000), .. }), "{error}");
}

#[test]
fn path_depth_and_length_are_limited() {
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
fn corrupted_stream_is_error_without_leftovers() {
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
            // A linear congruential generator: random enough, and the same sequence each time.
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

#[test]
fn stream_failure_is_not_end_of_tree() {
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
