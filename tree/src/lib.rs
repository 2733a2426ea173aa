//! Copies a file or a directory tree over a byte stream between two sides that do not trust each
//! other: a host and the agent in its sandbox.
//!
//! [`send`] walks a tree and encodes it; [`receive`] decodes it and creates it. Both hold the
//! directories they work on by file descriptor and open one path component at a time with
//! `O_NOFOLLOW`. Neither a link in the tree nor one that another process puts there meanwhile can
//! redirect them. `openat2(2)` with `RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS` gives the same
//! guarantee. It is not used because gVisor and the seccomp profiles of older container engines do
//! not know that call, and a tree is walked by component anyway.
//!
//! # Preserved and dropped attributes
//!
//! Preserved: regular files with their holes, directories, symbolic links as they are; names of any
//! bytes; the nine permission bits; the modification time of files and directories in nanoseconds.
//!
//! Dropped: setuid, setgid and sticky bits (a copy must not grant rights, and user ids have another
//! meaning on the other side), owners, extended attributes and ACLs (including file capabilities),
//! hard links (each name becomes a separate file). Devices, sockets, FIFOs and files of the kernel
//! are left out and named; as the root of a tree they are an error.
//!
//! # The format
//!
//! A sequence of records, specified in `docs/tree-format.md`. All integers are little-endian:
//!
//! | kind | record | body |
//! |---|---|---|
//! | 1 | directory | name length `u8`, mode `u16`, mtime seconds `i64`, nanoseconds `u32`, name |
//! | 2 | file | the same |
//! | 3 | symbolic link | name length `u8`, target length `u16`, name, target |
//! | 4 | data | offset `u64`, length `u32`, bytes |
//! | 5 | end of file | size `u64` |
//! | 6 | end of directory | |
//! | 7 | left out | name length `u8`, kind `u8`, name |
//!
//! The first record is the root, the only one without a name. The entries of a directory are
//! between its record and its end, sorted by the bytes of their names, each name once. The data of
//! a file is between its record and its end, in ascending order; a range without data is a hole.
//! The tree is complete with the end of its root.
//!
//! The format has no version of its own: the version of the channel's protocol covers it.
//! `tests/wire.rs` freezes the bytes.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::cast_possible_truncation, reason = "test data is small"))]

mod current_path;
mod destination;
mod error;
mod file_data;
mod left_out;
mod link_target;
mod location;
mod receive;
mod record;
mod record_writer;
mod send;
mod target;

pub use error::{Error, FileKind, FormatError, Limit, Refusal};
pub use location::create_dirs;
pub use receive::receive;
pub use send::send;
pub use target::{check_target, read_umask};

/// The maximum depth of directories. Each level is an open file descriptor on both sides, of a
/// usual limit of 1024.
pub const MAX_DEPTH: usize = 128;

/// The maximum length of a path within a tree in bytes: `PATH_MAX` of Linux. No program could open
/// a longer path by its name.
pub const MAX_PATH: usize = 4096;

/// The maximum length of a symbolic link's target in bytes: `PATH_MAX` without the final NUL.
pub const MAX_TARGET: usize = 4095;

/// The maximum number of entries that a [`Summary`] names, of each kind. It counts all of them.
pub const MAX_EXAMPLES: usize = 16;

/// The way the path of a tree's root is resolved. Within the tree, no link is ever followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lookup {
    /// Follows links, as any program does. For a path and a file system that belong to the user.
    FollowLinks,
    /// Requires an absolute path without `.` and `..`, and fails at a link in any component. For a
    /// path in a file system that a hostile process writes to.
    NoLinks,
}

/// The treatment of symbolic links that may lead out of the tree: absolute ones, and those that
/// climb above its root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkPolicy {
    /// Creates every link as it is. For a destination with nothing outside it to protect.
    Keep,
    /// Omits such links and lists them in [`Summary::refused_examples`]. All else is received.
    RefuseEscaping,
}

/// The options of [`send`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SendOptions {
    /// The way the root is resolved.
    pub lookup: Lookup,
    /// The maximum number of entries, including the root. It also bounds the memory for the listing
    /// of one directory.
    pub max_entries: u64,
}

impl SendOptions {
    /// Returns the options for a user's own files. A root that is a link is followed, because its
    /// target would not exist inside the sandbox.
    pub fn host() -> SendOptions {
        SendOptions { lookup: Lookup::FollowLinks, max_entries: MAX_ENTRIES }
    }

    /// Returns the options for files of a workload, sent by the agent with its higher privileges.
    pub fn agent() -> SendOptions {
        SendOptions { lookup: Lookup::NoLinks, max_entries: MAX_ENTRIES }
    }
}

/// Ten times the entries of a large source tree with its dependencies. The names of so many files
/// take some ten MiB.
const MAX_ENTRIES: u64 = 1_000_000;

/// The options of [`receive`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceiveOptions {
    /// The way the destination is resolved.
    pub lookup: Lookup,
    /// The treatment of links that lead out of the tree.
    pub links: LinkPolicy,
    /// The maximum sum of all file sizes in bytes. Holes count like data, because the next program
    /// that reads the files pays for them in full.
    pub max_bytes: u64,
    /// The maximum number of entries, including the root. Each becomes an inode.
    pub max_entries: u64,
    /// The permission bits that created files and directories never get.
    pub umask: u16,
    /// The user and group id that own the created files. `None` means those of this process.
    pub owner: Option<(u32, u32)>,
}

impl ReceiveOptions {
    /// Returns the options for a tree from a sandbox into a user's files. The umask of this process
    /// applies, as to any file that it creates.
    pub fn host(max_bytes: u64, max_entries: u64) -> ReceiveOptions {
        ReceiveOptions {
            lookup: Lookup::FollowLinks,
            links: LinkPolicy::RefuseEscaping,
            max_bytes,
            max_entries,
            umask: read_umask(),
            owner: None,
        }
    }

    /// Returns the options for a user's tree into a sandbox, created by the agent for a workload
    /// with the given user and group id.
    pub fn agent(owner: (u32, u32), max_bytes: u64) -> ReceiveOptions {
        ReceiveOptions {
            lookup: Lookup::NoLinks,
            links: LinkPolicy::Keep,
            max_bytes,
            max_entries: MAX_ENTRIES,
            umask: 0,
            owner: Some(owner),
        }
    }
}

/// The counts of a completed copy.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Summary {
    /// The number of regular files.
    pub files: u64,
    /// The number of directories, including the root.
    pub directories: u64,
    /// The number of symbolic links, without the refused ones.
    pub links: u64,
    /// The bytes of file data that crossed the stream, without holes.
    pub bytes: u64,
    /// The number of links omitted because they lead out of the tree. Always 0 for [`send`].
    pub refused: u64,
    /// The path and target of the first [`MAX_EXAMPLES`] refused links, escaped for display on one
    /// line.
    pub refused_examples: Vec<String>,
    /// The number of devices, sockets, FIFOs and files of the kernel that are left out.
    pub left_out: u64,
    /// The path and kind of the first [`MAX_EXAMPLES`] of them, escaped for display on one line.
    pub left_out_examples: Vec<String>,
}
