use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::FileType;
use rustix::io::Errno;

/// An error of a copy.
///
/// Each is displayed on one line. Names in it are escaped, so that a hostile name cannot forge a
/// second line.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "fields of variants whose text explains them")]
pub enum Error {
    /// A system call on this side's file system failed.
    #[error("{operation} {}", EscapedPath(path))]
    Filesystem {
        /// The operation, for example `open`.
        operation: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    /// The stream to the other side failed.
    #[error("the stream of a copy failed")]
    Stream(#[source] std::io::Error),
    /// The other side stopped before the end of the tree. It reports the reason on another channel,
    /// or not at all.
    #[error("copy {}: the copy ended early", EscapedPath(path))]
    EndedEarly {
        /// The entry that was expected next.
        path: PathBuf,
    },
    /// The entry cannot be copied.
    #[error("copy {}: {refusal}", EscapedPath(path))]
    Refused { path: PathBuf, refusal: Refusal },
    /// The tree exceeds a limit.
    #[error("copy {}: {limit}", EscapedPath(path))]
    Limit {
        /// The entry at which the limit was reached.
        path: PathBuf,
        limit: Limit,
    },
    /// The other side violated the format.
    #[error("copy {}: the other side violated the format: {error}", EscapedPath(path))]
    Malformed {
        /// The entry at which it was detected.
        path: PathBuf,
        error: FormatError,
    },
}

impl Error {
    /// Returns true if the other side has stopped sending or receiving, and therefore knows the
    /// cause.
    pub fn is_broken_stream(&self) -> bool {
        match self {
            Error::Stream(_) | Error::EndedEarly { .. } => true,
            Error::Filesystem { .. }
            | Error::Refused { .. }
            | Error::Limit { .. }
            | Error::Malformed { .. } => false,
        }
    }

    /// Returns the closest Linux error number, for a protocol that carries one with the text.
    pub fn errno(&self) -> i32 {
        let errno = match self {
            Error::Filesystem { source, .. } | Error::Stream(source) => {
                return source.raw_os_error().unwrap_or(Errno::IO.raw_os_error());
            }
            Error::EndedEarly { .. } => Errno::PIPE,
            Error::Refused { refusal, .. } => match refusal {
                Refusal::UnsupportedKind(_) | Refusal::KernelFilesystem => Errno::NOTSUP,
                Refusal::KindMismatch { existing: FileKind::Directory, .. } => Errno::ISDIR,
                Refusal::KindMismatch { incoming: FileKind::Directory, .. } => Errno::NOTDIR,
                Refusal::KindMismatch { .. } => Errno::EXIST,
                Refusal::LinkInPath => Errno::LOOP,
                Refusal::InvalidPath => Errno::INVAL,
            },
            Error::Limit { limit, .. } => match limit {
                Limit::Bytes(_) => Errno::FBIG,
                Limit::Entries(_) => Errno::NOSPC,
                Limit::Depth | Limit::Path | Limit::Name | Limit::Target => Errno::NAMETOOLONG,
            },
            Error::Malformed { .. } => Errno::PROTO,
        };
        errno.raw_os_error()
    }
}

/// The kind of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are those of Linux")]
pub enum FileKind {
    File,
    Directory,
    Symlink,
    Fifo,
    Socket,
    Device,
    Unknown,
}

impl From<FileType> for FileKind {
    fn from(kind: FileType) -> FileKind {
        match kind {
            FileType::RegularFile => FileKind::File,
            FileType::Directory => FileKind::Directory,
            FileType::Symlink => FileKind::Symlink,
            FileType::Fifo => FileKind::Fifo,
            FileType::Socket => FileKind::Socket,
            FileType::CharacterDevice | FileType::BlockDevice => FileKind::Device,
            FileType::Unknown => FileKind::Unknown,
        }
    }
}

impl fmt::Display for FileKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FileKind::File => "file",
            FileKind::Directory => "directory",
            FileKind::Symlink => "symbolic link",
            FileKind::Fifo => "FIFO",
            FileKind::Socket => "socket",
            FileKind::Device => "device",
            FileKind::Unknown => "file of unknown kind",
        })
    }
}

/// The reason why an entry cannot be copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A device, socket or FIFO cannot be sent.
    #[error("a {0} cannot be copied")]
    UnsupportedKind(FileKind),
    /// Files of proc, sysfs and similar file systems cannot be sent.
    #[error("the kernel generates the contents of this file system, which cannot be copied")]
    KernelFilesystem,
    /// A directory replaces only a directory, and a file or link only a file or link.
    #[error("a {incoming} cannot replace the existing {existing}")]
    KindMismatch {
        /// The kind of the entry at the destination.
        existing: FileKind,
        /// The kind of the entry that the other side sends.
        incoming: FileKind,
    },
    /// A path in a sandbox is not followed through a symbolic link.
    #[error("the path contains a symbolic link, and links are not followed in a sandbox")]
    LinkInPath,
    /// A path in a sandbox must be absolute, without `.` and `..`.
    #[error("the path must be absolute, without . and .. in it")]
    InvalidPath,
}

/// A limit that a tree exceeds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Limit {
    /// [`crate::ReceiveOptions::max_bytes`].
    #[error("the sum of all file sizes, including holes, exceeds {0} bytes")]
    Bytes(u64),
    /// `max_entries` of either side's options.
    #[error("the tree has more than {0} entries")]
    Entries(u64),
    /// [`crate::MAX_DEPTH`].
    #[error("directories are nested more than {} levels deep", crate::MAX_DEPTH)]
    Depth,
    /// [`crate::MAX_PATH`].
    #[error("the path is longer than {} bytes", crate::MAX_PATH)]
    Path,
    /// 255 bytes for a name, the limit of Linux. Some file systems allow longer names.
    #[error("the name is longer than 255 bytes")]
    Name,
    /// [`crate::MAX_TARGET`].
    #[error("the target of the link is longer than {} bytes", crate::MAX_TARGET)]
    Target,
}

/// A violation of the format by the other side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// A reason for an entry that is left out which the format does not define.
    #[error("unknown kind {0} of an entry that is left out")]
    UnknownLeftOut(u8),
    /// A kind byte that the format does not define.
    #[error("unknown record kind {0}")]
    UnknownRecord(u8),
    /// A record that is not allowed here: data in a directory, an entry in a file.
    #[error("a record of kind {0} is not allowed here")]
    MisplacedRecord(u8),
    /// A name that is empty, `.`, `..`, or contains a slash or NUL. Also a root with a name.
    #[error("an invalid name")]
    InvalidName,
    /// A name that does not sort after the previous one.
    #[error("a name out of order, or duplicated")]
    UnsortedName,
    /// A link target that is empty, too long, or contains a NUL.
    #[error("an invalid link target")]
    InvalidTarget,
    /// Mode bits beyond `0o777`, or nanoseconds of a billion or more.
    #[error("an invalid mode or time")]
    InvalidAttributes,
    /// Data that is empty, overlapping, out of order, after the end, or beyond the maximum size of
    /// a file.
    #[error("data at an invalid offset or of an invalid length")]
    InvalidData,
}

/// Displays a path on one line, safe for a terminal.
///
/// Bytes that are not UTF-8, control characters, and characters that change the direction of
/// writing are escaped.
pub(crate) struct EscapedPath<'a>(pub &'a Path);

impl fmt::Display for EscapedPath<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.0.as_os_str().as_bytes().utf8_chunks() {
            for c in chunk.valid().chars() {
                match c {
                    '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
                        write!(f, "{}", c.escape_unicode())?;
                    }
                    '\u{2028}' | '\u{2029}' => write!(f, "{}", c.escape_unicode())?,
                    c if c.is_control() => write!(f, "{}", c.escape_default())?,
                    c => fmt::Write::write_char(f, c)?,
                }
            }
            write!(f, "{}", chunk.invalid().escape_ascii())?;
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "error_test.rs"]
mod tests;
