//! A credential in a memfd, which processes inherit and cannot change.
//!
//! It is in no file on any disk, and only processes that inherit the descriptor reach it. Its mode
//! is 0444, so that a workload of any user can open it again through `/proc/self/fd`, and none can
//! write it. The mode admits no other process, because a memfd has no path. It is sealed against
//! writing, except through the mapping that precedes the seal. Through that mapping the agent
//! replaces or removes the value, even in processes that have inherited it long ago.

use std::ffi::c_void;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;

use chitin_protocol::MAX_SECRET;
use rustix::fs::{FallocateFlags, MemfdFlags, Mode, SealFlags};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

/// The lowest descriptor of a memfd: above those that programs expect or that shells use themselves
/// (bash: 255), below the soft limit of 1024.
pub const FIRST_FD: i32 = 512;

pub struct SecretMemfd {
    memfd: OwnedFd,
    /// The first [`MAX_SECRET`] bytes of the memfd, writable. Memory after the memfd's end must not
    /// be accessed.
    mapping: NonNull<u8>,
    len: usize,
    /// A revoked value has been cleared, and its memfd waits for another one.
    is_set: bool,
}

impl SecretMemfd {
    pub fn new(value: &[u8]) -> Result<SecretMemfd, Errno> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        // Kernels before 6.3 do not know NOEXEC_SEAL.
        let memfd = match rustix::fs::memfd_create("credential", flags | MemfdFlags::NOEXEC_SEAL) {
            Err(Errno::INVAL) => rustix::fs::memfd_create("credential", flags),
            other => other,
        }?;
        rustix::fs::fchmod(&memfd, Mode::from_raw_mode(0o444))?;
        let memfd = rustix::io::fcntl_dupfd_cloexec(&memfd, FIRST_FD)?;
        let (access, shared) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: with a null address the kernel chooses memory that is not in use. Processes that
        // inherit the memfd may read the mapping at any time, and only this value writes it.
        let mapping = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), MAX_SECRET, access, shared, &memfd, 0)
        }?;
        let mapping = NonNull::new(mapping.cast()).ok_or(Errno::NOMEM)?;
        let mut secret = SecretMemfd { memfd, mapping, len: 0, is_set: false };
        // A child does not need the mapping. Where the kernel does not know this advice, the
        // mapping ends with the exec.
        // SAFETY: the range is this mapping, which the agent keeps. Only children do without it,
        // and they do not access it.
        let _ = unsafe { rustix::mm::madvise(secret.address(), MAX_SECRET, Advice::LinuxDontFork) };
        match rustix::fs::fcntl_add_seals(&secret.memfd, SealFlags::FUTURE_WRITE | SealFlags::SEAL)
        {
            // gVisor, and Linux before 5.1: there owner and mode keep the workload from writing.
            Ok(()) | Err(Errno::INVAL) => {}
            Err(errno) => return Err(errno),
        }
        secret.set(value)?;
        Ok(secret)
    }

    pub fn fd(&self) -> &OwnedFd {
        &self.memfd
    }

    pub fn is_set(&self) -> bool {
        self.is_set
    }

    fn address(&self) -> *mut c_void {
        self.mapping.as_ptr().cast()
    }

    /// Replaces the value by another one of at most [`MAX_SECRET`] bytes. A process that reads in
    /// the meantime may see parts of both.
    pub fn set(&mut self, value: &[u8]) -> Result<(), Errno> {
        if value.len() > self.len {
            // Allocated here, where a lack of memory is an error and not a SIGBUS.
            match rustix::fs::fallocate(&self.memfd, FallocateFlags::empty(), 0, value.len() as u64)
            {
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                    rustix::fs::ftruncate(&self.memfd, value.len() as u64)?;
                }
                allocated => allocated?,
            }
        }
        // SAFETY: `value` is not part of the mapping. The mapping has MAX_SECRET bytes, which
        // bounds every value, and the memfd has at least as many bytes as this value.
        unsafe {
            std::ptr::copy_nonoverlapping(value.as_ptr(), self.mapping.as_ptr(), value.len())
        };
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
        if let Some(rest) = self.len.checked_sub(len).filter(|rest| *rest > 0) {
            // SAFETY: the memfd has `self.len` bytes, and the mapping has more.
            unsafe { std::ptr::write_bytes(self.mapping.as_ptr().add(len), 0, rest) };
            rustix::fs::ftruncate(&self.memfd, len as u64)?;
        }
        self.len = len;
        Ok(())
    }
}

impl Drop for SecretMemfd {
    fn drop(&mut self) {
        let _ = self.clear();
        // SAFETY: the range was mapped with this length, and no reference into it exists.
        let _ = unsafe { rustix::mm::munmap(self.address(), MAX_SECRET) };
    }
}
