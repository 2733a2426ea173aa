//! Credentials that the host has delivered. They are kept until the host revokes them or the
//! sandbox ends.

mod file;

use chitin_protocol::{Delivery, Failure, MAX_SECRET, Secret};
use rustix::io::Errno;
use zeroize::Zeroizing;

use crate::error::make_failure;
use file::{CredentialDirectory, SecretFile};

/// The most credentials. Each has up to 64 KiB: together at most 4 MiB.
const MAX_SECRETS: usize = 64;

/// The protocol's limit of a name, in bytes.
const MAX_NAME_LEN: usize = 128;

/// A credential in the form in which it is delivered.
enum Delivered {
    Memory(SecretFile),
    /// The entry `NAME=value` of the environment.
    Env(Zeroizing<Vec<u8>>),
}

/// All credentials of the sandbox.
#[derive(Default)]
pub struct Secrets {
    directory: CredentialDirectory,
    /// Pairs of a name and its credential.
    delivered: Vec<(String, Delivered)>,
    /// Set with the first credential, and never cleared.
    had_any: bool,
}

impl Secrets {
    /// Returns no credentials. With `mount_first`, the agent mounts the file system for those that
    /// are delivered in memory; otherwise the container's runtime has mounted it.
    pub fn new(mount_first: bool) -> Secrets {
        Secrets { directory: CredentialDirectory::new(mount_first), ..Secrets::default() }
    }

    /// Mounts the file system for credentials in memory, if that is the agent's task and has not
    /// been done.
    pub fn prepare_directory(&mut self) -> Result<(), Failure> {
        self.directory.open().map(drop)
    }

    /// Adds a credential, or replaces the one with the same name.
    pub fn insert(&mut self, secret: &Secret) -> Result<(), Failure> {
        let name = &secret.name;
        let failed = |operation, errno| make_failure(operation, name.as_bytes(), errno);
        if !is_valid_name(name) {
            return Err(failed("name a credential", Errno::INVAL));
        }
        let value = secret.value.expose();
        if value.len() > MAX_SECRET {
            return Err(failed("store credential", Errno::TOOBIG));
        }
        let at = self.delivered.iter().position(|(other, _)| other == name);
        if at.is_none() && self.delivered.len() >= MAX_SECRETS {
            return Err(failed("store more than 64 credentials:", Errno::NOSPC));
        }
        self.had_any = true;
        let mut former = at.and_then(|at| self.delivered.get_mut(at)).map(|(_, former)| former);
        let delivered = match (secret.delivery, &mut former) {
            (Delivery::Env, _) if value.contains(&0) => {
                let operation = "put a value with a NUL into the environment:";
                return Err(failed(operation, Errno::INVAL));
            }
            (Delivery::Env, former) => {
                if let Some(Delivered::Memory(_)) = former {
                    file::remove_file(self.directory.open()?, name)
                        .map_err(|errno| failed("remove the file of credential", errno))?;
                }
                Delivered::Env(make_env_entry(name, value))
            }
            // Processes may have opened this file.
            (Delivery::Memory, Some(Delivered::Memory(file))) => {
                return file.set(value).map_err(|errno| failed("store credential", errno));
            }
            (Delivery::Memory, _) => Delivered::Memory(
                SecretFile::create(self.directory.open()?, name, value)
                    .map_err(|errno| failed("store credential", errno))?,
            ),
        };
        match former {
            Some(former) => *former = delivered,
            None => self.delivered.push((name.clone(), delivered)),
        }
        Ok(())
    }

    /// Revokes the credential with this name, if there is one.
    pub fn revoke(&mut self, name: &str) -> Result<(), Failure> {
        for (_, delivered) in self.delivered.iter_mut().filter(|(other, _)| other == name) {
            if let Delivered::Memory(file) = delivered {
                file.clear()
                    .map_err(|errno| make_failure("clear credential", name.as_bytes(), errno))?;
            }
        }
        // A file that processes may have opened stays, empty, for a later value.
        self.delivered.retain(|(other, delivered)| {
            other != name || matches!(delivered, Delivered::Memory(_))
        });
        Ok(())
    }

    /// Returns whether no credential was ever delivered. Revocation does not count, because a
    /// process may have copied a credential.
    pub fn was_always_empty(&self) -> bool {
        !self.had_any
    }

    /// Iterates over the credentials that are not revoked.
    fn active(&self) -> impl Iterator<Item = (&str, &Delivered)> {
        let is_active = |delivered: &Delivered| match delivered {
            Delivered::Memory(file) => file.is_set(),
            Delivered::Env(_) => true,
        };
        self.delivered
            .iter()
            .filter(move |(_, delivered)| is_active(delivered))
            .map(|(name, delivered)| (name.as_str(), delivered))
    }

    /// Iterates over copies of the workload's environment entries `NAME=value`, which are zeroed
    /// when they are dropped.
    pub fn environment(&self) -> impl Iterator<Item = Zeroizing<Vec<u8>>> {
        self.active().map(|(name, delivered)| match delivered {
            Delivered::Memory(_) => {
                Zeroizing::new(format!("{name}_FILE={}/{name}", file::DIRECTORY).into_bytes())
            }
            Delivered::Env(entry) => {
                let mut copy = Zeroizing::new(Vec::with_capacity(entry.len() + 1));
                copy.extend_from_slice(entry);
                copy
            }
        })
    }

    /// Returns whether [`environment`](Self::environment) sets this variable.
    pub fn sets_variable(&self, variable: &[u8]) -> bool {
        self.active().any(|(name, delivered)| match delivered {
            Delivered::Memory(_) => variable.strip_suffix(b"_FILE") == Some(name.as_bytes()),
            Delivered::Env(_) => variable == name.as_bytes(),
        })
    }
}

/// Makes an entry in one allocation with room for a NUL: growing would leave copies of the value
/// behind.
fn make_env_entry(name: &str, value: &[u8]) -> Zeroizing<Vec<u8>> {
    let mut entry = Zeroizing::new(Vec::with_capacity(name.len() + value.len() + 2));
    entry.extend_from_slice(name.as_bytes());
    entry.push(b'=');
    entry.extend_from_slice(value);
    entry
}

fn is_valid_name(name: &str) -> bool {
    name.len() <= MAX_NAME_LEN
        && name.bytes().all(|byte| byte == b'_' || byte.is_ascii_alphanumeric())
        && name.bytes().next().is_some_and(|byte| !byte.is_ascii_digit())
}

#[cfg(test)]
#[path = "secrets_test.rs"]
mod tests;
