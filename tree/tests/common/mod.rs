//! An encoder of valid and invalid trees, and shorthands.
#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use chitin_tree::{Error, ReceiveOptions, SendOptions, Summary, receive, send};

/// Returns the host's options with limits that no test reaches, and without the umask.
pub fn host() -> ReceiveOptions {
    ReceiveOptions { umask: 0, ..ReceiveOptions::host(1 << 40, 1_000_000) }
}

/// Returns the agent's options, with this process as the owner.
pub fn agent() -> ReceiveOptions {
    ReceiveOptions { owner: None, ..ReceiveOptions::agent((0, 0), 1 << 40) }
}

pub fn sent(path: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    send(path, &mut bytes, &SendOptions::host()).unwrap();
    bytes
}

pub fn received(tree: &Tree, dest: &Path) -> Result<Summary, Error> {
    receive(tree.0.as_slice(), dest, &host())
}

/// A builder of an encoded tree.
#[derive(Clone, Default)]
pub struct Tree(pub Vec<u8>);

impl Tree {
    pub fn new() -> Tree {
        Tree(Vec::new())
    }

    pub fn bytes(mut self, bytes: impl AsRef<[u8]>) -> Tree {
        self.0.extend_from_slice(bytes.as_ref());
        self
    }

    fn entry(self, kind: u8, name: impl AsRef<[u8]>, mode: u16) -> Tree {
        let name = name.as_ref();
        self.bytes([kind, u8::try_from(name.len()).unwrap()])
            .bytes(mode.to_le_bytes())
            .bytes(1_000_000_000_i64.to_le_bytes())
            .bytes(5_u32.to_le_bytes())
            .bytes(name)
    }

    pub fn directory(self, name: impl AsRef<[u8]>) -> Tree {
        self.entry(1, name, 0o755)
    }

    pub fn directory_mode(self, name: impl AsRef<[u8]>, mode: u16) -> Tree {
        self.entry(1, name, mode)
    }

    pub fn open_file(self, name: impl AsRef<[u8]>) -> Tree {
        self.entry(2, name, 0o644)
    }

    pub fn symlink(self, name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Tree {
        let (name, target) = (name.as_ref(), target.as_ref());
        self.bytes([3, u8::try_from(name.len()).unwrap()])
            .bytes(u16::try_from(target.len()).unwrap().to_le_bytes())
            .bytes(name)
            .bytes(target)
    }

    pub fn data(self, offset: u64, bytes: impl AsRef<[u8]>) -> Tree {
        let bytes = bytes.as_ref();
        self.data_head(offset, u32::try_from(bytes.len()).unwrap()).bytes(bytes)
    }

    pub fn data_head(self, offset: u64, len: u32) -> Tree {
        self.bytes([4]).bytes(offset.to_le_bytes()).bytes(len.to_le_bytes())
    }

    pub fn end_file(self, size: u64) -> Tree {
        self.bytes([5]).bytes(size.to_le_bytes())
    }

    pub fn end(self) -> Tree {
        self.bytes([6])
    }

    /// Adds a complete file.
    pub fn file(self, name: impl AsRef<[u8]>, contents: impl AsRef<[u8]>) -> Tree {
        let contents = contents.as_ref();
        let file = self.open_file(name);
        let file = if contents.is_empty() { file } else { file.data(0, contents) };
        file.end_file(contents.len() as u64)
    }
}

/// Describes everything that a copy preserves, one line for each entry.
pub fn describe_tree(root: &Path) -> Vec<String> {
    let mut lines = Vec::new();
    describe_entry(root, "", &mut lines);
    lines
}

fn describe_entry(path: &Path, name: &str, lines: &mut Vec<String>) {
    let meta = path.symlink_metadata().unwrap();
    let kind = meta.file_type();
    let stamp = format!("{:o} {}.{}", meta.mode() & 0o7777, meta.mtime(), meta.mtime_nsec());
    if kind.is_symlink() {
        lines.push(format!("{name} -> {:?}", fs::read_link(path).unwrap()));
    } else if kind.is_dir() {
        lines.push(format!("{name}/ {stamp}"));
        let mut names: Vec<_> =
            fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        for child in names {
            describe_entry(&path.join(&child), &format!("{name}/{child:?}"), lines);
        }
    } else {
        assert!(!kind.is_fifo() && !kind.is_socket(), "{path:?}");
        lines.push(format!("{name} {stamp} {} {:x?}", meta.len(), digest(path)));
    }
}

/// Returns the FNV-1a hash of a file, which suffices to distinguish two files.
fn digest(path: &Path) -> u64 {
    if path.metadata().unwrap().len() > 1 << 24 {
        return 0;
    }
    let bytes = fs::read(path).unwrap_or_default();
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

pub fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into())
        .collect();
    names.sort();
    names
}

/// Returns all names below a directory.
pub fn names_below(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        found.push(entry.file_name().to_string_lossy().into());
        if entry.file_type().unwrap().is_dir() {
            found.extend(names_below(&entry.path()));
        }
    }
    found
}
