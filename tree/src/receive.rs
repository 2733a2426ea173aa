use std::ffi::OsStr;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{
    AtFlags, Gid, Mode, OFlags, Timespec, Timestamps, UTIME_OMIT, Uid, chownat, fchmod, fstat,
    ftruncate, futimens, mkdirat, openat, renameat, statat, symlinkat, unlinkat,
};
use rustix::io::{Errno, pwrite};

use crate::current_path::Trail;
use crate::error::Shown;
use crate::link_target::escapes;
use crate::location::{OPEN_DIRECTORY, PASS, Place, kind, own};
use crate::record::{Attributes, Broken, Input, Record};
use crate::{Breach, Error, Kind, Limit, Links, MAX_EXAMPLES, ReceiveOptions, Refusal, Summary};

/// Builds the tree that `reader` carries, with `dest` as its root.
///
/// The directory `dest` is in must exist. A directory that is there already is merged into and keeps its mode,
/// owner and time: what comes out of a sandbox does not change who may enter a user's directory. A file or link
/// that is there is replaced by a file or link, in one step and only by a complete one; nothing is ever written
/// into an existing file, and nothing else is replaced. Directories get their mode when they are complete.
///
/// Reading stops after the tree's last record, except that up to 128 KiB behind it may have been taken already.
/// Nothing is synced to disk.
///
/// # Errors
/// What had been received stays, except for the file that was being written. [`Error::is_broken_stream`] tells
/// whether the other side is to be asked for the reason.
pub fn receive(
    mut reader: impl Read,
    dest: impl AsRef<Path>,
    options: &ReceiveOptions,
) -> Result<Summary, Error> {
    let dest = dest.as_ref();
    let mut receiver = Receiver {
        input: Input::new(&mut reader),
        options,
        trail: Trail::new(dest),
        levels: Vec::new(),
        entries: 0,
        bytes: 0,
        summary: Summary::default(),
    };
    let place = Place::find(dest, options.lookup, &receiver.trail)?;
    let result = receiver.run(&place);
    // Only after a failure are any left. What is there is to be no harder to reach than it would have been.
    while let Some(level) = receiver.levels.pop() {
        let _ = level.complete(options.owner);
    }
    result?;
    Ok(receiver.summary)
}

struct Receiver<'a> {
    input: Input<'a>,
    options: &'a ReceiveOptions,
    trail: Trail,
    /// The directories that are open, outermost first.
    levels: Vec<Level>,
    /// Entries so far.
    entries: u64,
    /// Bytes of all complete files, holes included.
    bytes: u64,
    summary: Summary,
}

/// A directory that is being filled.
struct Level {
    fd: OwnedFd,
    /// What it gets when it is full; `None` if it was there before.
    new: Option<Attributes>,
    /// The last name in it.
    last: Vec<u8>,
}

impl Level {
    fn complete(&self, owner: Option<(u32, u32)>) -> Result<(), Errno> {
        self.new.map_or(Ok(()), |attributes| apply(&self.fd, attributes, owner))
    }
}

/// The owner first: with the mode, it might lock this process out.
fn apply(fd: &OwnedFd, attributes: Attributes, owner: Option<(u32, u32)>) -> Result<(), Errno> {
    own(fd, owner)?;
    fchmod(fd, Mode::from_raw_mode(attributes.mode.into()))?;
    let changed = Timespec { tv_sec: attributes.seconds, tv_nsec: attributes.nanoseconds.into() };
    let omit = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
    futimens(fd, &Timestamps { last_access: omit, last_modification: changed })
}

impl Receiver<'_> {
    fn run(&mut self, place: &Place) -> Result<(), Error> {
        let root = self.record()?;
        self.entry(place, root)?;
        while !self.levels.is_empty() {
            let record = self.record()?;
            if record == Record::EndOfDirectory {
                self.end_of_directory()?;
            } else {
                self.entry(place, record)?;
            }
        }
        Ok(())
    }

    fn record(&mut self) -> Result<Record, Error> {
        self.input.record().map_err(|broken| breakdown(broken, &self.trail))
    }

    fn entry(&mut self, place: &Place, record: Record) -> Result<(), Error> {
        match record {
            Record::Directory { name, attributes } => {
                self.name(&name)?;
                self.directory(place, attributes)
            }
            Record::File { name, attributes } => {
                self.name(&name)?;
                self.file(place, attributes)
            }
            Record::Symlink { name, target } => {
                self.name(&name)?;
                self.symlink(place, &target)
            }
            Record::Data { .. } | Record::EndOfFile { .. } | Record::EndOfDirectory => {
                Err(self.trail.malformed(Breach::Misplaced(record.kind())))
            }
        }
    }

    /// Checks an entry's name and its place in the order, and turns to it.
    fn name(&mut self, name: &[u8]) -> Result<(), Error> {
        self.entries += 1;
        if self.entries > self.options.max_entries {
            return Err(self.trail.limit(Limit::Entries(self.options.max_entries)));
        }
        let Some(level) = self.levels.last_mut() else {
            return if name.is_empty() {
                Ok(())
            } else {
                Err(self.trail.malformed(Breach::BadName))
            };
        };
        if matches!(name, b"" | b"." | b"..") || name.iter().any(|byte| matches!(byte, 0 | b'/')) {
            self.trail.turn_to(None)?;
            return Err(self.trail.malformed(Breach::BadName));
        }
        self.trail.turn_to(Some(name))?;
        if name <= level.last.as_slice() {
            return Err(self.trail.malformed(Breach::Unsorted));
        }
        level.last.clear();
        level.last.extend_from_slice(name);
        Ok(())
    }

    fn directory(&mut self, place: &Place, attributes: Attributes) -> Result<(), Error> {
        let way = Way::new(&self.levels, place, &self.trail);
        let level = match mkdirat(way.dir, way.name, Mode::RWXU) {
            Ok(()) => {
                let made = openat(way.dir, way.name, OPEN_DIRECTORY, Mode::empty());
                let fd = made.map_err(self.trail.local("open"))?;
                Level { fd, new: Some(attributes), last: Vec::new() }
            }
            Err(Errno::EXIST) => {
                way.check(Kind::Directory)?;
                let there = openat(way.dir, way.name, PASS | OFlags::NOFOLLOW, Mode::empty());
                let fd = there.map_err(self.trail.local("open"))?;
                Level { fd, new: None, last: Vec::new() }
            }
            Err(errno) => return Err(self.trail.local("create")(errno)),
        };
        self.trail.enter()?;
        self.levels.push(level);
        self.summary.directories += 1;
        Ok(())
    }

    fn end_of_directory(&mut self) -> Result<(), Error> {
        self.trail.leave();
        let Some(level) = self.levels.pop() else { return Ok(()) };
        level.complete(self.options.owner).map_err(self.trail.local("set owner, mode and time of"))
    }

    fn file(&mut self, place: &Place, attributes: Attributes) -> Result<(), Error> {
        let way = Way::new(&self.levels, place, &self.trail);
        way.check(Kind::File)?;
        let new =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let (temporary, fd) =
            Temporary::make(way.dir, |name| openat(way.dir, name, new, Mode::RUSR | Mode::WUSR))
                .map_err(self.trail.local("create"))?;
        let space = Space { used: self.bytes, max: self.options.max_bytes };
        let contents = contents(&mut self.input, &fd, &space, &self.trail)?;
        apply(&fd, attributes, self.options.owner)
            .map_err(self.trail.local("set owner, mode and time of"))?;
        way.replace(temporary, Kind::File)?;
        self.bytes += contents.size;
        self.summary.bytes += contents.data;
        self.summary.files += 1;
        Ok(())
    }

    fn symlink(&mut self, place: &Place, target: &[u8]) -> Result<(), Error> {
        // The root itself is in no directory of the tree, and neither is what a link in its place points to.
        let depth = self.levels.len().checked_sub(1);
        if self.options.links == Links::RefuseEscaping
            && depth.is_none_or(|depth| escapes(depth, target))
        {
            self.summary.refused += 1;
            if self.summary.refused_examples.len() < MAX_EXAMPLES {
                let (path, target) = (self.trail.path(), Path::new(OsStr::from_bytes(target)));
                self.summary.refused_examples.push(format!(
                    "{} -> {}",
                    Shown(&path),
                    Shown(target)
                ));
            }
            return Ok(());
        }
        let way = Way::new(&self.levels, place, &self.trail);
        way.check(Kind::Symlink)?;
        let (temporary, ()) = Temporary::make(way.dir, |name| symlinkat(target, way.dir, name))
            .map_err(self.trail.local("create"))?;
        own_link(way.dir, &temporary.name, self.options.owner)
            .map_err(self.trail.local("set the owner of"))?;
        way.replace(temporary, Kind::Symlink)?;
        self.summary.links += 1;
        Ok(())
    }
}

/// Where an entry is to be: a directory, and a name in it.
struct Way<'a> {
    dir: BorrowedFd<'a>,
    name: &'a [u8],
    /// Whether something may be there already.
    shared: bool,
    trail: &'a Trail,
}

impl<'a> Way<'a> {
    /// To the entry that was turned to.
    fn new(levels: &'a [Level], place: &'a Place, trail: &'a Trail) -> Way<'a> {
        match levels.last() {
            Some(level) => {
                Way { dir: level.fd.as_fd(), name: &level.last, shared: level.new.is_none(), trail }
            }
            None => Way { dir: place.dir.as_fd(), name: &place.name, shared: true, trail },
        }
    }

    /// Finds what is in the way before any work is done. A later change is caught by the kernel.
    fn check(&self, comes: Kind) -> Result<(), Error> {
        if !self.shared && comes != Kind::Directory {
            return Ok(());
        }
        let there = match statat(self.dir, self.name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => kind(stat.st_mode),
            Err(Errno::NOENT) => return Ok(()),
            Err(errno) => return Err(self.trail.local("examine")(errno)),
        };
        match (there, comes) {
            (Kind::Directory, Kind::Directory) => Ok(()),
            (Kind::File | Kind::Symlink, Kind::File | Kind::Symlink) => Ok(()),
            _ => Err(self.trail.refused(Refusal::InTheWay { there, comes })),
        }
    }

    /// Gives the complete file or link its name.
    fn replace(&self, temporary: Temporary<'_>, comes: Kind) -> Result<(), Error> {
        match renameat(self.dir, &temporary.name, self.dir, self.name) {
            Ok(()) => {
                temporary.keep();
                Ok(())
            }
            Err(Errno::ISDIR) => {
                Err(self.trail.refused(Refusal::InTheWay { there: Kind::Directory, comes }))
            }
            Err(errno) => Err(self.trail.local("create")(errno)),
        }
    }
}

/// A file or link that is not complete: gone when this is dropped.
struct Temporary<'a> {
    dir: BorrowedFd<'a>,
    name: String,
}

impl<'a> Temporary<'a> {
    /// Calls `make` with names until one is free.
    fn make<T>(
        dir: BorrowedFd<'a>,
        make: impl Fn(&str) -> Result<T, Errno>,
    ) -> Result<(Temporary<'a>, T), Errno> {
        /// Unique in this process; others have another process id, or another namespace for them.
        static NEXT: AtomicU64 = AtomicU64::new(0);
        /// Taken names are left over from a killed process, or somebody's who wants the copy to fail.
        const ATTEMPTS: usize = 100;
        for _ in 0..ATTEMPTS {
            let name =
                format!(".chitin-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
            match make(&name) {
                Err(Errno::EXIST) => {}
                Err(errno) => return Err(errno),
                Ok(made) => return Ok((Temporary { dir, name }, made)),
            }
        }
        Err(Errno::EXIST)
    }

    /// It has another name now.
    fn keep(mut self) {
        self.name.clear();
    }
}

impl Drop for Temporary<'_> {
    fn drop(&mut self) {
        if !self.name.is_empty() {
            let _ = unlinkat(self.dir, &self.name, AtFlags::empty());
        }
    }
}

/// By descriptor and only if it is a link: whoever can write to the directory may have put something else there,
/// and by name that would be given away.
fn own_link(dir: BorrowedFd<'_>, name: &str, owner: Option<(u32, u32)>) -> Result<(), Errno> {
    let Some((uid, gid)) = owner else { return Ok(()) };
    let link = openat(dir, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    if kind(fstat(&link)?.st_mode) != Kind::Symlink {
        return Ok(());
    }
    match chownat(
        &link,
        "",
        Some(Uid::from_raw(uid)),
        Some(Gid::from_raw(gid)),
        AtFlags::EMPTY_PATH,
    ) {
        // gVisor owns nothing by the descriptor of a path alone. Whose a link is says nothing of where it leads.
        Err(Errno::BADF) => Ok(()),
        owned => owned,
    }
}

/// How large files may be, all together.
struct Space {
    /// Taken by complete files.
    used: u64,
    max: u64,
}

impl Space {
    /// Whether one more file of this size has room; it must be one that a Linux file can have.
    fn check(&self, size: Option<u64>, trail: &Trail) -> Result<u64, Error> {
        let size = size.filter(|&size| i64::try_from(size).is_ok());
        let size = size.ok_or_else(|| trail.malformed(Breach::BadData))?;
        if self.used.saturating_add(size) > self.max {
            return Err(trail.limit(Limit::Bytes(self.max)));
        }
        Ok(size)
    }
}

struct Contents {
    /// Holes included.
    size: u64,
    data: u64,
}

/// Takes a file's data and end.
fn contents(
    input: &mut Input<'_>,
    fd: &OwnedFd,
    space: &Space,
    trail: &Trail,
) -> Result<Contents, Error> {
    let mut contents = Contents { size: 0, data: 0 };
    loop {
        match input.record().map_err(|broken| breakdown(broken, trail))? {
            Record::Data { offset, len } if len > 0 && offset >= contents.size => {
                let end = space.check(offset.checked_add(len.into()), trail)?;
                write(input, fd, offset, end, trail)?;
                contents.size = end;
                contents.data += u64::from(len);
            }
            Record::EndOfFile { size } if size >= contents.size => {
                space.check(Some(size), trail)?;
                if size > contents.size {
                    ftruncate(fd, size).map_err(trail.local("set the size of"))?;
                    contents.size = size;
                }
                return Ok(contents);
            }
            Record::Data { .. } | Record::EndOfFile { .. } => {
                return Err(trail.malformed(Breach::BadData));
            }
            other => return Err(trail.malformed(Breach::Misplaced(other.kind()))),
        }
    }
}

/// Takes the bytes from `offset` to `end`, as they come.
fn write(
    input: &mut Input<'_>,
    fd: &OwnedFd,
    mut offset: u64,
    end: u64,
    trail: &Trail,
) -> Result<(), Error> {
    while offset < end {
        let max = usize::try_from(end - offset).unwrap_or(usize::MAX);
        let mut bytes = input.some(max).map_err(|broken| breakdown(broken, trail))?;
        while !bytes.is_empty() {
            match pwrite(fd, bytes, offset) {
                Ok(0) => return Err(trail.local("write")(Errno::IO)),
                Ok(len) => {
                    bytes = &bytes[len..];
                    offset += len as u64;
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(trail.local("write")(errno)),
            }
        }
    }
    Ok(())
}

fn breakdown(broken: Broken, trail: &Trail) -> Error {
    match broken {
        Broken::Breach(breach) => trail.malformed(breach),
        Broken::EndedEarly => Error::EndedEarly { path: trail.path() },
        Broken::Stream(error) => Error::Stream(error),
    }
}
