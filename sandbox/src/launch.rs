//! The steps from a launched guest to a sandbox that is ready for use. Each step is a type.
//!
//! ```text
//!   SandboxSpec ──▶ Launched ──agent's hello──▶ AgentReady ──CA, policy──▶ Provisioned ──▶ Sandbox
//!                      │                            │
//!                      └── dropped, boot limit ─────┴── dropped, refused ──▶ guest ended
//! ```
//!
//! A guest that boots is sent its credentials before the agent answers: the agent finds them when
//! it is up, which saves a round trip. A restored guest is waited for and reseeded first.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use chitin_broker::AuditLog;
use chitin_broker::credentials::{CredentialValue, FetchedCredentials};
use chitin_broker::egress::Broker;
use chitin_broker::vault::LeaseRenewer;
use chitin_policy::Policy;
use chitin_protocol::{Secret, ToGuest};
use chitin_spec::TierKind;
use chitin_tiers::microvm::{self, MicrovmTier, Monitor};
use chitin_tiers::{Artifacts, GuestFiles, LaunchSpec, SelectedTier, Tier};
use chitin_vmm::VmSpec;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::copy;
use crate::credential_delivery::DeliveredCredentials;
use crate::deadline::DeadlineGuard;
use crate::dial_requests::DialRequests;
use crate::error::Error;
use crate::kvm_verdict::watch_slow_start;
use crate::session::{Deadline, Reply, Session};
use crate::spec::SandboxSpec;
use crate::trust_store::install_ca;

/// The specifications that a forkable sandbox was started with.
#[derive(Debug)]
pub(crate) struct Origin {
    pub spec: SandboxSpec,
    pub vm: VmSpec,
    pub started: Instant,
}

/// A guest that runs. Dropping it closes the channel, which ends the guest.
#[derive(Debug)]
pub(crate) struct LiveGuest {
    pub session: Arc<Session>,
    pub selected: SelectedTier,
    pub policy: Option<Arc<Policy>>,
    /// Present if the sandbox may be forked.
    pub origin: Option<Box<Origin>>,
    /// Ends the guest at its deadline.
    deadline_guard: Option<DeadlineGuard>,
}

impl LiveGuest {
    /// Moves the end of the guest from its deadline to the end of the time for copies, from which a
    /// guest that does not even start has no use.
    fn add_copy_grace(&mut self) {
        if let Some(Deadline { at, copy_grace, .. }) = self.session.deadline
            && !copy_grace.is_zero()
        {
            let at = at.into_std() + copy_grace;
            self.deadline_guard = Some(self.session.channel.close_at(at));
        }
    }
}

impl Drop for LiveGuest {
    fn drop(&mut self) {
        self.session.channel.close();
    }
}

/// A guest that was launched, whose agent has not answered yet.
#[derive(Debug)]
pub(crate) struct Launched {
    guest: LiveGuest,
    restored: bool,
}

/// A guest whose agent has answered. A restored guest has its own identity from here on.
#[derive(Debug)]
pub(crate) struct AgentReady {
    guest: LiveGuest,
}

/// A guest that holds its credentials and enforces its policy.
#[derive(Debug)]
pub(crate) struct Provisioned {
    pub guest: LiveGuest,
    /// Serves the guest's connection requests, if it may make any.
    pub broker: Option<JoinHandle<()>>,
    pub credentials: Arc<DeliveredCredentials>,
    /// Renews the leases of a vault, if there are any.
    pub lease_renewer: Option<LeaseRenewer>,
    /// Delivers rotated credentials, and returns a warning for each that could not be.
    pub rotations: Option<JoinHandle<Vec<String>>>,
}

/// Launches a sandbox on a tier and provisions it. Its time counts from `started`.
///
/// On failure nothing of it is left running, and issued credentials are revoked.
#[tracing::instrument(name = "launch", skip_all, fields(
    tier = selected.name(),
    vcpus = launch_spec.vm.vcpus,
    memory_mib = launch_spec.vm.memory_mib,
    template = spec.template,
))]
pub(crate) async fn launch_on_tier(
    tier: &dyn Tier,
    selected: SelectedTier,
    spec: &SandboxSpec,
    launch_spec: &LaunchSpec,
    fetched: FetchedCredentials,
    started: Instant,
) -> Result<Provisioned, Error> {
    let launching = async { tier.launch(launch_spec).await.map_err(Error::from) };
    match spec.limit_time(started, launching).await {
        Ok(launched) => {
            let launched = Launched::new(launched, selected, spec, &launch_spec.vm, started);
            launched.provision(spec, launch_spec.has_policy_files, fetched).await
        }
        Err(error) => {
            fetched.revoke().await;
            Err(error)
        }
    }
}

/// Launches a microVM and provisions it, as [`launch_on_tier`] does.
pub(crate) async fn launch_microvm(
    spec: &SandboxSpec,
    fetched: FetchedCredentials,
    started: Instant,
) -> Result<Provisioned, Error> {
    match spec.microvm_launch_spec() {
        Ok(launch_spec) => {
            let tier = MicrovmTier(spec.artifacts.clone());
            let selected = SelectedTier::microvm();
            launch_on_tier(&tier, selected, spec, &launch_spec, fetched, started).await
        }
        Err(error) => {
            fetched.revoke().await;
            Err(error)
        }
    }
}

impl Launched {
    /// Starts a monitor, with the files of the guest if it is restored.
    pub fn spawn(
        spec: &SandboxSpec,
        vm: &VmSpec,
        files: Option<&GuestFiles>,
        started: Instant,
    ) -> Result<Launched, Error> {
        let (monitor, stream) = microvm::launch_monitor(&spec.artifacts, vm, files)?;
        Ok(Launched::from_monitor(monitor, stream, spec, vm, started))
    }

    /// Takes over a monitor that runs already.
    pub fn from_monitor(
        monitor: Monitor,
        stream: UnixStream,
        spec: &SandboxSpec,
        vm: &VmSpec,
        started: Instant,
    ) -> Launched {
        let spawned = monitor.spawned;
        let launched =
            chitin_tiers::LaunchedInstance { spawned, instance: Box::new(monitor), stream };
        Launched::new(launched, SelectedTier::microvm(), spec, vm, started)
    }

    /// Takes over a launched guest and watches its deadline.
    fn new(
        launched: chitin_tiers::LaunchedInstance,
        selected: SelectedTier,
        spec: &SandboxSpec,
        vm: &VmSpec,
        started: Instant,
    ) -> Launched {
        let copy_grace = spec.copy_grace;
        let deadline = spec.deadline(started);
        let deadline = deadline.map(|(at, limit)| Deadline { at, limit, copy_grace });
        let session = Arc::new(Session::new(launched, vm.memory_bytes(), deadline));
        let guard = deadline.map(|deadline| session.channel.close_at(deadline.at.into_std()));
        let origin = || Box::new(Origin { spec: spec.clone(), vm: vm.clone(), started });
        let origin = spec.forkable.then(origin);
        let policy = spec.policy.clone();
        let guest = LiveGuest { session, selected, policy, origin, deadline_guard: guard };
        Launched { guest, restored: vm.restore }
    }

    /// Waits for the agent. A restored guest is reseeded.
    pub async fn wait_for_agent(self, artifacts: &Artifacts) -> Result<AgentReady, Error> {
        let Launched { guest, restored } = self;
        if guest.selected.tier == TierKind::Ironclaw {
            tokio::select! {
                answered = guest.session.wait_for_agent() => answered?,
                error = watch_slow_start(artifacts) => return Err(error),
            }
        } else {
            guest.session.wait_for_agent().await?;
        }
        tracing::debug!("the agent has answered");
        if restored {
            // Not sent earlier: the message carries the time, so the guest must be listening.
            guest.session.send_reseed()?;
        }
        Ok(AgentReady { guest })
    }

    /// Delivers credentials and enforces the policy. Its files are copied in, unless the guest
    /// `has_policy_files` from the time before it was saved.
    ///
    /// On failure the guest is stopped and issued credentials are revoked.
    #[tracing::instrument(name = "provision", level = "debug", skip_all)]
    pub async fn provision(
        self,
        spec: &SandboxSpec,
        has_policy_files: bool,
        mut fetched: FetchedCredentials,
    ) -> Result<Provisioned, Error> {
        let lease_renewer = fetched.lease_renewer.take();
        let session = self.guest.session.clone();
        match self.provision_guest(spec, has_policy_files, &fetched).await {
            Ok((AgentReady { mut guest }, deliveries)) => {
                guest.add_copy_grace();
                let credentials = Arc::new(deliveries.credentials);
                // Changes that happened meanwhile are queued.
                let rotations = fetched
                    .changes
                    .take()
                    .map(|changes| tokio::spawn(credentials.clone().apply_rotations(changes)));
                let broker = deliveries.broker;
                Ok(Provisioned { guest, broker, credentials, lease_renewer, rotations })
            }
            Err(error) => {
                FetchedCredentials { lease_renewer, ..FetchedCredentials::default() }
                    .revoke()
                    .await;
                // A guest that does not answer may not end by itself. Its failure to end says less
                // than the first error.
                session.channel.close();
                let _ = session.instance.lock().await.stop().await;
                Err(error)
            }
        }
    }

    async fn provision_guest(
        self,
        spec: &SandboxSpec,
        has_policy_files: bool,
        fetched: &FetchedCredentials,
    ) -> Result<(AgentReady, Deliveries), Error> {
        let (ready, mut deliveries) = if self.restored {
            let ready = self.wait_for_agent(&spec.artifacts).await?;
            let deliveries = Deliveries::send(&ready.guest.session, spec, fetched)?;
            (ready, deliveries)
        } else {
            let deliveries = Deliveries::send(&self.guest.session, spec, fetched)?;
            (self.wait_for_agent(&spec.artifacts).await?, deliveries)
        };
        for reply in deliveries.replies.drain(..) {
            ready.session().wait_for_reply(reply).await?;
        }
        if let Some(proxy) = &fetched.proxy {
            install_ca(ready.session(), proxy).await?;
        }
        if !has_policy_files {
            ready.copy_policy_files().await?;
        }
        // Sent to every guest, also to one that was confined before it was saved: its agent
        // compares it with the restrictions that it enforces.
        ready.confine().await?;
        Ok((ready, deliveries))
    }
}

impl AgentReady {
    pub fn session(&self) -> &Arc<Session> {
        &self.guest.session
    }

    /// Copies in the policy's files.
    pub async fn copy_policy_files(&self) -> Result<(), Error> {
        for file in self.guest.policy.iter().flat_map(|policy| &policy.files) {
            copy::copy_in(&self.guest.session, &file.source, &file.path).await?;
        }
        Ok(())
    }

    /// Makes the agent enforce the policy.
    pub async fn confine(&self) -> Result<(), Error> {
        let LiveGuest { session, selected, policy, .. } = &self.guest;
        let Some(policy) = policy else { return Ok(()) };
        let confine = policy.confine(session.channel.next_id(), selected.boundary());
        session.call_agent(confine.request, &ToGuest::Confine(confine)).await
    }
}

/// Requests to the agent that were sent, and the tasks and records that go with them.
struct Deliveries {
    replies: Vec<Reply>,
    broker: Option<JoinHandle<()>>,
    credentials: DeliveredCredentials,
}

impl Deliveries {
    /// Sends the credentials and the egress rules, and starts the broker if there is egress.
    fn send(
        session: &Arc<Session>,
        spec: &SandboxSpec,
        fetched: &FetchedCredentials,
    ) -> Result<Deliveries, Error> {
        let audit = Arc::new(spec.egress.open_audit()?);
        spec.egress.record_deliveries(&audit, fetched.deliveries())?;
        let credentials = DeliveredCredentials::new(session.clone(), fetched, audit.clone());
        let mut replies = Vec::new();
        for CredentialValue { name, delivery, value } in &fetched.values {
            let request = session.channel.next_id();
            let (name, value) = (name.clone(), value.to_bytes());
            let secret = Secret { request, name, value, delivery: *delivery };
            replies.push(session.send_request(request, &ToGuest::Secret(secret))?);
        }
        let mut deliveries = Deliveries { replies, broker: None, credentials };
        if spec.egress.is_enabled() || fetched.aws_server.is_some() {
            deliveries.enable_egress(session, spec, fetched, audit)?;
        }
        Ok(deliveries)
    }

    fn enable_egress(
        &mut self,
        session: &Arc<Session>,
        spec: &SandboxSpec,
        fetched: &FetchedCredentials,
        audit: Arc<AuditLog>,
    ) -> Result<(), Error> {
        let (proxy, aws_server) = (fetched.proxy.clone(), fetched.aws_server.clone());
        let broker = Arc::new(Broker::new(&spec.egress, audit, proxy, aws_server));
        let endpoints = broker.wire_endpoints();
        // Receives requests before the agent may send any.
        let requests = DialRequests::new(&session.channel);
        self.broker = Some(tokio::spawn(broker.serve(requests)));
        let request = session.channel.next_id();
        self.replies.push(session.send_request(request, &ToGuest::Egress { request, endpoints })?);
        Ok(())
    }
}
