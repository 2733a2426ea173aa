//! Credentials that the host handed over, kept until the host takes them back or the sandbox ends.
//!
//! A value for memory delivery lives in a memfd: no file on any disk, and reachable only for those who inherit the descriptor.
//! Its mode is 0444, so that a workload of any user can open it again through `/proc/self/fd` and none can write; the mode
//! lets nobody else in, because a memfd has no path. It is sealed against writing but for the mapping that is there before
//! the seal, through which the agent puts another value in its place, or none: also where it was inherited long ago.

use std::ffi::c_void;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;

use chitin_protocol::{Delivery, Failure, MAX_SECRET, Secret};
use rustix::fs::{FallocateFlags, MemfdFlags, Mode, SealFlags};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use zeroize::Zeroizing;

use crate::failure;

/// Each costs a descriptor in every process and up to 64 KiB: together at most 4 MiB.
const MAX_SECRETS: usize = 64;

/// Limit of the protocol.
const MAX_NAME: usize = 128;

/// Descriptors of memfds begin here: above what programs expect to get or shells use for themselves (bash: 255),
/// below the soft limit of 1024.
pub const FIRST_FD: i32 = 512;

enum Kept {
    Memory(Shared),
    /// `NAME=value`.
    Env(Zeroizing<Vec<u8>>),
}

/// All credentials of the sandbox.
#[derive(Default)]
pub struct Secrets {
    kept: Vec<(String, Kept)>,
    /// Whether there ever was one.
    held: bool,
}

impl Secrets {
    /// Keeps a credential, in place of a former one of the same name.
    pub fn insert(&mut self, secret: &Secret) -> Result<(), Failure> {
        let name = &secret.name;
        let fail = |operation, errno| failure(operation, name.as_bytes(), errno);
        if !is_name(name) {
            return Err(fail("name a credential", Errno::INVAL));
        }
        let value = secret.value.expose();
        if value.len() > MAX_SECRET {
            return Err(fail("keep credential", Errno::TOOBIG));
        }
        let at = self.kept.iter().position(|(other, _)| other == name);
        if at.is_none() && self.kept.len() >= MAX_SECRETS {
            return Err(fail("keep more than 64 credentials:", Errno::NOSPC));
        }
        self.held = true;
        let failed = |errno| fail("keep credential", errno);
        let mut former = at.and_then(|at| self.kept.get_mut(at)).map(|(_, kept)| kept);
        let kept = match (secret.delivery, &mut former) {
            (Delivery::Env, _) if value.contains(&0) => {
                return Err(fail("put into the environment a value with a NUL:", Errno::INVAL));
            }
            (Delivery::Env, _) => {
                // Sized at once: growing would leave copies behind.
                let mut entry = Zeroizing::new(Vec::with_capacity(name.len() + value.len() + 2));
                entry.extend_from_slice(name.as_bytes());
                entry.push(b'=');
                entry.extend_from_slice(value);
                Kept::Env(entry)
            }
            // Processes have inherited it.
            (Delivery::Memory, Some(Kept::Memory(shared))) => {
                return shared.set(value).map_err(failed);
            }
            (Delivery::Memory, _) => {
                let mut shared = Shared::new().map_err(failed)?;
                shared.set(value).map_err(failed)?;
                Kept::Memory(shared)
            }
        };
        match former {
            Some(former) => *former = kept,
            None => self.kept.push((name.clone(), kept)),
        }
        Ok(())
    }

    /// Takes a credential back, if there is one of that name.
    pub fn revoke(&mut self, name: &str) -> Result<(), Failure> {
        for (_, kept) in self.kept.iter_mut().filter(|(other, _)| other == name) {
            if let Kept::Memory(shared) = kept {
                shared
                    .clear()
                    .map_err(|errno| failure("empty credential", name.as_bytes(), errno))?;
            }
        }
        // A memfd that processes have inherited stays, for a later value.
        self.kept.retain(|(other, kept)| other != name || matches!(kept, Kept::Memory(_)));
        Ok(())
    }

    /// Whether there has been none: what was taken back may live on in what a process has made of it.
    pub fn has_held_none(&self) -> bool {
        !self.held
    }

    fn live(&self) -> impl Iterator<Item = (&str, &Kept)> {
        let live = |kept: &Kept| !matches!(kept, Kept::Memory(shared) if !shared.live);
        self.kept
            .iter()
            .filter(move |(_, kept)| live(kept))
            .map(|(name, kept)| (name.as_str(), kept))
    }

    /// The memfds, to be inherited at the numbers they have.
    pub fn memfds(&self) -> impl Iterator<Item = &OwnedFd> {
        self.live().filter_map(|(_, kept)| match kept {
            Kept::Memory(shared) => Some(&shared.memfd),
            Kept::Env(_) => None,
        })
    }

    /// Environment entries `NAME=value` of a workload. Each caller's copy is wiped.
    pub fn environment(&self) -> impl Iterator<Item = Zeroizing<Vec<u8>>> {
        self.live().map(|(name, kept)| match kept {
            Kept::Memory(shared) => {
                let number = shared.memfd.as_raw_fd();
                Zeroizing::new(format!("{name}_FILE=/proc/self/fd/{number}").into_bytes())
            }
            Kept::Env(entry) => {
                let mut copy = Zeroizing::new(Vec::with_capacity(entry.len() + 1));
                copy.extend_from_slice(entry);
                copy
            }
        })
    }

    /// Whether the environment variable `name` is one of those that [`environment`](Self::environment) sets.
    pub fn sets(&self, name: &[u8]) -> bool {
        self.live().any(|(own, kept)| match kept {
            Kept::Memory(_) => name.strip_suffix(b"_FILE") == Some(own.as_bytes()),
            Kept::Env(_) => name == own.as_bytes(),
        })
    }
}

fn is_name(name: &str) -> bool {
    name.len() <= MAX_NAME
        && name.bytes().all(|byte| byte == b'_' || byte.is_ascii_alphanumeric())
        && name.bytes().next().is_some_and(|byte| !byte.is_ascii_digit())
}

/// A value in memory that processes inherit and cannot change.
struct Shared {
    memfd: OwnedFd,
    /// Its first [`MAX_SECRET`] bytes, writable. What is behind its end must not be touched.
    mapped: NonNull<u8>,
    len: usize,
    /// Whether there is one.
    live: bool,
}

impl Shared {
    fn new() -> Result<Shared, Errno> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        // Kernels before 6.3 do not know NOEXEC_SEAL.
        let memfd = match rustix::fs::memfd_create("credential", flags | MemfdFlags::NOEXEC_SEAL) {
            Err(Errno::INVAL) => rustix::fs::memfd_create("credential", flags),
            other => other,
        }?;
        rustix::fs::fchmod(&memfd, Mode::from_raw_mode(0o444))?;
        let memfd = rustix::io::fcntl_dupfd_cloexec(&memfd, FIRST_FD)?;
        let (access, shared) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: the kernel chooses where, so that it is nobody else's memory. Whoever has inherited the memfd may read
        // what is written here, and only this value writes.
        let mapped = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), MAX_SECRET, access, shared, &memfd, 0)
        }?;
        let mapped = NonNull::new(mapped.cast()).ok_or(Errno::NOMEM)?;
        let this = Shared { memfd, mapped, len: 0, live: false };
        // A child needs it as little as what it executes. Where that is not known, it is gone with the exec.
        // SAFETY: of the child's memory only, and it is this mapping.
        let _ = unsafe { rustix::mm::madvise(this.address(), MAX_SECRET, Advice::LinuxDontFork) };
        match rustix::fs::fcntl_add_seals(&this.memfd, SealFlags::FUTURE_WRITE | SealFlags::SEAL) {
            // gVisor, and Linux before 5.1: there it is the owner and the mode that keep the workload from writing.
            Ok(()) | Err(Errno::INVAL) => Ok(this),
            Err(errno) => Err(errno),
        }
    }

    fn address(&self) -> *mut c_void {
        self.mapped.as_ptr().cast()
    }

    /// Puts this value, of at most [`MAX_SECRET`] bytes, in place of the former. Who reads meanwhile may see some of both.
    fn set(&mut self, value: &[u8]) -> Result<(), Errno> {
        if value.len() > self.len {
            // Allocated here, where running out of memory is an error and no SIGBUS.
            match rustix::fs::fallocate(&self.memfd, FallocateFlags::empty(), 0, value.len() as u64)
            {
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                    rustix::fs::ftruncate(&self.memfd, value.len() as u64)?;
                }
                allocated => allocated?,
            }
        }
        // SAFETY: `value` is no part of the mapping, which is as long as any value, and the memfd at least as long as this.
        unsafe { std::ptr::copy_nonoverlapping(value.as_ptr(), self.mapped.as_ptr(), value.len()) };
        self.shorten(value.len())?;
        self.live = true;
        Ok(())
    }

    fn clear(&mut self) -> Result<(), Errno> {
        self.live = false;
        self.shorten(0)
    }

    /// Overwrites what is behind these first bytes before it is cut off: freed pages are not cleared.
    fn shorten(&mut self, len: usize) -> Result<(), Errno> {
        if let Some(rest) = self.len.checked_sub(len).filter(|rest| *rest > 0) {
            // SAFETY: the memfd is `self.len` bytes long, and the mapping longer.
            unsafe { std::ptr::write_bytes(self.mapped.as_ptr().add(len), 0, rest) };
            rustix::fs::ftruncate(&self.memfd, len as u64)?;
        }
        self.len = len;
        Ok(())
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let _ = self.clear();
        // SAFETY: it was mapped with this length, and nobody keeps a reference into it.
        let _ = unsafe { rustix::mm::munmap(self.address(), MAX_SECRET) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use chitin_protocol::SecretBytes;

    fn secret(name: &str, value: &[u8], delivery: Delivery) -> Secret {
        Secret { request: 1, name: name.into(), value: SecretBytes::new(value.to_vec()), delivery }
    }

    fn environment(secrets: &Secrets) -> Vec<String> {
        secrets.environment().map(|entry| String::from_utf8(entry.to_vec()).unwrap()).collect()
    }

    #[test]
    fn names_are_those_of_environment_variables() {
        for good in ["A", "_", "API_TOKEN", "a1", &"x".repeat(MAX_NAME)] {
            assert!(is_name(good), "{good}");
        }
        for bad in ["", "1A", "A-B", "A=B", "A B", "Ä", "A\0", &"x".repeat(MAX_NAME + 1)] {
            assert!(!is_name(bad), "{bad}");
        }
    }

    #[test]
    fn a_later_value_replaces_an_earlier_one_and_the_number_is_bounded() {
        let mut secrets = Secrets::default();
        secrets.insert(&secret("A", b"1", Delivery::Env)).unwrap();
        secrets.insert(&secret("A", b"2", Delivery::Env)).unwrap();
        assert_eq!(environment(&secrets), ["A=2"]);
        assert!(secrets.sets(b"A") && !secrets.sets(b"A_FILE"));

        secrets.insert(&secret("A", b"3", Delivery::Memory)).unwrap();
        let fd = secrets.memfds().next().unwrap().as_raw_fd();
        assert!(fd >= FIRST_FD);
        assert_eq!(environment(&secrets), [format!("A_FILE=/proc/self/fd/{fd}")]);
        assert!(!secrets.sets(b"A") && secrets.sets(b"A_FILE"));

        for number in 1..MAX_SECRETS {
            secrets.insert(&secret(&format!("N{number}"), b"", Delivery::Env)).unwrap();
        }
        assert!(secrets.insert(&secret("ONE_MORE", b"", Delivery::Env)).is_err());
        assert!(secrets.insert(&secret("A", b"4", Delivery::Env)).is_ok());
    }

    #[test]
    fn what_cannot_be_delivered_is_refused() {
        let mut secrets = Secrets::default();
        assert!(secrets.insert(&secret("A", b"a\0b", Delivery::Env)).is_err());
        assert!(secrets.insert(&secret("A", b"a\0b", Delivery::Memory)).is_ok());
        assert!(secrets.insert(&secret("B", &[0; MAX_SECRET + 1], Delivery::Memory)).is_err());
        assert!(secrets.insert(&secret("B", &[1; MAX_SECRET], Delivery::Memory)).is_ok());
    }

    #[test]
    fn who_has_inherited_a_value_sees_it_replaced_and_taken_back_and_cannot_change_it() {
        use std::os::unix::fs::FileExt;

        let mut secrets = Secrets::default();
        assert!(secrets.has_held_none());
        secrets.insert(&secret("A", b"the first value", Delivery::Memory)).unwrap();
        let memfd = secrets.memfds().next().unwrap();
        // As a child opens it.
        let path = format!("/proc/self/fd/{}", memfd.as_raw_fd());
        let inherited = std::fs::File::open(&path).unwrap();
        let seen = || {
            let mut bytes = [0; 100];
            let count = inherited.read_at(&mut bytes, 0).unwrap();
            String::from_utf8(bytes[..count].to_vec()).unwrap()
        };
        assert_eq!(rustix::io::write(memfd, b"x"), Err(Errno::PERM));
        assert_eq!(rustix::fs::fcntl_add_seals(memfd, SealFlags::WRITE), Err(Errno::PERM));
        // SAFETY: of no consequence to anybody: it is refused.
        let mapped = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), 1, ProtFlags::WRITE, MapFlags::SHARED, memfd, 0)
        };
        assert_eq!(mapped, Err(Errno::PERM));
        assert_eq!(seen(), "the first value");

        for next in ["short", "", "one that is longer than the first value was"] {
            secrets.insert(&secret("A", next.as_bytes(), Delivery::Memory)).unwrap();
            assert_eq!(seen(), next);
        }
        secrets.revoke("B").unwrap();
        secrets.revoke("A").unwrap();
        assert_eq!(seen(), "");
        assert!(
            environment(&secrets).is_empty()
                && secrets.memfds().next().is_none()
                && !secrets.sets(b"A_FILE")
        );
        assert!(!secrets.has_held_none());
        // What was cut off is not there any more, also where it is grown again.
        secrets.insert(&secret("A", b"\0", Delivery::Memory)).unwrap();
        rustix::fs::ftruncate(secrets.memfds().next().unwrap(), 50).unwrap();
        assert_eq!(seen(), "\0".repeat(50));
        secrets.insert(&secret("A", b"again", Delivery::Memory)).unwrap();
        assert_eq!(
            secrets.memfds().next().unwrap().as_raw_fd().to_string(),
            path.rsplit('/').next().unwrap()
        );
        assert!(seen().starts_with("again"));

        secrets.insert(&secret("E", b"1", Delivery::Env)).unwrap();
        secrets.revoke("E").unwrap();
        assert!(!secrets.sets(b"E") && secrets.sets(b"A_FILE"));
        // In another way, or with the agent: nobody has it any more.
        secrets.insert(&secret("A", b"1", Delivery::Env)).unwrap();
        assert_eq!(seen(), "");
    }
}
