//! Copies of a running sandbox.
//!
//! ```text
//!   running ──fork──▶ frozen ──▶ saved ──┬──▶ the sandbox itself, in a new monitor
//!                        │               ├──▶ copy
//!                        │               └──▶ copy …
//!                        └── refused: the guest holds a secret and continues to run
//! ```
//!
//! The saved guest is kept in memory, never on a disk, and for as long as one of the copies exists.
//! All of them share its pages until they write to them.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;

use chitin_broker::credentials::FetchedCredentials;
use chitin_tiers::GuestFiles;
use chitin_vmm::HostError;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use tokio::time::Instant;
use zeroize::Zeroizing;

use crate::error::Error;
use crate::launch::{Launched, Origin};
use crate::sandbox::Sandbox;
use crate::template::KEY_BYTES;

/// Most copies of one fork. Each is a process and a VM: a host runs out of memory for their page
/// tables and processes before it runs out of memory for the pages that they share.
pub const MAX_FORKS: usize = 1024;

impl Sandbox {
    /// Makes `count` copies of the sandbox in its present state: its processes, files and memory.
    /// Each copy, and the sandbox itself, gets its own entropy, clock, host name and boot id before
    /// any of its processes runs again.
    ///
    /// Commands started before still run in all of them, but the caller loses contact with them:
    /// their [`Process`](crate::Process) reports that the sandbox was stopped. A copy's time limit
    /// counts from now.
    ///
    /// # Errors
    /// [`Error::NotForkable`] unless the sandbox was started as
    /// [`forkable`](crate::Builder::forkable) and neither it nor the sandbox that it is a copy of
    /// was forked before. The agent refuses if it was given secrets; the sandbox then continues to
    /// run. A later failure ends the sandbox; if only a copy fails, it ends the copies.
    pub async fn fork(&mut self, count: usize) -> Result<Vec<Sandbox>, Error> {
        if count > MAX_FORKS {
            return Err(Error::ForkCount { count, max: MAX_FORKS });
        }
        let origin = self.guest.origin.take().ok_or(Error::NotForkable)?;
        if let Err(error) = self.guest.session.freeze().await {
            self.guest.origin = Some(origin);
            return Err(error);
        }
        let Origin { mut spec, mut vm, started } = *origin;
        // The agent opened one connection more than it needs before it gave up the right to.
        spec.forkable = false;
        vm.template = false;
        let saved = SavedGuest::create().map_err(HostError::during("create files in memory"))?;
        let binding = spec.bind_restored(&mut vm)?;
        self.guest.session.save(binding, &saved.open_for_writing()?).await?;
        saved.seal().map_err(HostError::during("seal the files in memory"))?;

        let restore = |started| -> Result<Launched, Error> {
            Launched::spawn(&spec, &vm, Some(&saved.open_for_reading()?), started)
        };
        let provision = async |launched: Launched| -> Result<Sandbox, Error> {
            let provisioned = launched.provision(&spec, true, FetchedCredentials::default());
            Ok(Sandbox::from(provisioned.await?))
        };
        *self = provision(restore(started)?).await?;
        // At most as many at a time as there are processors: more would only wait for each other
        // while their clocks stand still.
        let parallel = std::thread::available_parallelism().map_or(1, usize::from);
        let mut copies = Vec::new();
        while copies.len() < count {
            let batch = (copies.len()..count).take(parallel);
            let launched: Result<Vec<_>, Error> = batch.map(|_| restore(Instant::now())).collect();
            for launched in launched? {
                copies.push(provision(launched).await?);
            }
        }
        Ok(copies)
    }
}

/// No write, no other length, no removal of these seals. A monitor maps the memory copy-on-write,
/// which needs no right to write to the file.
const SEALS: SealFlags =
    SealFlags::WRITE.union(SealFlags::SHRINK).union(SealFlags::GROW).union(SealFlags::SEAL);

const OPEN: &str = "open a file in memory";

/// The files of a saved guest, in memory.
struct SavedGuest {
    memory: File,
    state: File,
    key: File,
}

impl SavedGuest {
    fn create() -> io::Result<SavedGuest> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = |name| Ok::<_, io::Error>(File::from(memfd_create(name, flags)?));
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        getrandom::fill(&mut *key)?;
        let saved = SavedGuest {
            memory: file("chitin-memory")?,
            state: file("chitin-state")?,
            key: file("chitin-key")?,
        };
        (&saved.key).write_all(&*key)?;
        fcntl_add_seals(&saved.key, SEALS)?;
        Ok(saved)
    }

    /// Makes the files unchangeable, for this process and for every other that has them.
    fn seal(&self) -> io::Result<()> {
        for file in [&self.memory, &self.state] {
            fcntl_add_seals(file, SEALS)?;
        }
        Ok(())
    }

    fn open_for_writing(&self) -> Result<GuestFiles, HostError> {
        let duplicate = |file: &File| file.try_clone().map_err(HostError::during(OPEN));
        Ok(GuestFiles {
            memory: duplicate(&self.memory)?,
            state: duplicate(&self.state)?,
            key: reopen_read_only(&self.key)?,
        })
    }

    /// Opens the files at their beginning.
    fn open_for_reading(&self) -> Result<GuestFiles, HostError> {
        Ok(GuestFiles {
            memory: reopen_read_only(&self.memory)?,
            state: reopen_read_only(&self.state)?,
            key: reopen_read_only(&self.key)?,
        })
    }
}

/// Opens the same file for reading only, which a monitor requires.
fn reopen_read_only(file: &File) -> Result<File, HostError> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    File::open(path).map_err(HostError::during(OPEN))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn files_of_a_saved_guest_are_sealed() {
        let saved = SavedGuest::create().unwrap();
        let files = saved.open_for_writing().unwrap();
        files.memory.write_all_at(b"memory", 0).unwrap();
        files.state.write_all_at(b"state", 0).unwrap();
        saved.seal().unwrap();
        for file in [&saved.memory, &saved.state, &saved.key] {
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            let reopened = File::options().write(true).open(path).unwrap();
            for file in [file, &reopened] {
                for refused in [
                    file.write_all_at(b"x", 0),
                    file.set_len(0),
                    file.set_len(1 << 20),
                    fcntl_add_seals(file, SealFlags::FUTURE_WRITE).map_err(io::Error::from),
                ] {
                    assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
                }
            }
        }
        let mut bytes = [0; 6];
        saved.open_for_reading().unwrap().memory.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(&bytes, b"memory");
    }
}
