//! The life of a sandbox that becomes a template: frozen, saved, restored as a copy, and reseeded.
//!
//! ```text
//!   Running ──Freeze──▶ Freezing ──(answer sent)──▶ reconnect: saved and restored here ──▶ Restored
//!      ▲                                                                                      │
//!      └──────────────────────────────────── Reseed ──────────────────────────────────────────┘
//! ```
//!
//! The wait for the host on the second channel is the state that a template holds: every copy of it
//! returns from that wait. A sandbox is frozen once at most.

mod boot_id;
mod reseed;

use chitin_protocol::{Failure, Fault, Reseed, ToGuest, Unexpected};
use rustix::io::Errno;

use crate::cgroup::{Cgroups, WorkloadCgroup};
use crate::error::{Error, make_failure};
use crate::io::transport::Transport;
use crate::io::vsock::UnconnectedSocket;
use boot_id::BootIdFile;

/// The stage of a sandbox on its way to being a template's copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Running,
    /// The workload is frozen. The channel is closed once the host has been answered.
    Freezing,
    /// The channel is a new one, and accepts nothing but a reseed.
    Restored,
}

pub struct Identity {
    stage: Stage,
    /// The socket of the channel after a freeze. A container has none, and cannot be frozen.
    next_socket: Option<UnconnectedSocket>,
    /// The file that tells copies apart. Set by a freeze.
    boot_id: Option<BootIdFile>,
}

impl Identity {
    pub fn new(next_socket: Option<UnconnectedSocket>) -> Identity {
        Identity { stage: Stage::Running, next_socket, boot_id: None }
    }

    /// Returns an error if the message is not allowed in this stage.
    pub fn check_message(&self, message: &ToGuest) -> Result<(), Fault> {
        let unexpected = match (self.stage, message) {
            (Stage::Running, ToGuest::Reseed(_)) => Unexpected::ReseedWithoutFreeze,
            (Stage::Running, _) | (Stage::Restored, ToGuest::Reseed(_)) => return Ok(()),
            (Stage::Freezing, _) => Unexpected::MessageAfterFreeze,
            (Stage::Restored, _) => Unexpected::MessageBeforeReseed,
        };
        Err(unexpected.into())
    }

    /// Freezes the workload and prepares what a copy needs. On failure the workload continues.
    pub fn freeze(&mut self, cgroups: &Cgroups) -> Result<(), Failure> {
        let (Some(cgroup), Some(socket)) = (&cgroups.v2, &self.next_socket) else {
            let operation = "freeze a sandbox that is not a microVM, or was frozen before";
            return Err(make_failure(operation, b"", Errno::OPNOTSUPP));
        };
        cgroup.freeze().map_err(|error| make_failure("freeze the workload", b"", error.errno))?;
        match prepare_copy(socket) {
            Ok(boot_id) => {
                self.boot_id = Some(boot_id);
                self.stage = Stage::Freezing;
                Ok(())
            }
            Err(failure) => {
                let _ = cgroup.thaw();
                Err(failure)
            }
        }
    }

    /// Returns whether the freeze has been answered in full, so that the agent can reconnect.
    pub fn must_reconnect(&self, transport: &Transport) -> bool {
        self.stage == Stage::Freezing && transport.is_flushed()
    }

    /// Leaves the channel and waits for the host on another one. A template is saved in that wait,
    /// so every sandbox that returns from it is a copy.
    pub fn reconnect(&mut self, transport: &mut Transport) -> Result<(), Error> {
        let Some(socket) = self.next_socket.take() else {
            return Err(Fault::from(Unexpected::SecondFreeze))?;
        };
        transport.reconnect(socket)?;
        self.stage = Stage::Restored;
        Ok(())
    }

    /// Gives a copy its own entropy, time and names, and only then lets its workload continue.
    pub fn reseed(&mut self, reseed: &Reseed, cgroups: &Cgroups) -> Result<(), Failure> {
        let Some(boot_id) = &self.boot_id else {
            return Err(make_failure("reseed a sandbox that was not frozen", b"", Errno::INVAL));
        };
        reseed::apply_reseed(reseed, boot_id)?;
        let thawed = cgroups.v2.as_ref().map_or(Ok(()), WorkloadCgroup::thaw);
        thawed.map_err(|error| make_failure("thaw the workload", b"", error.errno))?;
        self.stage = Stage::Running;
        Ok(())
    }
}

/// Prepares the socket that copies connect with, and the file that becomes their boot id. The
/// workload is frozen.
fn prepare_copy(socket: &UnconnectedSocket) -> Result<BootIdFile, Failure> {
    socket
        .disable_connect_timeout()
        .map_err(|error| make_failure("prepare the channel of a copy", b"", error.errno))?;
    BootIdFile::mount().map_err(|errno| make_failure("mount a file over the boot id", b"", errno))
}
