use std::ffi::OsStr;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{Mode, OFlags, mkdirat, openat, symlinkat};
use rustix::io::Errno;

use crate::current_path::CurrentPath;
use crate::destination::{
    Destination, OpenDirectory, SET_ATTRIBUTES, TemporaryEntry, apply_attributes, set_link_owner,
};
use crate::error::EscapedPath;
use crate::file_data::{SizeLimit, receive_file_data};
use crate::left_out::LeftOut;
use crate::link_target::may_escape;
use crate::location::{Location, OPEN_DIRECTORY, TRAVERSE_DIRECTORY};
use crate::record::{Attributes, Record, RecordReader};
use crate::{
    Error, FileKind, FormatError, Limit, LinkPolicy, MAX_EXAMPLES, ReceiveOptions, Summary,
};

/// Creates the tree that `reader` carries, with `dest` as its root.
///
/// The parent directory of `dest` must exist. An existing directory is merged into and keeps its
/// mode, owner and time: a tree from a sandbox does not change the access to a user's directory. An
/// existing file or link is replaced by a file or link, atomically and only by a complete one.
/// Existing files are never written to, and entries of other kinds are not replaced. Directories
/// get their mode when they are complete.
///
/// Reading stops after the last record of the tree; up to 128 KiB after it may have been consumed.
/// Nothing is synced to disk.
///
/// # Errors
/// Everything received before the error remains, except for the file that was being written. If
/// [`Error::is_broken_stream`] is true, the other side knows the reason.
pub fn receive(
    mut reader: impl Read,
    dest: impl AsRef<Path>,
    options: &ReceiveOptions,
) -> Result<Summary, Error> {
    let dest = dest.as_ref();
    let mut receiver = Receiver {
        input: RecordReader::new(&mut reader),
        options,
        current: CurrentPath::new(dest),
        directories: Vec::new(),
        entries: 0,
        bytes: 0,
        summary: Summary::default(),
    };
    let location = Location::resolve(dest, options.lookup, &receiver.current)?;
    let result = receiver.receive_tree(&location);
    // Directories are left only after a failure. They must not be less accessible than they would
    // have been after a success.
    while let Some(directory) = receiver.directories.pop() {
        let _ = directory.apply_attributes(options.owner);
    }
    result?;
    Ok(receiver.summary)
}

struct Receiver<'a> {
    input: RecordReader<'a>,
    options: &'a ReceiveOptions,
    current: CurrentPath,
    /// The open directories, outermost first.
    directories: Vec<OpenDirectory>,
    /// The number of entries so far.
    entries: u64,
    /// The sum of the sizes of all complete files, including holes.
    bytes: u64,
    summary: Summary,
}

impl Receiver<'_> {
    fn receive_tree(&mut self, root: &Location) -> Result<(), Error> {
        let record = self.read_record()?;
        self.receive_entry(root, record)?;
        while !self.directories.is_empty() {
            let record = self.read_record()?;
            if record == Record::EndOfDirectory {
                self.end_directory()?;
            } else {
                self.receive_entry(root, record)?;
            }
        }
        Ok(())
    }

    fn read_record(&mut self) -> Result<Record, Error> {
        self.input.read_record().map_err(|error| error.at(&self.current))
    }

    fn receive_entry(&mut self, root: &Location, record: Record) -> Result<(), Error> {
        match record {
            Record::Directory { name, attributes } => {
                self.begin_entry(&name)?;
                self.receive_directory(root, self.mask_mode(attributes))
            }
            Record::File { name, attributes } => {
                self.begin_entry(&name)?;
                self.receive_file(root, self.mask_mode(attributes))
            }
            Record::Symlink { name, target } => {
                self.begin_entry(&name)?;
                self.receive_symlink(root, &target)
            }
            Record::LeftOut { name, kind } => self.note_left_out(&name, kind),
            Record::Data { .. } | Record::EndOfFile { .. } | Record::EndOfDirectory => {
                Err(self.current.format_error(FormatError::MisplacedRecord(record.kind())))
            }
        }
    }

    fn mask_mode(&self, attributes: Attributes) -> Attributes {
        Attributes { mode: attributes.mode & !self.options.umask, ..attributes }
    }

    /// Counts an entry that the sender leaves out. The root cannot be one.
    fn note_left_out(&mut self, name: &[u8], kind: LeftOut) -> Result<(), Error> {
        self.begin_entry(name)?;
        if self.directories.is_empty() {
            return Err(self.current.format_error(FormatError::InvalidName));
        }
        self.summary.add_left_out(&self.current.to_path_buf(), kind);
        Ok(())
    }

    /// Counts an entry, checks its name and its order, and makes it the current entry.
    fn begin_entry(&mut self, name: &[u8]) -> Result<(), Error> {
        self.entries += 1;
        if self.entries > self.options.max_entries {
            return Err(self.current.limit_error(Limit::Entries(self.options.max_entries)));
        }
        let Some(parent) = self.directories.last_mut() else {
            return if name.is_empty() {
                Ok(())
            } else {
                Err(self.current.format_error(FormatError::InvalidName))
            };
        };
        if matches!(name, b"" | b"." | b"..") || name.iter().any(|byte| matches!(byte, 0 | b'/')) {
            self.current.set_entry(None)?;
            return Err(self.current.format_error(FormatError::InvalidName));
        }
        self.current.set_entry(Some(name))?;
        if name <= parent.last_name.as_slice() {
            return Err(self.current.format_error(FormatError::UnsortedName));
        }
        parent.last_name.clear();
        parent.last_name.extend_from_slice(name);
        Ok(())
    }

    fn receive_directory(&mut self, root: &Location, attributes: Attributes) -> Result<(), Error> {
        let dest = Destination::of_current_entry(&self.directories, root, &self.current);
        let directory = match mkdirat(dest.dir, dest.name, Mode::RWXU) {
            Ok(()) => {
                let created = openat(dest.dir, dest.name, OPEN_DIRECTORY, Mode::empty());
                let fd = created.map_err(self.current.filesystem_error("open"))?;
                OpenDirectory { fd, new: Some(attributes), last_name: Vec::new() }
            }
            Err(Errno::EXIST) => {
                dest.check_existing(FileKind::Directory)?;
                let flags = TRAVERSE_DIRECTORY | OFlags::NOFOLLOW;
                let existing = openat(dest.dir, dest.name, flags, Mode::empty());
                let fd = existing.map_err(self.current.filesystem_error("open"))?;
                OpenDirectory { fd, new: None, last_name: Vec::new() }
            }
            Err(errno) => return Err(self.current.filesystem_error("create")(errno)),
        };
        self.current.enter_directory()?;
        self.directories.push(directory);
        self.summary.directories += 1;
        Ok(())
    }

    fn end_directory(&mut self) -> Result<(), Error> {
        self.current.leave_directory();
        let Some(directory) = self.directories.pop() else { return Ok(()) };
        directory
            .apply_attributes(self.options.owner)
            .map_err(self.current.filesystem_error(SET_ATTRIBUTES))
    }

    fn receive_file(&mut self, root: &Location, attributes: Attributes) -> Result<(), Error> {
        let dest = Destination::of_current_entry(&self.directories, root, &self.current);
        dest.check_existing(FileKind::File)?;
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let (temporary, fd) = TemporaryEntry::create(dest.dir, |name| {
            openat(dest.dir, name, flags, Mode::RUSR | Mode::WUSR)
        })
        .map_err(self.current.filesystem_error("create"))?;
        let limit = SizeLimit { used: self.bytes, max: self.options.max_bytes };
        let received = receive_file_data(&mut self.input, &fd, &limit, &self.current)?;
        apply_attributes(&fd, attributes, self.options.owner)
            .map_err(self.current.filesystem_error(SET_ATTRIBUTES))?;
        dest.replace_with(temporary, FileKind::File)?;
        self.bytes += received.size;
        self.summary.bytes += received.data;
        self.summary.files += 1;
        Ok(())
    }

    fn receive_symlink(&mut self, root: &Location, target: &[u8]) -> Result<(), Error> {
        // The root itself is in no directory of the tree, so that any target leads out of it.
        let depth = self.directories.len().checked_sub(1);
        if self.options.links == LinkPolicy::RefuseEscaping
            && depth.is_none_or(|depth| may_escape(depth, target))
        {
            self.refuse_symlink(target);
            return Ok(());
        }
        let dest = Destination::of_current_entry(&self.directories, root, &self.current);
        dest.check_existing(FileKind::Symlink)?;
        let (temporary, ()) =
            TemporaryEntry::create(dest.dir, |name| symlinkat(target, dest.dir, name))
                .map_err(self.current.filesystem_error("create"))?;
        set_link_owner(dest.dir, temporary.name(), self.options.owner)
            .map_err(self.current.filesystem_error("set the owner of"))?;
        dest.replace_with(temporary, FileKind::Symlink)?;
        self.summary.links += 1;
        Ok(())
    }

    fn refuse_symlink(&mut self, target: &[u8]) {
        self.summary.refused += 1;
        if self.summary.refused_examples.len() < MAX_EXAMPLES {
            let (path, target) = (self.current.to_path_buf(), Path::new(OsStr::from_bytes(target)));
            let example = format!("{} -> {}", EscapedPath(&path), EscapedPath(target));
            self.summary.refused_examples.push(example);
        }
    }
}
