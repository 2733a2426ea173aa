//! Copies of a sandbox that runs.
//!
//! ```text
//!   running ──fork──▶ frozen ──▶ saved ──┬──▶ the sandbox itself, in a new monitor
//!                        │               ├──▶ copy
//!                        │               └──▶ copy …
//!                        └── refused: it holds a secret, it goes on as it was
//! ```
//!
//! What is saved lives in memory, never on a disk, and as long as one of the copies does. All of them share it until they
//! write.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;

use chitin_broker::credentials::FetchedCredentials;
use chitin_protocol::ToGuest;
use chitin_tiers::GuestFiles;
use chitin_vmm::VmSpec;
use chitin_vmm::control::Request;
use rustix::fs::{MemfdFlags, memfd_create};
use tokio::time::Instant;
use zeroize::Zeroizing;

use crate::template::KEY_BYTES;
use crate::{Builder, Error, Sandbox};

/// The most copies of one fork. Each is a process and a VM; a host runs out of memory for their page tables and processes
/// before it runs out of what they share.
pub const MAX_FORKS: usize = 1024;

/// What a sandbox was started as.
#[derive(Debug)]
pub(crate) struct Origin {
    pub builder: Builder,
    pub spec: VmSpec,
    pub started: Instant,
}

impl Sandbox {
    /// Makes `count` copies of the sandbox as it is now: its processes, its files, its memory. Each copy, and the sandbox
    /// itself, which goes on, gets entropy, clock, host name and boot id of its own before any of its processes runs again.
    ///
    /// Commands started before are still running, in all of them, but cannot be talked to any more: their
    /// [`Process`](crate::Process) says that the sandbox was stopped. A copy's time limit counts from now.
    ///
    /// # Errors
    /// [`Error::NotForkable`] unless it was started [`forkable`](Builder::forkable) and has not been forked yet, itself or what
    /// it is a copy of; the agent refuses, because it was given
    /// secrets: then the sandbox goes on. Whatever fails after that ends the sandbox, or, where only a copy fails, the copies.
    pub async fn fork(&mut self, count: usize) -> Result<Vec<Sandbox>, Error> {
        if count > MAX_FORKS {
            return Err(Error::ForkCount { count });
        }
        let origin = self.origin.take().ok_or(Error::NotForkable)?;
        let request = self.session.channel.name();
        if let Err(error) = self.session.request(request, &ToGuest::Freeze { request }).await {
            self.origin = Some(origin);
            return Err(error);
        }
        let Origin { builder, mut spec, started } = *origin;
        // The agent has opened one more connection than it needs, before it gave up the right to.
        let builder = builder.forkable(false);
        spec.template = false;
        let saved = Saved::create()
            .map_err(|source| Error::Host { what: "make files in memory", source })?;
        let binding = builder.restore(&mut spec)?;
        self.save(&Request::Snapshot { binding }, &saved.files()?).await?;

        let itself = builder.launch(&spec, Some(&saved.reading()?), started)?;
        *self = builder.up(itself, true, &FetchedCredentials::default()).await?;
        // As many at a time as there are processors: more would only wait for each other, with their new clocks standing.
        let at_once = std::thread::available_parallelism().map_or(1, usize::from);
        let mut up = Vec::new();
        while up.len() < count {
            let launched = (up.len()..count)
                .take(at_once)
                .map(|_| builder.launch(&spec, Some(&saved.reading()?), Instant::now()))
                .collect::<Result<Vec<_>, Error>>()?;
            for copy in launched {
                up.push(builder.up(copy, true, &FetchedCredentials::default()).await?);
            }
        }
        Ok(up)
    }
}

/// A guest's files, in memory.
struct Saved {
    memory: File,
    state: File,
    key: File,
}

impl Saved {
    fn create() -> io::Result<Saved> {
        let file = |name| Ok::<_, io::Error>(File::from(memfd_create(name, MemfdFlags::CLOEXEC)?));
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        getrandom::fill(&mut *key)?;
        let saved = Saved {
            memory: file("chitin-memory")?,
            state: file("chitin-state")?,
            key: file("chitin-key")?,
        };
        (&saved.key).write_all(&*key)?;
        Ok(saved)
    }

    /// To be written.
    fn files(&self) -> Result<GuestFiles, Error> {
        let again = |file: &File| file.try_clone().map_err(failed);
        Ok(GuestFiles {
            memory: again(&self.memory)?,
            state: again(&self.state)?,
            key: reopened(&self.key)?,
        })
    }

    /// To be read, from the beginning.
    fn reading(&self) -> Result<GuestFiles, Error> {
        Ok(GuestFiles {
            memory: reopened(&self.memory)?,
            state: reopened(&self.state)?,
            key: reopened(&self.key)?,
        })
    }
}

/// The same file open for reading only, which is how a monitor takes it.
fn reopened(file: &File) -> Result<File, Error> {
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).map_err(failed)
}

fn failed(source: io::Error) -> Error {
    Error::Host { what: "open a file in memory", source }
}
