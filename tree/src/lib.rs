//! Moves a file or a directory tree over a byte stream between two sides that do not trust each other: a host and
//! the agent in its sandbox.
//!
//! [`send`] walks a tree and writes it down; [`receive`] reads it and builds it. Both hold what they work on by
//! file descriptor and open one path component at a time with `O_NOFOLLOW`, so that neither a link in the tree
//! nor one that somebody puts there meanwhile leads them anywhere else. That is what `openat2(2)` with
//! `RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS` does; it is not used because gVisor and older container seccomp
//! profiles do not know that call, and a tree is walked by component anyway.
//!
//! # What is kept
//!
//! Regular files with their holes, directories, symbolic links as they are; names of any bytes; the nine
//! permission bits; the time of the last change of files and directories, in nanoseconds.
//!
//! Not kept: setuid, setgid and sticky bits (a program that gains rights by being copied is never what was meant,
//! and the other side's user ids mean something else), owners, extended attributes and ACLs (file capabilities
//! are one), hard links (each name becomes a file of its own). Devices, sockets and FIFOs are refused.
//!
//! # The wire format
//!
//! A sequence of records, described in `docs/tree-format.md`; all integers little-endian:
//!
//! | kind | record | body |
//! |---|---|---|
//! | 1 | directory | name length `u8`, mode `u16`, mtime seconds `i64`, nanoseconds `u32`, name |
//! | 2 | file | the same |
//! | 3 | symbolic link | name length `u8`, target length `u16`, name, target |
//! | 4 | data | offset `u64`, length `u32`, bytes |
//! | 5 | end of file | size `u64` |
//! | 6 | end of directory | |
//!
//! The first record is the root, the only one without a name. A directory's entries stand between it and its
//! end, sorted by the bytes of their names, no name twice. A file's data stands between it and its end, in
//! ascending order; what no data covers is a hole. The tree is complete with the end of its root.
//!
//! There is no version in it: the channel's covers it. `tests/wire.rs` freezes the bytes.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::cast_possible_truncation, reason = "test data is small"))]

mod current_path;
mod error;
mod link_target;
mod location;
mod receive;
mod record;
mod send;

pub use error::{Breach, Error, Kind, Limit, Refusal};
pub use location::create_dirs;
pub use receive::receive;
pub use send::send;

/// How deep directories may nest. Each level is an open file descriptor on both sides, of usually 1024.
pub const MAX_DEPTH: usize = 128;

/// The longest path within a tree in bytes, `PATH_MAX` of Linux: no program could open a longer one by its name.
pub const MAX_PATH: usize = 4096;

/// The longest target of a symbolic link in bytes: `PATH_MAX` less its NUL.
pub const MAX_TARGET: usize = 4095;

/// How many refused links [`Summary::refused_examples`] names. The count beside it is complete.
pub const MAX_EXAMPLES: usize = 16;

/// How the path given for the root of a tree is looked up. Within the tree no link is ever followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lookup {
    /// As any program does, links included. For a path and a file system that belong to the user.
    Follow,
    /// The path is absolute and free of `.` and `..`, and a link anywhere in it is an error. For a path
    /// in a file system that somebody hostile writes to.
    NoLinks,
}

/// What to do with a symbolic link that may lead out of the tree: an absolute one, or one that climbs
/// higher than its root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Links {
    /// Create every link as it is. For a tree that goes where nothing outside it is worth protecting.
    Keep,
    /// Leave such links out and list them in [`Summary::refused_examples`]; everything else is received.
    RefuseEscaping,
}

/// How [`send`] works.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SendOptions {
    /// How the root is looked up.
    pub lookup: Lookup,
    /// The most entries, the root included. Also bounds the memory a listing of one directory takes.
    pub max_entries: u64,
}

impl SendOptions {
    /// A user's own files. A root that is a link is followed: inside the sandbox its target would not exist.
    pub fn host() -> SendOptions {
        SendOptions { lookup: Lookup::Follow, max_entries: MAX_ENTRIES }
    }

    /// Files of a workload, sent by the agent above it.
    pub fn agent() -> SendOptions {
        SendOptions { lookup: Lookup::NoLinks, max_entries: MAX_ENTRIES }
    }
}

/// Ten times a large source tree with its dependencies; the names of so many files take some ten MiB.
const MAX_ENTRIES: u64 = 1_000_000;

/// How [`receive`] works.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceiveOptions {
    /// How the destination is looked up.
    pub lookup: Lookup,
    /// What to do with links that lead out.
    pub links: Links,
    /// The most bytes of all files together, holes counted like data: the next program that reads the
    /// files pays for them in full.
    pub max_bytes: u64,
    /// The most entries, the root included. Each is an inode here.
    pub max_entries: u64,
    /// Who is to own what is created, user and group id. The caller itself if absent.
    pub owner: Option<(u32, u32)>,
}

impl ReceiveOptions {
    /// A tree out of a sandbox into a user's files.
    pub fn host(max_bytes: u64, max_entries: u64) -> ReceiveOptions {
        ReceiveOptions {
            lookup: Lookup::Follow,
            links: Links::RefuseEscaping,
            max_bytes,
            max_entries,
            owner: None,
        }
    }

    /// A user's tree into a sandbox, built by the agent for a workload of the given user and group id.
    pub fn agent(owner: (u32, u32), max_bytes: u64) -> ReceiveOptions {
        ReceiveOptions {
            lookup: Lookup::NoLinks,
            links: Links::Keep,
            max_bytes,
            max_entries: MAX_ENTRIES,
            owner: Some(owner),
        }
    }
}

/// What was copied.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Summary {
    /// Regular files.
    pub files: u64,
    /// Directories, the root included.
    pub directories: u64,
    /// Symbolic links, without the refused.
    pub links: u64,
    /// Bytes of file contents that went over the stream: holes are not in it.
    pub bytes: u64,
    /// Links left out because they lead out of the tree. Always 0 for [`send`].
    pub refused: u64,
    /// The first [`MAX_EXAMPLES`] of them: where they would be and what they point to, fit for display on one line.
    pub refused_examples: Vec<String>,
}
