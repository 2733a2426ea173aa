//! Entries of a tree that cannot be copied. They are left out, named, and cost no other entry.

use std::fmt;
use std::path::Path;

use crate::error::EscapedPath;
use crate::{FileKind, MAX_EXAMPLES, Summary};

/// The reason why an entry is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LeftOut {
    Fifo,
    Socket,
    Device,
    /// A file whose contents the kernel generates.
    KernelFile,
}

impl LeftOut {
    const ALL: [LeftOut; 4] =
        [LeftOut::Fifo, LeftOut::Socket, LeftOut::Device, LeftOut::KernelFile];

    /// Returns the reason for a kind that is not copied, `None` for any other.
    pub fn of_kind(kind: FileKind) -> Option<LeftOut> {
        match kind {
            FileKind::Fifo => Some(LeftOut::Fifo),
            FileKind::Socket => Some(LeftOut::Socket),
            FileKind::Device => Some(LeftOut::Device),
            FileKind::File | FileKind::Directory | FileKind::Symlink | FileKind::Unknown => None,
        }
    }

    /// Returns the byte that stands for it in a record.
    pub fn code(self) -> u8 {
        match self {
            LeftOut::Fifo => 1,
            LeftOut::Socket => 2,
            LeftOut::Device => 3,
            LeftOut::KernelFile => 4,
        }
    }

    pub fn from_code(code: u8) -> Option<LeftOut> {
        LeftOut::ALL.into_iter().find(|kind| kind.code() == code)
    }
}

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            LeftOut::Fifo => "FIFO",
            LeftOut::Socket => "socket",
            LeftOut::Device => "device",
            LeftOut::KernelFile => "file of the kernel",
        })
    }
}

impl Summary {
    /// Counts an entry that is left out, and names it among the first.
    pub(crate) fn add_left_out(&mut self, path: &Path, kind: LeftOut) {
        self.left_out += 1;
        if self.left_out_examples.len() < MAX_EXAMPLES {
            self.left_out_examples.push(format!("{} ({kind})", EscapedPath(path)));
        }
    }
}
