use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::FileType;
use rustix::io::Errno;

/// Why a copy failed. Each is one line; names in it are escaped, so that a hostile one cannot forge a second.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// This side's system refused something.
    #[error("{operation} {}", Shown(path))]
    Local {
        /// What was to be done, e.g. `open`.
        operation: &'static str,
        /// To what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The stream to the peer failed.
    #[error("the stream of a copy failed")]
    Stream(#[source] std::io::Error),
    /// The peer stopped in the middle. Why, it says elsewhere or not at all.
    #[error("copy {}: the copy ended early", Shown(path))]
    EndedEarly {
        /// What was about to be received.
        path: PathBuf,
    },
    /// Something that this crate does not do.
    #[error("copy {}: {refusal}", Shown(path))]
    Refused {
        /// The thing it was asked for.
        path: PathBuf,
        /// What it does not do.
        refusal: Refusal,
    },
    /// The tree is larger than it may be.
    #[error("copy {}: {limit}", Shown(path))]
    Limit {
        /// Where the limit was reached.
        path: PathBuf,
        /// Which one.
        limit: Limit,
    },
    /// The peer broke the format.
    #[error("copy {}: the other side broke the format: {breach}", Shown(path))]
    Malformed {
        /// Where in the tree.
        path: PathBuf,
        /// How.
        breach: Breach,
    },
}

impl Error {
    /// Whether the peer is where to look for the cause: it stopped sending or stopped reading.
    pub fn is_broken_stream(&self) -> bool {
        match self {
            Error::Stream(_) | Error::EndedEarly { .. } => true,
            Error::Local { .. }
            | Error::Refused { .. }
            | Error::Limit { .. }
            | Error::Malformed { .. } => false,
        }
    }

    /// The Linux errno that comes nearest, for a protocol that carries one beside the text of this error.
    pub fn errno(&self) -> i32 {
        let errno = match self {
            Error::Local { source, .. } | Error::Stream(source) => {
                return source.raw_os_error().unwrap_or(Errno::IO.raw_os_error());
            }
            Error::EndedEarly { .. } => Errno::PIPE,
            Error::Refused { refusal, .. } => match refusal {
                Refusal::Special(_) | Refusal::KernelFiles => Errno::NOTSUP,
                Refusal::InTheWay { there: Kind::Directory, .. } => Errno::ISDIR,
                Refusal::InTheWay { comes: Kind::Directory, .. } => Errno::NOTDIR,
                Refusal::InTheWay { .. } => Errno::EXIST,
                Refusal::LinkInPath => Errno::LOOP,
                Refusal::BadPath => Errno::INVAL,
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

/// What a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Kind {
    File,
    Directory,
    Symlink,
    Fifo,
    Socket,
    Device,
    Unknown,
}

impl From<FileType> for Kind {
    fn from(kind: FileType) -> Kind {
        match kind {
            FileType::RegularFile => Kind::File,
            FileType::Directory => Kind::Directory,
            FileType::Symlink => Kind::Symlink,
            FileType::Fifo => Kind::Fifo,
            FileType::Socket => Kind::Socket,
            FileType::CharacterDevice | FileType::BlockDevice => Kind::Device,
            FileType::Unknown => Kind::Unknown,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::File => "file",
            Kind::Directory => "directory",
            Kind::Symlink => "symbolic link",
            Kind::Fifo => "FIFO",
            Kind::Socket => "socket",
            Kind::Device => "device",
            Kind::Unknown => "thing of unknown kind",
        })
    }
}

/// Something this crate does not do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// To send a device, socket or FIFO.
    #[error("a {0} cannot be copied")]
    Special(Kind),
    /// To send files of proc, sysfs and their like.
    #[error(
        "its file system is made up by the kernel, and its files have no contents of their own"
    )]
    KernelFiles,
    /// To replace a directory by something else, something else by a directory, or a device by anything.
    #[error("a {comes} does not replace the {there} that is there")]
    InTheWay {
        /// What is at the destination.
        there: Kind,
        /// What the peer sends.
        comes: Kind,
    },
    /// To follow a symbolic link on the way to a path in a sandbox.
    #[error("a symbolic link stands in this path, and in a sandbox none is followed")]
    LinkInPath,
    /// To look up a path in a sandbox that has other than plain components.
    #[error("the path is not absolute, or has . or .. in it")]
    BadPath,
}

/// A limit of a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Limit {
    /// [`crate::ReceiveOptions::max_bytes`].
    #[error("its files have more than {0} bytes together, holes included")]
    Bytes(u64),
    /// `max_entries` of either side's options.
    #[error("it has more than {0} entries")]
    Entries(u64),
    /// [`crate::MAX_DEPTH`].
    #[error("directories nest deeper than {}", crate::MAX_DEPTH)]
    Depth,
    /// [`crate::MAX_PATH`].
    #[error("the path is longer than {} bytes", crate::MAX_PATH)]
    Path,
    /// 255 bytes for a name, as Linux has it. Some file systems have longer ones.
    #[error("the name is longer than 255 bytes")]
    Name,
    /// [`crate::MAX_TARGET`].
    #[error("the link's target is longer than {} bytes", crate::MAX_TARGET)]
    Target,
}

/// How a peer broke the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Breach {
    /// A kind byte that does not exist.
    #[error("unknown record kind {0}")]
    UnknownKind(u8),
    /// A record that has no place here: data in a directory, an entry in a file.
    #[error("a record of kind {0} where none may be")]
    Misplaced(u8),
    /// A name that is empty, `.`, `..`, or has a slash or NUL in it. Also a root with a name.
    #[error("a name that no file can have here")]
    BadName,
    /// A name that does not sort after the one before it.
    #[error("a name out of order, or twice")]
    Unsorted,
    /// A link target that is empty, too long, or has a NUL in it.
    #[error("a link target that no link can have")]
    BadTarget,
    /// Mode bits beyond `0o777`, or a billion nanoseconds and more.
    #[error("a mode or time that does not exist")]
    BadAttributes,
    /// Data without bytes, overlapping, out of order, past the end, or beyond what a file can hold.
    #[error("data at an impossible place")]
    BadData,
}

/// A path on one line that a terminal can be shown: bytes that are not UTF-8, control characters and those that
/// turn the direction of writing are escaped.
pub(crate) struct Shown<'a>(pub &'a Path);

impl fmt::Display for Shown<'_> {
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
