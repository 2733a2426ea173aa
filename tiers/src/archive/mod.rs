//! The archive of a root (POSIX pax, with GNU's long names), read with bounds.
//!
//! An archive is a file that someone else may have made. Every size is checked before memory of
//! that size is allocated, and each kind of entry that a root does not need is refused: devices,
//! FIFOs, sparse files, and names that lead out of the root.

mod unpack;

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use tar::{EntryType, PaxExtensions};

pub use unpack::{IMAGE_ID, unpack};

/// Entries of an archive. The default image has three thousand, a Debian with a desktop 200,000.
pub const MAX_ENTRIES: u32 = 500_000;

/// Bytes of all files together.
pub const MAX_BYTES: u64 = 8 << 30;

/// Bytes of a path or of the target of a link: `PATH_MAX` of Linux.
pub const MAX_NAME_BYTES: usize = 4096;

/// Directories above an entry.
pub const MAX_DEPTH: usize = 64;

/// Bytes of an extended header: two names, and attributes that are ignored.
const MAX_HEADER_BYTES: u64 = 64 << 10;

/// An archive that is not unpacked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArchiveError {
    /// The file is not an archive, is cut off, or cannot be read.
    #[error("the archive cannot be read")]
    Read(#[source] io::Error),
    /// The root has no entry of this kind.
    #[error("{}: a root has no entry of type {kind:?}", path.display())]
    Kind {
        /// The entry.
        path: PathBuf,
        /// The type byte of its header.
        kind: char,
    },
    /// A name is empty, too long or too deep, or leads out of the root.
    #[error("{name:?} is not a path below the root")]
    Name {
        /// The beginning of the name.
        name: String,
    },
    /// An extended header is too large, or changes the size of an entry.
    #[error("an extended header is larger than 64 KiB, or changes the size of an entry")]
    Header,
    /// There are more entries or bytes than a root may have.
    #[error("the archive has more than {MAX_ENTRIES} entries, or more than 8 GiB")]
    TooLarge,
    /// An entry cannot be created.
    #[error("create {}", path.display())]
    Create {
        /// The entry.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

/// An entry of an archive. Owner, time stamps, device numbers and extended attributes are ignored.
#[derive(Debug)]
pub(crate) struct Entry<'a> {
    /// The path below the root; empty for the root itself.
    pub path: PathBuf,
    /// Permissions, without the bits that change the user of a process.
    pub mode: u32,
    pub content: Content<'a>,
}

/// The content of an entry.
pub(crate) enum Content<'a> {
    Directory,
    File {
        data: &'a mut dyn Read,
        size: u64,
    },
    /// A symbolic link. It is resolved in the container only.
    Symlink(PathBuf),
    /// A link to a file below the root, of an earlier entry.
    Link(PathBuf),
}

impl std::fmt::Debug for Content<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Content::Directory => f.write_str("Directory"),
            Content::File { size, .. } => write!(f, "File({size})"),
            Content::Symlink(target) | Content::Link(target) => write!(f, "Link({target:?})"),
        }
    }
}

/// Extended headers, which describe the entry after them.
#[derive(Default)]
struct LongNames {
    path: Option<Vec<u8>>,
    target: Option<Vec<u8>>,
}

/// Calls a function for each entry of an archive, in its order.
///
/// # Errors
/// The first entry that is refused, or the error of the function.
pub(crate) fn read_entries(
    file: File,
    mut visit: impl FnMut(Entry<'_>) -> Result<(), ArchiveError>,
) -> Result<(), ArchiveError> {
    let mut archive = tar::Archive::new(file);
    let mut long = LongNames::default();
    let (mut entries, mut bytes) = (0u32, 0u64);
    for entry in archive.entries_with_seek().map_err(ArchiveError::Read)?.raw(true) {
        let mut entry = entry.map_err(ArchiveError::Read)?;
        entries += 1;
        let size = entry.size();
        let kind = entry.header().entry_type();
        bytes = bytes.checked_add(size).ok_or(ArchiveError::TooLarge)?;
        if entries > MAX_ENTRIES || bytes > MAX_BYTES {
            return Err(ArchiveError::TooLarge);
        }
        if long.read_header(kind, size, &mut entry)? {
            continue;
        }
        let LongNames { path, target } = std::mem::take(&mut long);
        let path = check_path(&path.unwrap_or_else(|| entry.path_bytes().into_owned()))?;
        let mode = entry.header().mode().map_err(ArchiveError::Read)? & 0o777;
        let target = target.or_else(|| entry.link_name_bytes().map(Into::into));
        let target = target.unwrap_or_default();
        let content = match kind {
            EntryType::Directory => Content::Directory,
            EntryType::Regular => Content::File { data: &mut entry, size },
            EntryType::Symlink if is_link_target(&target) => {
                Content::Symlink(OsStr::from_bytes(&target).into())
            }
            EntryType::Symlink => return Err(name_error(&target)),
            EntryType::Link => Content::Link(check_path(&target)?),
            other => return Err(ArchiveError::Kind { path, kind: other.as_byte().into() }),
        };
        visit(Entry { path, mode, content })?;
    }
    Ok(())
}

impl LongNames {
    /// Reads an extended header. Returns false for an entry.
    fn read_header(
        &mut self,
        kind: EntryType,
        size: u64,
        data: &mut impl Read,
    ) -> Result<bool, ArchiveError> {
        let known = [EntryType::GNULongName, EntryType::GNULongLink, EntryType::XHeader];
        if kind == EntryType::XGlobalHeader {
            return Ok(true);
        }
        if !known.contains(&kind) {
            return Ok(false);
        }
        if size > MAX_HEADER_BYTES {
            return Err(ArchiveError::Header);
        }
        let mut text = Vec::new();
        data.take(MAX_HEADER_BYTES).read_to_end(&mut text).map_err(ArchiveError::Read)?;
        match kind {
            EntryType::GNULongName => self.path = Some(without_terminator(text)),
            EntryType::GNULongLink => self.target = Some(without_terminator(text)),
            _ => self.read_pax_records(&text)?,
        }
        Ok(true)
    }

    fn read_pax_records(&mut self, text: &[u8]) -> Result<(), ArchiveError> {
        for record in PaxExtensions::new(text) {
            let record = record.map_err(ArchiveError::Read)?;
            let value = record.value_bytes().to_vec();
            match record.key_bytes() {
                b"path" => self.path = Some(value),
                b"linkpath" => self.target = Some(value),
                // Two readers that disagree about sizes see two different archives.
                b"size" => return Err(ArchiveError::Header),
                key if key.starts_with(b"GNU.sparse.") => return Err(ArchiveError::Header),
                // Owners, time stamps, and attributes such as file capabilities.
                _ => {}
            }
        }
        Ok(())
    }
}

fn without_terminator(mut text: Vec<u8>) -> Vec<u8> {
    if text.last() == Some(&0) {
        text.pop();
    }
    text
}

/// Returns the path below the root: `./usr/bin/` is `usr/bin`, and `./` is empty.
fn check_path(name: &[u8]) -> Result<PathBuf, ArchiveError> {
    let mut path = PathBuf::new();
    if name.is_empty() || name.len() > MAX_NAME_BYTES || name.contains(&0) {
        return Err(name_error(name));
    }
    for component in Path::new(OsStr::from_bytes(name)).components() {
        match component {
            Component::CurDir => {}
            Component::Normal(part) if part.len() <= 255 => path.push(part),
            _ => return Err(name_error(name)),
        }
    }
    if path.components().count() > MAX_DEPTH {
        return Err(name_error(name));
    }
    Ok(path)
}

fn is_link_target(target: &[u8]) -> bool {
    !target.is_empty() && target.len() < MAX_NAME_BYTES && !target.contains(&0)
}

fn name_error(name: &[u8]) -> ArchiveError {
    let shown = &name[..name.len().min(128)];
    ArchiveError::Name { name: String::from_utf8_lossy(shown).into_owned() }
}
