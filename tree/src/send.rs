use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, Mode, OFlags, RawDir, SeekFrom, Stat, fstat, fstatfs, openat, readlinkat, seek,
    statat,
};
use rustix::io::{Errno, pread};

use crate::current_path::Trail;
use crate::location::{Place, kind};
use crate::record::{Attributes, BUFFER, DATA_HEAD, Record};
use crate::{Error, Kind, Limit, Lookup, Refusal, SendOptions, Summary};

/// Writes the file or tree at `path` to `writer`, and flushes it.
///
/// Each entry is checked on the descriptor it is read from. An entry that vanishes before it is reached is as one
/// that was never there; a file that grows is sent up to the size it had, one that shrinks as far as it goes.
/// Entries are sent in the order of their names' bytes, so that the same tree gives the same bytes.
///
/// # Errors
/// [`Error::Local`] for what cannot be read, [`Error::Refused`] for what cannot be copied, [`Error::Limit`] for what
/// the format or the options do not allow, [`Error::Stream`] from `writer`. What was written until then is not a
/// whole tree, and the receiver knows.
pub fn send(
    path: impl AsRef<Path>,
    mut writer: impl Write,
    options: &SendOptions,
) -> Result<Summary, Error> {
    let path = path.as_ref();
    let mut sender = Sender {
        output: Output {
            writer: &mut writer,
            buffer: vec![0; BUFFER],
            used: 0,
            record: Vec::new(),
        },
        trail: Trail::new(path),
        max_entries: options.max_entries,
        entries: 0,
        summary: Summary::default(),
    };
    match options.lookup {
        Lookup::Follow => sender.run(CWD, path.as_os_str().as_bytes(), true)?,
        Lookup::NoLinks => {
            let place = Place::find(path, Lookup::NoLinks, &sender.trail)?;
            sender.run(place.dir.as_fd(), &place.name, false)?;
        }
    }
    Ok(sender.summary)
}

struct Sender<'a> {
    output: Output<'a>,
    trail: Trail,
    max_entries: u64,
    /// Entries listed, sent or not.
    entries: u64,
    summary: Summary,
}

/// Something to send.
struct Entry<'a> {
    dir: BorrowedFd<'a>,
    name: &'a [u8],
    /// Empty for the root.
    sent_name: &'a [u8],
    /// As listed; it may have become something else since.
    kind: Kind,
    /// `NOFOLLOW`, except for a root whose links are followed.
    flags: OFlags,
    /// The file system of the directory it is in.
    dev: Option<u64>,
}

/// A directory that is being sent.
struct Level {
    fd: OwnedFd,
    dev: u64,
    listing: Listing,
}

impl Sender<'_> {
    /// Sends what the caller named, and what is in it; `name` is a path if `follow`.
    fn run(&mut self, dir: BorrowedFd<'_>, name: &[u8], follow: bool) -> Result<(), Error> {
        let root = self.root(dir, name, follow)?;
        // Not by recursion: the agent's threads have small stacks, and a workload may nest directories as it likes.
        let mut levels: Vec<Level> = root.into_iter().collect();
        while let Some(level) = levels.last_mut() {
            if let Some((name, kind)) = level.listing.next() {
                self.trail.turn_to(Some(name))?;
                let (dir, flags) = (level.fd.as_fd(), OFlags::NOFOLLOW);
                let entry = Entry { dir, name, sent_name: name, kind, flags, dev: Some(level.dev) };
                match self.entry(&entry) {
                    Err(Error::Local { operation: OPEN, source, .. })
                        if source.raw_os_error() == Some(Errno::NOENT.raw_os_error()) => {}
                    entered => levels.extend(entered?),
                }
            } else {
                levels.pop();
                self.trail.leave();
                self.output.record(&Record::EndOfDirectory, &self.trail)?;
            }
        }
        self.output.flush()
    }

    fn root(
        &mut self,
        dir: BorrowedFd<'_>,
        name: &[u8],
        follow: bool,
    ) -> Result<Option<Level>, Error> {
        self.count()?;
        let (at, flags) = if follow {
            (AtFlags::empty(), OFlags::empty())
        } else {
            (AtFlags::SYMLINK_NOFOLLOW, OFlags::NOFOLLOW)
        };
        let stat = statat(dir, name, at).map_err(self.trail.local(OPEN))?;
        let kind = kind(stat.st_mode);
        if kind == Kind::Symlink {
            return Err(self.trail.refused(Refusal::LinkInPath));
        }
        self.entry(&Entry { dir, name, sent_name: &[], kind, flags, dev: None })
    }

    fn count(&mut self) -> Result<(), Error> {
        self.entries += 1;
        if self.entries > self.max_entries {
            return Err(self.trail.limit(Limit::Entries(self.max_entries)));
        }
        Ok(())
    }

    /// Sends an entry. Of a directory that is its beginning, and what is in it is returned.
    fn entry(&mut self, entry: &Entry<'_>) -> Result<Option<Level>, Error> {
        let mut kind = entry.kind;
        if kind == Kind::Unknown {
            // Not every file system tells in its listings.
            let stat = statat(entry.dir, entry.name, AtFlags::SYMLINK_NOFOLLOW);
            kind = self::kind(stat.map_err(self.trail.local(OPEN))?.st_mode);
        }
        match kind {
            Kind::Symlink => self.symlink(entry).map(|()| None),
            Kind::File | Kind::Directory => self.open(entry, kind),
            // Not even opened: that alone can rewind a tape or start a watchdog.
            Kind::Fifo | Kind::Socket | Kind::Device | Kind::Unknown => {
                Err(self.trail.refused(Refusal::Special(kind)))
            }
        }
    }

    fn symlink(&mut self, entry: &Entry<'_>) -> Result<(), Error> {
        let target =
            readlinkat(entry.dir, entry.name, Vec::new()).map_err(self.trail.local(OPEN))?;
        let record = Record::Symlink { name: entry.sent_name.into(), target: target.into_bytes() };
        self.output.record(&record, &self.trail)?;
        self.summary.links += 1;
        Ok(())
    }

    fn open(&mut self, entry: &Entry<'_>, expected: Kind) -> Result<Option<Level>, Error> {
        // If it has become a FIFO or a terminal meanwhile, opening must neither wait nor take it over.
        let mut flags =
            OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC | entry.flags;
        flags.set(OFlags::DIRECTORY, expected == Kind::Directory);
        let fd =
            openat(entry.dir, entry.name, flags, Mode::empty()).map_err(self.trail.local(OPEN))?;
        let stat = fstat(&fd).map_err(self.trail.local("examine"))?;
        if entry.dev != Some(stat.st_dev) && is_made_up_by_the_kernel(&fd) {
            return Err(self.trail.refused(Refusal::KernelFiles));
        }
        let (name, attributes) = (entry.sent_name.into(), attributes(&stat));
        match kind(stat.st_mode) {
            Kind::File => {
                self.output.record(&Record::File { name, attributes }, &self.trail)?;
                self.summary.bytes += self.output.contents(&fd, &stat, &self.trail)?;
                self.summary.files += 1;
                Ok(None)
            }
            Kind::Directory => {
                self.output.record(&Record::Directory { name, attributes }, &self.trail)?;
                self.trail.enter()?;
                let listing = self.list(&fd)?;
                self.summary.directories += 1;
                Ok(Some(Level { fd, dev: stat.st_dev, listing }))
            }
            other => Err(self.trail.refused(Refusal::Special(other))),
        }
    }

    fn list(&mut self, dir: &OwnedFd) -> Result<Listing, Error> {
        let mut listing = Listing { names: Vec::new(), order: Vec::new(), next: 0 };
        let mut buffer = Vec::with_capacity(16 * 1024);
        let mut entries = RawDir::new(dir, buffer.spare_capacity_mut());
        while let Some(entry) = entries.next() {
            let entry = entry.map_err(self.trail.local("list"))?;
            let name = entry.file_name().to_bytes_with_nul();
            if matches!(name, b".\0" | b"..\0") {
                continue;
            }
            self.count()?;
            listing.order.push((listing.names.len(), entry.file_type().into()));
            listing.names.extend_from_slice(name);
        }
        let Listing { names, order, .. } = &mut listing;
        order.sort_unstable_by_key(|&(start, _)| name_at(names, start));
        Ok(listing)
    }
}

/// The names in a directory, sorted. One allocation holds them all: there may be a million.
struct Listing {
    /// Each with a NUL after it.
    names: Vec<u8>,
    /// Where in `names` each one begins, and what it is.
    order: Vec<(usize, Kind)>,
    /// The first in `order` that is not sent.
    next: usize,
}

impl Listing {
    fn next(&mut self) -> Option<(&[u8], Kind)> {
        let &(start, kind) = self.order.get(self.next)?;
        self.next += 1;
        Some((name_at(&self.names, start), kind))
    }
}

fn name_at(names: &[u8], start: usize) -> &[u8] {
    let rest = &names[start..];
    &rest[..rest.iter().position(|&byte| byte == 0).unwrap_or(rest.len())]
}

/// The operation whose `ENOENT` means that an entry is gone.
const OPEN: &str = "open";

fn attributes(stat: &Stat) -> Attributes {
    Attributes {
        // Nine bits fit; the others, setuid among them, do not travel.
        mode: u16::try_from(stat.st_mode & 0o777).unwrap_or_default(),
        seconds: stat.st_mtime,
        nanoseconds: u32::try_from(stat.st_mtime_nsec).unwrap_or_default(),
    }
}

/// File systems (by the magic numbers of `linux/magic.h`) whose files are windows into the kernel: they claim to be
/// empty or a page long, reading may wait for ever, and a copy of `/` would drown in them.
fn is_made_up_by_the_kernel(fd: &OwnedFd) -> bool {
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

/// The stream, written through a buffer of fixed size.
struct Output<'a> {
    writer: &'a mut dyn Write,
    buffer: Vec<u8>,
    /// How much of `buffer` waits to be written.
    used: usize,
    /// Holds a record on its way into `buffer`.
    record: Vec<u8>,
}

impl Output<'_> {
    fn record(&mut self, record: &Record, trail: &Trail) -> Result<(), Error> {
        self.record.clear();
        record.encode(&mut self.record).map_err(|limit| trail.limit(limit))?;
        self.reserve(self.record.len())?;
        let end = self.used + self.record.len();
        self.buffer[self.used..end].copy_from_slice(&self.record);
        self.used = end;
        Ok(())
    }

    /// Sends a file's data and end, and says how much data it was.
    fn contents(&mut self, fd: &OwnedFd, stat: &Stat, trail: &Trail) -> Result<u64, Error> {
        let mut size = u64::try_from(stat.st_size).unwrap_or_default();
        // Most files have no holes and need not be asked for them.
        let has_holes =
            u64::try_from(stat.st_blocks).unwrap_or_default().saturating_mul(512) < size;
        let (mut at, mut sent) = (0, 0);
        while at < size {
            let end;
            (at, end) = match if has_holes { next_data(fd, at, size) } else { Ok(Some((at, size))) }
            {
                Ok(Some(range)) => range,
                Ok(None) => {
                    // A hole to the end; but perhaps the end has come nearer.
                    let now = fstat(fd).map_err(trail.local("examine"))?.st_size;
                    size = size.min(u64::try_from(now).unwrap_or_default()).max(at);
                    break;
                }
                Err(errno) => return Err(trail.local("look for holes in")(errno)),
            };
            while at < end {
                let len = self.data(fd, at, end - at, trail)?;
                if len == 0 {
                    // It has shrunk.
                    size = at;
                    break;
                }
                at += len;
                sent += len;
            }
        }
        self.record(&Record::EndOfFile { size }, trail)?;
        Ok(sent)
    }

    /// Sends up to `max` bytes from `offset` on. None are left if it sends none.
    fn data(&mut self, fd: &OwnedFd, offset: u64, max: u64, trail: &Trail) -> Result<u64, Error> {
        let room = BUFFER - DATA_HEAD;
        let len = usize::try_from(max).unwrap_or(room).min(room);
        self.reserve(DATA_HEAD + len)?;
        // Read to where it is to be, and announced when it is known how much it is.
        let body = self.used + DATA_HEAD;
        let read = loop {
            match pread(fd, &mut self.buffer[body..body + len], offset) {
                Err(Errno::INTR) => {}
                result => break result.map_err(trail.local("read"))?,
            }
        };
        if let Some(len) = u32::try_from(read).ok().filter(|&len| len > 0) {
            self.record(&Record::Data { offset, len }, trail)?;
            self.used += read;
        }
        Ok(read as u64)
    }

    /// Makes room for `len` bytes, at most [`BUFFER`].
    fn reserve(&mut self, len: usize) -> Result<(), Error> {
        if BUFFER - self.used >= len {
            return Ok(());
        }
        let written = self.writer.write_all(&self.buffer[..self.used]);
        self.used = 0;
        written.map_err(Error::Stream)
    }

    fn flush(&mut self) -> Result<(), Error> {
        self.reserve(BUFFER)?;
        self.writer.flush().map_err(Error::Stream)
    }
}

/// The next range that is not a hole, or `None` if only a hole is left.
fn next_data(fd: &OwnedFd, at: u64, size: u64) -> Result<Option<(u64, u64)>, Errno> {
    let start = match seek(fd, SeekFrom::Data(at)) {
        Ok(start) => start.max(at),
        Err(Errno::NXIO) => return Ok(None),
        // This file system does not know its holes.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some((at, size))),
        Err(errno) => return Err(errno),
    };
    if start >= size {
        return Ok(None);
    }
    let end = seek(fd, SeekFrom::Hole(start))?.min(size);
    Ok(Some((start, if end > start { end } else { size })))
}
