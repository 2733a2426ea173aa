//! Credentials that the host handed over, kept until the sandbox ends.
//!
//! A value for memory delivery lives in a sealed memfd: no file on any disk, unchangeable, and reachable only for
//! those who inherit the descriptor. Its mode is 0444, so that a workload of any user can open it again through
//! `/proc/self/fd` and none can write; the mode lets nobody else in, because a memfd has no path.

use std::os::fd::{AsRawFd, OwnedFd};

use chitin_protocol::{Delivery, Failure, MAX_SECRET, Secret};
use rustix::fs::{MemfdFlags, Mode, SealFlags};
use rustix::io::Errno;
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
    Memory(OwnedFd),
    /// `NAME=value`.
    Env(Zeroizing<Vec<u8>>),
}

/// All credentials of the sandbox.
#[derive(Default)]
pub struct Secrets {
    kept: Vec<(String, Kept)>,
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
        let kept = match secret.delivery {
            Delivery::Memory => Kept::Memory(seal(value).map_err(|errno| fail("keep credential", errno))?),
            Delivery::Env if value.contains(&0) => {
                return Err(fail("put into the environment a value with a NUL:", Errno::INVAL));
            }
            Delivery::Env => {
                // Sized at once: growing would leave copies behind.
                let mut entry = Zeroizing::new(Vec::with_capacity(name.len() + value.len() + 2));
                entry.extend_from_slice(name.as_bytes());
                entry.push(b'=');
                entry.extend_from_slice(value);
                Kept::Env(entry)
            }
        };
        self.kept.retain(|(other, _)| other != name);
        if self.kept.len() >= MAX_SECRETS {
            return Err(fail("keep more than 64 credentials:", Errno::NOSPC));
        }
        self.kept.push((name.clone(), kept));
        Ok(())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// The memfds, to be inherited at the numbers they have.
    pub fn memfds(&self) -> impl Iterator<Item = &OwnedFd> {
        self.kept.iter().filter_map(|(_, kept)| match kept {
            Kept::Memory(fd) => Some(fd),
            Kept::Env(_) => None,
        })
    }

    /// Environment entries `NAME=value` of a workload. Each caller's copy is wiped.
    pub fn environment(&self) -> impl Iterator<Item = Zeroizing<Vec<u8>>> {
        self.kept.iter().map(|(name, kept)| match kept {
            Kept::Memory(fd) => {
                Zeroizing::new(format!("{name}_FILE=/proc/self/fd/{}", fd.as_raw_fd()).into_bytes())
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
        self.kept.iter().any(|(own, kept)| match kept {
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

fn seal(value: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    // Kernels before 6.3 do not know NOEXEC_SEAL.
    let memfd = match rustix::fs::memfd_create("credential", flags | MemfdFlags::NOEXEC_SEAL) {
        Err(Errno::INVAL) => rustix::fs::memfd_create("credential", flags),
        other => other,
    }?;
    let mut rest = value;
    while !rest.is_empty() {
        match rustix::io::write(&memfd, rest) {
            Ok(0) => return Err(Errno::IO),
            Ok(count) => rest = &rest[count..],
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    rustix::fs::fchmod(&memfd, Mode::from_raw_mode(0o444))?;
    rustix::fs::fcntl_add_seals(
        &memfd,
        SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL,
    )?;
    rustix::io::fcntl_dupfd_cloexec(&memfd, FIRST_FD)
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
    fn a_memfd_cannot_be_changed_even_by_its_owner() {
        let memfd = seal(b"value").unwrap();
        assert_eq!(rustix::io::write(&memfd, b"x"), Err(Errno::PERM));
        assert_eq!(rustix::fs::ftruncate(&memfd, 0), Err(Errno::PERM));
        let seals = SealFlags::FUTURE_WRITE;
        assert_eq!(rustix::fs::fcntl_add_seals(&memfd, seals), Err(Errno::PERM));
    }
}
