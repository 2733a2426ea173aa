//! A sandbox from start to stop.
//!
//! ```text
//!   Builder ──start──▶ launching ──agent's hello──▶ running ──stop, drop, time limit──▶ ended
//!                          │                           │
//!                          └── monitor fails,          └── guest dies, agent breaks the protocol ──▶ ended
//!                              boot limit ──▶ ended
//! ```

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use chitin_broker::aws::AwsCredentialServer;
use chitin_broker::vault::LeaseRenewer;
use chitin_policy::Access;
use chitin_protocol::ToGuest;
use chitin_tiers::{BOOT_LIMIT, GuestFiles, SelectedTier};
use chitin_tree::Summary;
use chitin_vmm::control::Request;
use chitin_vmm::jail::Jail;
use tokio::net::TcpListener;

use crate::channel::Tunnel;
use crate::credential_delivery::DeliveredCredentials;
use crate::fork::Origin;
use crate::forward::Forward;
use crate::session::Session;
use crate::{Artifacts, Builder, Command, ECHO, Error, Phases, Policy, copy};

/// A running sandbox. Dropping it ends it.
pub struct Sandbox {
    pub(crate) session: Arc<Session>,
    pub(crate) clock: Option<tokio::task::JoinHandle<()>>,
    /// Dials for it.
    pub(crate) broker: Option<tokio::task::JoinHandle<()>>,
    /// Keeps its credentials alive.
    pub(crate) keeper: Option<LeaseRenewer>,
    /// Answers who asks for one.
    pub(crate) keys: Option<Arc<AwsCredentialServer>>,
    /// What was handed over of them.
    pub(crate) handed: Option<Arc<DeliveredCredentials>>,
    /// Replaces them and takes them back.
    pub(crate) following: Option<tokio::task::JoinHandle<Vec<String>>>,
    pub(crate) chosen: SelectedTier,
    /// To be forked from.
    pub(crate) origin: Option<Box<Origin>>,
    pub(crate) policy: Option<Arc<Policy>>,
}

impl Sandbox {
    /// A sandbox with the defaults: one vCPU, 256 MiB, a jail, no console, no time limit, no secrets.
    pub fn builder() -> Builder {
        Builder {
            artifacts: Artifacts::locate(),
            vcpus: None,
            memory_mib: None,
            console: false,
            jail: true,
            timeout: None,
            secrets: Vec::new(),
            templates: None,
            template: None,
            forkable: false,
            policy: None,
            egress: Box::default(),
            tier: None,
            fallback: Vec::new(),
            credentials: Box::default(),
        }
    }

    /// A command to run in the sandbox, as the user `agent`. Any number may run at once.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        Command::new(self.session.clone(), program.as_ref().to_owned())
    }

    /// Copies a file, link or directory of the host to `target`, an absolute path that it becomes. What is there is
    /// replaced, and directories are merged.
    ///
    /// # Errors
    /// What failed, on which path, at which side. Devices, sockets and pipes are refused.
    pub async fn copy_in(
        &self,
        source: impl AsRef<Path>,
        target: impl AsRef<Path>,
    ) -> Result<Summary, Error> {
        copy::copy_in(&self.session, source.as_ref(), target.as_ref()).await
    }

    /// Copies a file or directory of the sandbox, an absolute path, to `target`, which it becomes.
    ///
    /// # Errors
    /// What failed, on which path, at which side. Links that lead out of the copied tree are left out and reported as
    /// [`Error::LinksRefused`] once the rest has been copied.
    pub async fn copy_out(
        &self,
        source: impl AsRef<Path>,
        target: impl AsRef<Path>,
    ) -> Result<Summary, Error> {
        copy::copy_out(&self.session, source.as_ref(), target.as_ref()).await
    }

    /// Copies what the policy shares for writing back to where it came from. To be called when the workload has succeeded; files
    /// that it deleted stay.
    ///
    /// # Errors
    /// As for [`copy_out`](Sandbox::copy_out).
    pub async fn copy_back(&self) -> Result<(), Error> {
        for file in self.policy.iter().flat_map(|policy| &policy.files) {
            if file.access == Access::ReadWrite {
                self.copy_out(&file.path, &file.source).await?;
            }
        }
        Ok(())
    }

    /// Copies in what the policy shares, and has the agent keep the rest of it.
    pub(crate) async fn confine(&self) -> Result<(), Error> {
        let Some(policy) = &self.policy else { return Ok(()) };
        for file in &policy.files {
            self.copy_in(&file.source, &file.path).await?;
        }
        let confine = policy.confine(self.session.channel.name(), self.chosen.boundary());
        self.session.request(confine.request, &ToGuest::Confine(confine)).await
    }

    /// Takes a credential back from the running sandbox, for good: in memory, it is emptied also where a process has inherited it;
    /// in the environment, what is started later does not have it; with a proxy or an endpoint, no request gets it any more.
    /// What a process has made of it, a copy of its own, is not taken back, and what a vault has issued is given back when the
    /// sandbox ends.
    ///
    /// # Errors
    /// There is none of that name.
    pub async fn revoke(&self, name: &str) -> Result<(), Error> {
        match &self.handed {
            Some(handed) => handed.revoke(name).await,
            None => Err(Error::Secret {
                name: name.into(),
                reason: "no credential was handed over".into(),
            }),
        }
    }

    /// Connects to a server in the sandbox that listens on this port of 127.0.0.1, or of any address.
    ///
    /// # Errors
    /// [`Error::Guest`] if nobody listens there.
    pub async fn connect(&self, port: u16) -> Result<Tunnel, Error> {
        self.session.connect(port).await
    }

    /// Leads every connection that `listener` accepts to this port of the sandbox, until what comes back is dropped or the
    /// sandbox ends. A connection that nobody takes in the sandbox is reset.
    pub fn forward(&self, listener: TcpListener, port: u16) -> Forward {
        Forward::new(self.session.clone(), listener, port)
    }

    /// Where the time has gone so far.
    pub fn phases(&self) -> Phases {
        let seen = self.session.channel.seen();
        let entered = self.session.reported.as_ref().and_then(|reported| reported.borrow().entered);
        let since = |moment: Option<u64>| moment.map(|at| at.saturating_sub(self.session.spawned));
        Phases {
            spawned: self.session.spawned,
            entered_ns: since(entered),
            kernel_ns: since(seen.ready.map(|at| at.saturating_sub(seen.agent_took))),
            agent_ns: since(seen.ready),
            exec_ns: since(seen.output),
            exit_ns: since(seen.exited),
        }
    }

    /// How it is isolated, and why that way.
    pub fn chosen(&self) -> &SelectedTier {
        &self.chosen
    }

    /// What the monitor is jailed in, and what of a jail this host does not have; `None` if it was told to do without, or
    /// has not said so yet, or is none.
    pub fn jail(&self) -> Option<Jail> {
        self.session.reported.as_ref().and_then(|reported| reported.borrow().jail.clone())
    }

    /// Waits for the agent.
    pub(crate) async fn up(&self) -> Result<(), Error> {
        let limit = self.session.instance.lock().await.start_limit();
        match tokio::time::timeout(limit, self.session.channel.ready()).await {
            Ok(Ok(())) => {
                self.session.instance.lock().await.answered();
                Ok(())
            }
            Ok(Err(_)) => Err(self.session.why_closed().await),
            Err(_) => Err(Error::BootTimeout { limit }),
        }
    }

    /// Runs what copies will run first.
    pub(crate) async fn trial(&self, argv: &[OsString]) -> Result<(), Error> {
        let command = match argv.split_first() {
            Some((program, arguments)) => self.command(program).args(arguments),
            None => self.command(ECHO).arg("chitin"),
        };
        command.output().await.map(drop)
    }

    /// Has the frozen guest saved, which ends it.
    pub(crate) async fn save(&self, request: &Request, files: &GuestFiles) -> Result<(), Error> {
        let mut instance = self.session.instance.lock().await;
        let monitor = instance.monitor().ok_or(Error::NoMicrovm)?;
        let frozen = tokio::time::timeout(BOOT_LIMIT, monitor.frozen()).await;
        if frozen.is_err() {
            return Err(Error::BootTimeout { limit: BOOT_LIMIT });
        }
        let fds = [files.memory.as_fd(), files.state.as_fd(), files.key.as_fd()];
        Ok(monitor.finish(request, &fds).await?)
    }

    /// Has written down what the guest has used so far, which ends it.
    pub(crate) async fn record(&self, state: &File, key: &File) -> Result<(), Error> {
        let mut instance = self.session.instance.lock().await;
        let monitor = instance.monitor().ok_or(Error::NoMicrovm)?;
        Ok(monitor.finish(&Request::Record {}, &[state.as_fd(), key.as_fd()]).await?)
    }

    /// Ends the sandbox and waits until nothing of it is left, also of what a vault has issued for it.
    ///
    /// # Errors
    /// Something of it may be left, and what. It is ended all the same.
    pub async fn stop(self) -> Result<(), Error> {
        self.end().await.0
    }

    /// As [`stop`](Sandbox::stop), and says what went wrong with credentials meanwhile, a line each: one that could not be
    /// renewed may have stopped working in mid-run, one that could not be given back is good until its term is over.
    pub async fn end(mut self) -> (Result<(), Error>, Vec<String>) {
        if let Some(keys) = &self.keys {
            keys.revoke();
        }
        self.session.channel.close();
        if let Some(broker) = self.broker.take() {
            // It has nothing to wait for but to write down what it did.
            let _ = broker.await;
        }
        let stopped = self.session.instance.lock().await.stop().await;
        tracing::info!(ok = stopped.is_ok(), "sandbox ended");
        let mut troubles = match self.keeper.take() {
            Some(keeper) => keeper.revoke_all().await,
            None => Vec::new(),
        };
        if let Some(following) = self.following.take() {
            // There is nobody any more to tell it of changes.
            troubles.extend(following.await.unwrap_or_default());
        }
        (stopped.map_err(Error::from), troubles)
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        if let Some(keys) = &self.keys {
            keys.revoke();
        }
        // A process may still hold the rest of it, and so does this.
        if let Some(following) = self.following.take() {
            following.abort();
        }
        self.session.channel.close();
        if let Some(clock) = self.clock.take() {
            clock.abort();
        }
    }
}

impl fmt::Debug for Sandbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sandbox").field("phases", &self.phases()).finish_non_exhaustive()
    }
}
