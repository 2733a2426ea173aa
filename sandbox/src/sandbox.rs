//! A running sandbox.
//!
//! ```text
//!   Builder ──start──▶ launching ──agent's hello──▶ running ──stop, drop, time limit──▶ ended
//!                          │                           │
//!                          └─ monitor fails,           └─ guest dies,
//!                             boot limit ──▶ ended        agent breaks the protocol ──▶ ended
//! ```

use std::ffi::OsStr;
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use chitin_broker::vault::LeaseRenewer;
use chitin_policy::Access;
use chitin_tiers::SelectedTier;
use chitin_tree::Summary;
use chitin_vmm::jail::Jail;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use crate::builder::Builder;
use crate::channel::Tunnel;
use crate::copy;
use crate::credential_delivery::DeliveredCredentials;
use crate::error::Error;
use crate::forward::Forward;
use crate::launch::{LiveGuest, Provisioned};
use crate::phases::Phases;
use crate::process::Command;
use crate::spec::MAX_TASKS;

/// A running sandbox. Dropping it ends it.
pub struct Sandbox {
    pub(crate) guest: LiveGuest,
    broker: Option<JoinHandle<()>>,
    credentials: Arc<DeliveredCredentials>,
    lease_renewer: Option<LeaseRenewer>,
    rotations: Option<JoinHandle<Vec<String>>>,
}

impl From<Provisioned> for Sandbox {
    fn from(provisioned: Provisioned) -> Sandbox {
        let Provisioned { guest, broker, credentials, lease_renewer, rotations } = provisioned;
        Sandbox { guest, broker, credentials, lease_renewer, rotations }
    }
}

impl Sandbox {
    /// Returns the default settings: one vCPU, 256 MiB, a jail, no console, no time limit, no
    /// credentials.
    pub fn builder() -> Builder {
        Builder::new()
    }

    /// Returns a command to run in the sandbox as the user `agent`. Any number may run at once.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        Command::new(self.guest.session.clone(), program.as_ref().to_owned())
    }

    /// Copies a file, link or directory of the host to `target`, an absolute path that it becomes.
    /// Existing files are replaced, and directories are merged.
    ///
    /// # Errors
    /// A failed operation, with the path and the side. Devices, sockets and FIFOs in a tree are left
    /// out, which the summary names; as `source` they are refused.
    pub async fn copy_in(
        &self,
        source: impl AsRef<Path>,
        target: impl AsRef<Path>,
    ) -> Result<Summary, Error> {
        copy::copy_in(&self.guest.session, source.as_ref(), target.as_ref()).await
    }

    /// Copies a file or directory of the sandbox, an absolute path, to `target`, which it becomes.
    ///
    /// # Errors
    /// A failed operation, with the path and the side. Links that lead out of the copied tree are
    /// omitted, and reported as [`Error::LinksRefused`] once the rest has been copied. Devices,
    /// sockets and FIFOs in a tree are left out, which the summary names.
    pub async fn copy_out(
        &self,
        source: impl AsRef<Path>,
        target: impl AsRef<Path>,
    ) -> Result<Summary, Error> {
        copy::copy_out(&self.guest.session, source.as_ref(), target.as_ref()).await
    }

    /// Copies the policy's writable files back to the host paths that they came from. Call it when
    /// the workload has succeeded. Files that the workload deleted stay on the host.
    ///
    /// # Errors
    /// As for [`copy_out`](Sandbox::copy_out): the first of them, after the other files have been
    /// copied.
    pub async fn copy_back(&self) -> Result<(), Error> {
        let mut result = Ok(());
        for file in self.guest.policy.iter().flat_map(|policy| &policy.files) {
            if file.access == Access::ReadWrite {
                let copied = self.copy_out(&file.path, &file.source).await;
                result = result.and(copied.map(|_| ()));
            }
        }
        result
    }

    /// Revokes a credential of the running sandbox permanently.
    ///
    /// In memory, the value is zeroed, also where a process has inherited it. In the environment,
    /// processes started later do not get it. With a proxy or an endpoint, no further request gets
    /// it. A copy that a process has made is not revoked, and credentials that a vault has issued
    /// are revoked there when the sandbox ends.
    ///
    /// # Errors
    /// [`Error::UnknownCredential`] if no credential of this name was delivered.
    pub async fn revoke(&self, name: &str) -> Result<(), Error> {
        self.credentials.revoke(name).await
    }

    /// Connects to a server in the sandbox that listens on this port of 127.0.0.1, or of any
    /// address.
    ///
    /// # Errors
    /// [`Error::Guest`] if no process listens there.
    pub async fn connect(&self, port: u16) -> Result<Tunnel, Error> {
        self.guest.session.connect_port(port).await
    }

    /// Forwards every connection that `listener` accepts to this port of the sandbox, until the
    /// returned handle is dropped or the sandbox ends. A connection is reset if no process listens
    /// on the port.
    pub fn forward(&self, listener: TcpListener, port: u16) -> Forward {
        Forward::new(self.guest.session.clone(), listener, port)
    }

    /// Returns the phases of the sandbox's life so far, with their times.
    pub fn phases(&self) -> Phases {
        let session = &self.guest.session;
        let timestamps = session.channel.timestamps();
        let entered = session.monitor_reports.as_ref().and_then(|reports| reports.borrow().entered);
        let launched_at_ns = session.launched_at_ns;
        let since_launch = |at: Option<u64>| at.map(|at| at.saturating_sub(launched_at_ns));
        let agent_started = |ready: u64| ready.saturating_sub(timestamps.agent_start_ns);
        Phases {
            spawned: launched_at_ns,
            entered_ns: since_launch(entered),
            kernel_ns: since_launch(timestamps.ready.map(agent_started)),
            agent_ns: since_launch(timestamps.ready),
            exec_ns: since_launch(timestamps.first_output),
            exit_ns: since_launch(timestamps.last_exit),
        }
    }

    /// Returns the tier of the sandbox, and the reason why it was selected.
    pub fn selected_tier(&self) -> &SelectedTier {
        &self.guest.selected
    }

    /// Returns the memory of the sandbox in MiB.
    pub fn memory_mib(&self) -> u64 {
        self.guest.session.memory_bytes >> 20
    }

    /// Returns the moment at which the time limit is reached, and the limit: the shorter of the
    /// [builder's](Builder::timeout) and the policy's.
    pub fn time_limit(&self) -> Option<(Instant, Duration)> {
        let deadline = self.guest.session.deadline;
        deadline.map(|deadline| (deadline.at.into_std(), deadline.limit))
    }

    /// Returns the maximum number of processes and threads. A sandbox with little memory allows
    /// fewer.
    pub fn max_tasks(&self) -> u32 {
        self.guest.policy.as_ref().map_or(MAX_TASKS, |policy| policy.limits.pids)
    }

    /// Returns the limit of written files in MiB that the policy sets. Without one, it is a share
    /// of the memory.
    pub fn disk_mib(&self) -> Option<u32> {
        self.guest.policy.as_ref().and_then(|policy| policy.limits.disk_mib)
    }

    /// Returns the parts of the monitor's jail, and those that this host lacks. `None` if the jail
    /// is turned off, if the guest was not entered yet, or if the sandbox is not a microVM.
    pub fn jail(&self) -> Option<Jail> {
        let reports = self.guest.session.monitor_reports.as_ref();
        reports.and_then(|reports| reports.borrow().jail.clone())
    }

    /// Waits until the service that runs the sandbox, such as a Docker daemon, no longer answers, so
    /// that nothing sent to the sandbox arrives. Never returns on a tier without such a service.
    pub async fn wait_until_silent(&self) {
        let silence = self.guest.session.instance.lock().await.wait_until_silent();
        silence.await;
    }

    /// Ends the sandbox and waits until nothing of it is left and the credentials that a vault has
    /// issued for it are revoked.
    ///
    /// # Errors
    /// The parts that may be left. The sandbox is ended in any case.
    pub async fn stop(self) -> Result<(), Error> {
        self.stop_with_warnings().await.0
    }

    /// Ends the sandbox as [`stop`](Sandbox::stop) does. Returns in addition a warning for each
    /// credential that failed: one that could not be renewed may have expired during the run, one
    /// that could not be revoked is valid until its lease expires.
    pub async fn stop_with_warnings(mut self) -> (Result<(), Error>, Vec<String>) {
        self.credentials.disable_aws_server();
        self.guest.session.channel.close();
        if let Some(broker) = self.broker.take() {
            // It only writes the rest of its audit lines.
            let _ = broker.await;
        }
        let stopped = self.guest.session.instance.lock().await.stop().await;
        tracing::info!(ok = stopped.is_ok(), "sandbox ended");
        let mut warnings = match self.lease_renewer.take() {
            Some(renewer) => renewer.revoke_all().await,
            None => Vec::new(),
        };
        if let Some(rotations) = self.rotations.take() {
            // The renewer is gone, so that no more changes come.
            warnings.extend(rotations.await.unwrap_or_default());
        }
        (stopped.map_err(Error::from), warnings)
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        self.credentials.disable_aws_server();
        // A process may hold the session longer than this handle, and this task must not.
        if let Some(rotations) = self.rotations.take() {
            rotations.abort();
        }
    }
}

impl fmt::Debug for Sandbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sandbox").field("phases", &self.phases()).finish_non_exhaustive()
    }
}
