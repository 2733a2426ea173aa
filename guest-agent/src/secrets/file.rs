//! Credentials in files of a tmpfs, which every process of the workload opens by path and none can
//! change.
//!
//! A tmpfs is memory: no guest and no container of Chitin has swap. Files and directory belong to
//! the agent's user, so that a workload can neither write nor rename nor remove them, nor change a
//! mode. All other processes of a sandbox are the workload, hence the mode 0444. A value is
//! replaced and removed in place, also for a process that has the file open or mapped.

use std::os::fd::{AsFd, OwnedFd};

use chitin_protocol::{Failure, MAX_SECRET};
use rustix::fs::{AtFlags, FallocateFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::MountFlags;

use super::MAX_SECRETS;
use crate::error::make_failure;

/// The directory of the files.
pub const DIRECTORY: &str = "/run/credentials";

/// `TMPFS_MAGIC` of `linux/magic.h`.
const TMPFS: i64 = 0x0102_1994;

/// The directory of the files, which is opened when the first one is needed.
#[derive(Default)]
pub struct CredentialDirectory {
    /// The agent mounts the tmpfs. Otherwise the container's runtime has.
    mount_first: bool,
    opened: Option<OwnedFd>,
}

impl CredentialDirectory {
    /// Returns the directory of this sandbox. With `mount_first`, its tmpfs is mounted when it is
    /// needed: a sandbox without credentials does without the mount.
    pub fn new(mount_first: bool) -> CredentialDirectory {
        CredentialDirectory { mount_first, opened: None }
    }

    /// Mounts the tmpfs if that is the agent's task, and opens the directory.
    pub fn open(&mut self) -> Result<&OwnedFd, Failure> {
        let opened = match self.opened.take() {
            Some(opened) => opened,
            None => self.prepare()?,
        };
        Ok(self.opened.insert(opened))
    }

    fn prepare(&mut self) -> Result<OwnedFd, Failure> {
        let failed = |operation| move |errno| make_failure(operation, DIRECTORY.as_bytes(), errno);
        if self.mount_first {
            mount_tmpfs().map_err(failed("mount a tmpfs on"))?;
            self.mount_first = false;
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = rustix::fs::open(DIRECTORY, flags, Mode::empty()).map_err(failed("open"))?;
        let found = rustix::fs::fstatfs(&opened).map_err(failed("look at"))?;
        // Any other file system may be on a disk.
        if found.f_type != TMPFS {
            return Err(failed("keep credentials outside of a tmpfs, in")(Errno::NOTSUP));
        }
        Ok(opened)
    }

    /// Uses another directory, of any file system.
    #[cfg(test)]
    pub fn at(directory: OwnedFd) -> CredentialDirectory {
        CredentialDirectory { mount_first: false, opened: Some(directory) }
    }
}

fn mount_tmpfs() -> Result<(), Errno> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    // One inode is the directory's.
    let options =
        format!("mode=0755,size={},nr_inodes={}", MAX_SECRETS * MAX_SECRET, MAX_SECRETS + 1);
    let options = std::ffi::CString::new(options).map_err(|_| Errno::INVAL)?;
    rustix::mount::mount("tmpfs", DIRECTORY, "tmpfs", flags, Some(options.as_c_str()))
}

/// A credential in its file.
pub struct SecretFile {
    file: OwnedFd,
    /// Bytes of the file that may hold a value.
    len: usize,
    /// A revoked value has been cleared, and its file waits for another one.
    is_set: bool,
}

impl SecretFile {
    /// Creates the file of a credential with this name.
    pub fn create(directory: impl AsFd, name: &str, value: &[u8]) -> Result<SecretFile, Errno> {
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(0o444);
        let file = rustix::fs::openat(&directory, name, flags, mode)?;
        rustix::fs::fchmod(&file, mode)?;
        let mut secret = SecretFile { file, len: 0, is_set: false };
        if let Err(errno) = secret.set(value) {
            remove_file(directory, name)?;
            return Err(errno);
        }
        Ok(secret)
    }

    pub fn is_set(&self) -> bool {
        self.is_set
    }

    /// Replaces the value by another one of at most [`MAX_SECRET`] bytes. A process that reads in
    /// the meantime may see parts of both.
    pub fn set(&mut self, value: &[u8]) -> Result<(), Errno> {
        if value.len() > self.len {
            // Allocated first, so that a lack of memory leaves the former value complete.
            let length = value.len() as u64;
            match rustix::fs::fallocate(&self.file, FallocateFlags::empty(), 0, length) {
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
                allocated => allocated?,
            }
            self.len = value.len();
        }
        write_at(&self.file, value, 0)?;
        self.shorten(value.len())?;
        self.is_set = true;
        Ok(())
    }

    /// Zeroes and removes the value.
    pub fn clear(&mut self) -> Result<(), Errno> {
        self.is_set = false;
        self.shorten(0)
    }

    /// Zeroes the bytes after the first `len` before it cuts them off, because the kernel does not
    /// clear freed pages.
    fn shorten(&mut self, len: usize) -> Result<(), Errno> {
        const ZEROES: [u8; 4096] = [0; 4096];
        while self.len > len {
            let count = (self.len - len).min(ZEROES.len());
            write_at(&self.file, &ZEROES[..count], self.len - count)?;
            self.len -= count;
        }
        rustix::fs::ftruncate(&self.file, len as u64)
    }
}

impl Drop for SecretFile {
    fn drop(&mut self) {
        let _ = self.clear();
    }
}

/// Removes the file of a credential that is delivered in another form.
pub fn remove_file(directory: impl AsFd, name: &str) -> Result<(), Errno> {
    rustix::fs::unlinkat(directory, name, AtFlags::empty())
}

fn write_at(file: &OwnedFd, mut bytes: &[u8], mut offset: usize) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::pwrite(file, bytes, offset as u64) {
            Ok(0) => return Err(Errno::IO),
            Ok(count) => {
                bytes = &bytes[count..];
                offset += count;
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}
