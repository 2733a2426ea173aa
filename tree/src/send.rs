use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, Mode, OFlags, RawDir, Stat, fstat, fstatfs, openat, readlinkat, statat,
};
use rustix::io::Errno;

use crate::current_path::CurrentPath;
use crate::left_out::LeftOut;
use crate::location::{Location, file_kind};
use crate::record::{Attributes, Record};
use crate::record_writer::RecordWriter;
use crate::{Error, FileKind, Limit, Lookup, Refusal, SendOptions, Summary};

/// Writes the file or tree at `path` to `writer`, and flushes it.
///
/// Each entry is checked on the descriptor it is read from. Devices, sockets, FIFOs and files of
/// the kernel below the root are left out, and named to the receiver. An entry that vanishes before
/// it is reached is omitted. A file that grows is sent up to the size it had, and one that shrinks
/// up to its new end. Entries are sent in the order of their names' bytes, so that the same tree
/// always gives the same bytes.
///
/// # Errors
/// Returns [`Error::Filesystem`] for an entry that cannot be read, [`Error::Refused`] for one that
/// cannot be copied, [`Error::Limit`] for one that the format or the options do not allow, and
/// [`Error::Stream`] if `writer` fails. The bytes written before are an incomplete tree, which the
/// receiver detects.
pub fn send(
    path: impl AsRef<Path>,
    mut writer: impl Write,
    options: &SendOptions,
) -> Result<Summary, Error> {
    let path = path.as_ref();
    let mut sender = Sender {
        output: RecordWriter::new(&mut writer),
        current: CurrentPath::new(path),
        max_entries: options.max_entries,
        entries: 0,
        summary: Summary::default(),
    };
    match options.lookup {
        Lookup::FollowLinks => sender.send_tree(CWD, path.as_os_str().as_bytes(), true)?,
        Lookup::NoLinks => {
            let location = Location::resolve(path, Lookup::NoLinks, &sender.current)?;
            sender.send_tree(location.dir.as_fd(), &location.name, false)?;
        }
    }
    Ok(sender.summary)
}

struct Sender<'a> {
    output: RecordWriter<'a>,
    current: CurrentPath,
    max_entries: u64,
    /// The number of entries listed, sent or not.
    entries: u64,
    summary: Summary,
}

/// An entry to send.
struct Entry<'a> {
    dir: BorrowedFd<'a>,
    name: &'a [u8],
    /// Empty for the root.
    sent_name: &'a [u8],
    /// The kind in the directory listing. The entry may have been replaced since.
    kind: FileKind,
    /// `NOFOLLOW`, except for a root whose links are followed.
    flags: OFlags,
    /// The device of the directory that contains it; `None` for the root.
    dev: Option<u64>,
}

/// A directory that is being sent.
struct OpenDirectory {
    fd: OwnedFd,
    dev: u64,
    listing: Listing,
}

impl Sender<'_> {
    /// Sends the root and everything below it. `name` is a path if `follow` is true.
    fn send_tree(&mut self, dir: BorrowedFd<'_>, name: &[u8], follow: bool) -> Result<(), Error> {
        let root = self.send_root(dir, name, follow)?;
        // A loop instead of recursion: the agent's threads have small stacks, and the workload
        // decides how deep directories nest.
        let mut directories: Vec<OpenDirectory> = root.into_iter().collect();
        while let Some(parent) = directories.last_mut() {
            if let Some((name, kind)) = parent.listing.next() {
                self.current.set_entry(Some(name))?;
                let (dir, flags) = (parent.fd.as_fd(), OFlags::NOFOLLOW);
                let dev = Some(parent.dev);
                let entry = Entry { dir, name, sent_name: name, kind, flags, dev };
                match self.send_entry(&entry) {
                    Err(Error::Filesystem { operation: OPEN, source, .. })
                        if source.raw_os_error() == Some(Errno::NOENT.raw_os_error()) => {}
                    entered => directories.extend(entered?),
                }
            } else {
                directories.pop();
                self.current.leave_directory();
                self.output.write_record(&Record::EndOfDirectory, &self.current)?;
            }
        }
        self.output.flush()
    }

    fn send_root(
        &mut self,
        dir: BorrowedFd<'_>,
        name: &[u8],
        follow: bool,
    ) -> Result<Option<OpenDirectory>, Error> {
        self.count_entry()?;
        let (at, flags) = if follow {
            (AtFlags::empty(), OFlags::empty())
        } else {
            (AtFlags::SYMLINK_NOFOLLOW, OFlags::NOFOLLOW)
        };
        let stat = statat(dir, name, at).map_err(self.current.filesystem_error(OPEN))?;
        let kind = file_kind(stat.st_mode);
        if kind == FileKind::Symlink {
            return Err(self.current.refusal(Refusal::LinkInPath));
        }
        self.send_entry(&Entry { dir, name, sent_name: &[], kind, flags, dev: None })
    }

    fn count_entry(&mut self) -> Result<(), Error> {
        self.entries += 1;
        if self.entries > self.max_entries {
            return Err(self.current.limit_error(Limit::Entries(self.max_entries)));
        }
        Ok(())
    }

    /// Sends an entry. For a directory, sends its first record and returns it with its entries.
    fn send_entry(&mut self, entry: &Entry<'_>) -> Result<Option<OpenDirectory>, Error> {
        let mut kind = entry.kind;
        if kind == FileKind::Unknown {
            // Some file systems do not report the kind in their listings.
            let stat = statat(entry.dir, entry.name, AtFlags::SYMLINK_NOFOLLOW);
            kind = file_kind(stat.map_err(self.current.filesystem_error(OPEN))?.st_mode);
        }
        match kind {
            FileKind::Symlink => self.send_symlink(entry).map(|()| None),
            FileKind::File | FileKind::Directory => self.send_opened(entry, kind),
            // Not even opened: opening alone can rewind a tape or start a watchdog.
            FileKind::Fifo | FileKind::Socket | FileKind::Device | FileKind::Unknown => {
                self.leave_out(entry, LeftOut::of_kind(kind), Refusal::UnsupportedKind(kind))
            }
        }
    }

    /// Names an entry to the receiver instead of sending it. The root is an error: nothing would be
    /// left of the tree.
    fn leave_out(
        &mut self,
        entry: &Entry<'_>,
        kind: Option<LeftOut>,
        refusal: Refusal,
    ) -> Result<Option<OpenDirectory>, Error> {
        let Some(kind) = kind.filter(|_| entry.dev.is_some()) else {
            return Err(self.current.refusal(refusal));
        };
        let record = Record::LeftOut { name: entry.sent_name.into(), kind };
        self.output.write_record(&record, &self.current)?;
        self.summary.add_left_out(&self.current.to_path_buf(), kind);
        Ok(None)
    }

    fn send_symlink(&mut self, entry: &Entry<'_>) -> Result<(), Error> {
        let target = readlinkat(entry.dir, entry.name, Vec::new())
            .map_err(self.current.filesystem_error(OPEN))?;
        let record = Record::Symlink { name: entry.sent_name.into(), target: target.into_bytes() };
        self.output.write_record(&record, &self.current)?;
        self.summary.links += 1;
        Ok(())
    }

    /// Opens a file or directory, checks it by its descriptor, and sends it.
    fn send_opened(
        &mut self,
        entry: &Entry<'_>,
        expected: FileKind,
    ) -> Result<Option<OpenDirectory>, Error> {
        // If it has been replaced by a FIFO or a terminal meanwhile, opening must neither block nor
        // acquire a controlling terminal.
        let mut flags =
            OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC | entry.flags;
        flags.set(OFlags::DIRECTORY, expected == FileKind::Directory);
        let fd = openat(entry.dir, entry.name, flags, Mode::empty())
            .map_err(self.current.filesystem_error(OPEN))?;
        let stat = fstat(&fd).map_err(self.current.filesystem_error("examine"))?;
        if entry.dev != Some(stat.st_dev) && is_kernel_filesystem(&fd) {
            let kind = Some(LeftOut::KernelFile);
            return self.leave_out(entry, kind, Refusal::KernelFilesystem);
        }
        let (name, attributes) = (entry.sent_name.into(), read_attributes(&stat));
        match file_kind(stat.st_mode) {
            FileKind::File => {
                self.output.write_record(&Record::File { name, attributes }, &self.current)?;
                self.summary.bytes += self.output.write_contents(&fd, &stat, &self.current)?;
                self.summary.files += 1;
                Ok(None)
            }
            FileKind::Directory => {
                self.output.write_record(&Record::Directory { name, attributes }, &self.current)?;
                self.current.enter_directory()?;
                let listing = self.list_directory(&fd)?;
                self.summary.directories += 1;
                Ok(Some(OpenDirectory { fd, dev: stat.st_dev, listing }))
            }
            other => {
                self.leave_out(entry, LeftOut::of_kind(other), Refusal::UnsupportedKind(other))
            }
        }
    }

    fn list_directory(&mut self, dir: &OwnedFd) -> Result<Listing, Error> {
        let mut listing = Listing { names: Vec::new(), order: Vec::new(), next: 0 };
        let mut buffer = Vec::with_capacity(16 * 1024);
        let mut entries = RawDir::new(dir, buffer.spare_capacity_mut());
        while let Some(entry) = entries.next() {
            let entry = entry.map_err(self.current.filesystem_error("list"))?;
            let name = entry.file_name().to_bytes_with_nul();
            if matches!(name, b".\0" | b"..\0") {
                continue;
            }
            self.count_entry()?;
            listing.order.push((listing.names.len(), entry.file_type().into()));
            listing.names.extend_from_slice(name);
        }
        let Listing { names, order, .. } = &mut listing;
        order.sort_unstable_by_key(|&(start, _)| name_at(names, start));
        Ok(listing)
    }
}

/// The sorted names in a directory. One allocation holds them all: there may be a million.
struct Listing {
    /// The names, each followed by a NUL.
    names: Vec<u8>,
    /// The start of each name in `names`, and the kind of the entry, in order.
    order: Vec<(usize, FileKind)>,
    /// The index in `order` of the next entry to send.
    next: usize,
}

impl Listing {
    fn next(&mut self) -> Option<(&[u8], FileKind)> {
        let &(start, kind) = self.order.get(self.next)?;
        self.next += 1;
        Some((name_at(&self.names, start), kind))
    }
}

fn name_at(names: &[u8], start: usize) -> &[u8] {
    let rest = &names[start..];
    &rest[..rest.iter().position(|&byte| byte == 0).unwrap_or(rest.len())]
}

/// The operation whose `ENOENT` means that an entry has vanished.
const OPEN: &str = "open";

fn read_attributes(stat: &Stat) -> Attributes {
    Attributes {
        // Nine bits fit. The others, setuid among them, are not sent.
        mode: u16::try_from(stat.st_mode & 0o777).unwrap_or_default(),
        seconds: stat.st_mtime,
        nanoseconds: u32::try_from(stat.st_mtime_nsec).unwrap_or_default(),
    }
}

/// Returns true if the file is in a file system whose contents the kernel generates.
///
/// These files claim to be empty or one page long, and reading them may block forever. Without this
/// check, a copy of `/` would not end. The magic numbers are from `linux/magic.h`.
fn is_kernel_filesystem(fd: &OwnedFd) -> bool {
    const PROC: u64 = 0x9fa0;
    const SYSFS: u64 = 0x6265_6572;
    const DEVPTS: u64 = 0x1cd1;
    const CGROUP: u64 = 0x0027_e0eb;
    const CGROUP2: u64 = 0x6367_7270;
    const DEBUGFS: u64 = 0x6462_6720;
    const TRACEFS: u64 = 0x7472_6163;
    const SECURITYFS: u64 = 0x7363_6673;
    const CONFIGFS: u64 = 0x6265_6570;
    const BPF: u64 = 0xcafe_4a11;
    const NSFS: u64 = 0x6e73_6673;
    fstatfs(fd).is_ok_and(|stat| {
        let magic = u64::try_from(stat.f_type).unwrap_or_default();
        matches!(
            magic,
            PROC | SYSFS
                | DEVPTS
                | CGROUP
                | CGROUP2
                | DEBUGFS
                | TRACEFS
                | SECURITYFS
                | CONFIGFS
                | BPF
                | NSFS
        )
    })
}
