//! What a sandbox is to be, and its start.

use std::ffi::OsString;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use chitin_broker::aws::{AwsCredentialServer, PORT as AWS_SERVER_PORT};
use chitin_broker::credentials::{
    CredentialSpec, CredentialValue, FetchedCredentials, fetch_credentials,
};
use chitin_broker::egress::{Broker, EgressSpec};
use chitin_policy::Access;
use chitin_protocol::{Exit, Secret, ToGuest};
use chitin_spec::{
    Delivery, EgressLimits, Endpoint, SecretSource, SecretSpec, TierKind, VaultConfig, VaultSource,
};
use chitin_tiers::microvm::{self, MicrovmTier, Monitor};
use chitin_tiers::{
    GuestFiles, LaunchSpec, Launched, ReadOnlyPath, SelectedTier, Tier, select_tier, tier_of,
};
use chitin_vmm::VmSpec;
use chitin_vmm::control::Request;
use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::channel::Channel;
use crate::credential_delivery::DeliveredCredentials;
use crate::dial_requests::DialRequests;
use crate::fork::Origin;
use crate::session::Session;
use crate::template::{self, Manifest, Templates};
use crate::trust_store::trust;
use crate::{Artifacts, BaselineContainer, Error, Policy, PolicyError, Pool, Sandbox, cleanup};

/// A small static program of every root image that prints its arguments: what there is to run where the sandbox itself is
/// the point.
pub const ECHO: &str = "/usr/lib/chitin/echo";

/// What a template is to know before it is saved.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Warming {
    /// Run in a shell; what it leaves running goes on in each copy.
    pub warm_up: Option<String>,
    /// What copies will run first, [`ECHO`] if empty: the pages it uses are made ready in each copy before it runs. Run
    /// twice for that, and whether it succeeds does not matter.
    pub first: Vec<OsString>,
}

/// Processes and threads of a sandbox at once, where no policy says less: ample for a build, and a fork bomb is held at it.
const MAX_TASKS: u32 = 4096;

/// What a sandbox is to be.
#[derive(Debug, Clone)]
pub struct Builder {
    pub(crate) artifacts: Artifacts,
    /// Without it, the policy's or the default.
    pub(crate) vcpus: Option<u32>,
    pub(crate) memory_mib: Option<u64>,
    pub(crate) console: bool,
    pub(crate) jail: bool,
    pub(crate) timeout: Option<Duration>,
    pub(crate) secrets: Vec<SecretSpec>,
    pub(crate) templates: Option<Templates>,
    pub(crate) template: Option<String>,
    pub(crate) forkable: bool,
    pub(crate) policy: Option<Arc<Policy>>,
    // Boxed: most sandboxes have none.
    pub(crate) egress: Box<EgressSpec>,
    pub(crate) tier: Option<TierKind>,
    pub(crate) fallback: Vec<TierKind>,
    pub(crate) credentials: Box<CredentialSpec>,
}

impl Builder {
    /// Uses other files than [`Artifacts::locate`] finds.
    pub fn artifacts(mut self, artifacts: Artifacts) -> Builder {
        self.artifacts = artifacts;
        self
    }

    /// Virtual CPUs, 1 to [`chitin_vmm::spec::MAX_VCPUS`]; 1 if not set.
    pub fn vcpus(mut self, vcpus: u32) -> Builder {
        self.vcpus = Some(vcpus);
        self
    }

    /// Memory in MiB, [`chitin_vmm::spec::MIN_MEMORY_MIB`] to [`chitin_vmm::spec::MAX_MEMORY_MIB`]; 256 if not set.
    /// GuestFiles the workload writes live in it too.
    pub fn memory_mib(mut self, memory_mib: u64) -> Builder {
        self.memory_mib = Some(memory_mib);
        self
    }

    /// The memory in MiB that each sandbox gets.
    pub(crate) fn memory(&self) -> Result<u64, Error> {
        Ok(self.spec()?.memory_mib.into())
    }

    /// Gives the guest a serial console that goes to this process's standard error.
    pub fn console(mut self, console: bool) -> Builder {
        self.console = console;
        self
    }

    /// Whether the monitor is jailed, which it is if not set. Without a jail a guest that takes over its monitor has what
    /// this process has: its files, its network, its user.
    pub fn jail(mut self, jail: bool) -> Builder {
        self.jail = jail;
        self
    }

    /// Ends the sandbox, whatever it does, when so much time has gone by since its start.
    pub fn timeout(mut self, timeout: Duration) -> Builder {
        self.timeout = Some(timeout);
        self
    }

    /// Hands a credential over, in memory: the workload reads it from the file that `NAME_FILE` names.
    pub fn secret(self, name: impl Into<String>, source: SecretSource) -> Builder {
        self.secret_spec(SecretSpec { name: name.into(), source, delivery: Delivery::Memory })
    }

    /// Hands a credential over, in a way of its own.
    pub fn secret_spec(mut self, secret: SecretSpec) -> Builder {
        self.secrets.push(secret);
        self
    }

    /// Makes each field of a secret of a vault a credential, by the field's name and in memory.
    pub fn credential_source(mut self, source: VaultSource) -> Builder {
        self.credentials.source = Some(source);
        self
    }

    /// Which vault, and how to log in to it. Without it, as the environment of this process says: `VAULT_ADDR` and the like.
    pub fn vault(mut self, vault: VaultConfig) -> Builder {
        self.credentials.vault = Some(vault);
        self
    }

    /// Keeps templates in another place than [`Templates::locate`] finds.
    pub fn templates(mut self, templates: Templates) -> Builder {
        self.templates = Some(templates);
        self
    }

    /// Starts a copy of this template instead of booting. Number of CPUs and size of memory are the template's.
    pub fn template(mut self, name: impl Into<String>) -> Builder {
        self.template = Some(name.into());
        self
    }

    /// Lets the sandbox be [forked](Sandbox::fork). Its monitor then allows the guest a second connection.
    pub fn forkable(mut self, forkable: bool) -> Builder {
        self.forkable = forkable;
        self
    }

    /// Certificates, PEM, that vouch for the endpoints of credentials that do not enter, instead of the system's: for a server with an
    /// authority of its own.
    pub fn trust(mut self, certificates: impl Into<String>) -> Builder {
        self.credentials.trusted = Some(certificates.into());
        self
    }

    /// Holds the sandbox to a policy. Its credentials and files are handed over at the start; numbers that are set beside it
    /// may ask for less than it allows, and no credential may be.
    pub fn policy(mut self, policy: Policy) -> Builder {
        self.policy = Some(Arc::new(policy));
        self
    }

    /// Lets the workload connect to an endpoint, `HOST:PORT` or `*.DOMAIN:PORT`. Without any, it reaches nothing.
    /// What is no endpoint is an error of [`start`](Builder::start).
    pub fn allow(mut self, endpoint: impl AsRef<str>) -> Builder {
        match endpoint.as_ref().parse() {
            Ok(endpoint) => self.egress.allow([endpoint]),
            Err(what) => self.egress.wrong = self.egress.wrong.or(Some(what)),
        }
        self
    }

    /// The same for endpoints that have been read already, such as [`Policy::egress`](crate::Policy::egress).
    pub fn allow_all(mut self, endpoints: impl IntoIterator<Item = Endpoint>) -> Builder {
        self.egress.allow(endpoints);
        self
    }

    /// Lets allowed names resolve to loopback and private addresses. That is for servers of one's own: whoever owns one of
    /// these names can then point it at anything that listens on this host or its networks.
    pub fn allow_private(mut self, allow: bool) -> Builder {
        self.egress.allow_private = allow;
        self
    }

    /// Limits what the workload's connections may use.
    pub fn egress_limits(mut self, limits: EgressLimits) -> Builder {
        self.egress.limits = limits;
        self
    }

    /// Writes a line of JSON to the end of this file for each attempt of the workload to reach something.
    pub fn audit(mut self, path: impl Into<PathBuf>) -> Builder {
        self.egress.audit = Some(path.into());
        self
    }

    /// How it is isolated. If not set, as the policy says; without one, in a microVM.
    pub fn tier(mut self, tier: TierKind) -> Builder {
        self.tier = Some(tier);
        self
    }

    /// What else will do where that cannot be had, in this order. [`Sandbox::chosen`] says which it is.
    pub fn fallback(mut self, fallback: impl IntoIterator<Item = TierKind>) -> Builder {
        self.fallback = fallback.into_iter().collect();
        self
    }

    /// Fetches the secrets, boots, and returns when the agent has answered, holds the secrets and keeps the policy.
    ///
    /// # Errors
    /// Whatever is missing or out of range, before anything is started; then whatever the boot fails with. Nothing is
    /// left running.
    pub async fn start(mut self) -> Result<Sandbox, Error> {
        let started = Instant::now();
        self.keep_policy()?;
        let (tier, chosen) = self.choose().await?;
        let plan = match chosen.tier {
            TierKind::Ironclaw => self.plan()?,
            TierKind::Nanoclaw | TierKind::Nemoclaw => self.container()?,
        };
        let fetched = self.fetch().await?;
        self.begin(tier.as_ref(), chosen, &plan, fetched, started).await
    }

    /// Starts a microVM with what has been fetched.
    pub(crate) async fn begin_microvm(
        &self,
        fetched: FetchedCredentials,
        started: Instant,
    ) -> Result<Sandbox, Error> {
        match self.plan() {
            Ok(plan) => {
                let tier = MicrovmTier(self.artifacts.clone());
                self.begin(&tier, SelectedTier::microvm(), &plan, fetched, started).await
            }
            Err(error) => {
                fetched.revoke().await;
                Err(error)
            }
        }
    }

    /// Starts a sandbox with what has been fetched.
    #[tracing::instrument(name = "launch", skip_all, fields(
        tier = chosen.name(),
        vcpus = plan.spec.vcpus,
        memory_mib = plan.spec.memory_mib,
        template = self.template,
    ))]
    async fn begin(
        &self,
        tier: &dyn Tier,
        chosen: SelectedTier,
        plan: &LaunchSpec,
        fetched: FetchedCredentials,
        started: Instant,
    ) -> Result<Sandbox, Error> {
        let launching = tier.launch(plan);
        let launched = match self.timeout {
            Some(limit) => tokio::time::timeout_at(started + limit, launching)
                .await
                .map_or(Err(Error::Timeout { limit }), |launched| launched.map_err(Error::from)),
            None => launching.await.map_err(Error::from),
        };
        let launched = match launched {
            Ok(launched) => launched,
            Err(error) => {
                fetched.revoke().await;
                return Err(error);
            }
        };
        let mut sandbox = self.attach(launched, &plan.spec, started);
        sandbox.chosen = chosen;
        let session = sandbox.session.clone();
        let up = self.finish(sandbox, plan, fetched).await;
        if up.is_err() {
            // What does not answer may not end by itself either. Why it failed says more than that this does.
            session.channel.close();
            let _ = session.instance.lock().await.stop().await;
        }
        up
    }

    /// What a container is given of it: the limits. What only microVMs have is refused.
    fn container(&self) -> Result<LaunchSpec, Error> {
        if self.template.is_some() || self.forkable {
            return Err(Error::NoMicrovm);
        }
        self.egress.check()?;
        Ok(self.plan_of(self.spec()?, None, false))
    }

    fn plan_of(&self, spec: VmSpec, files: Option<GuestFiles>, confined: bool) -> LaunchSpec {
        let limits = self.policy.as_ref().map(|policy| &policy.limits);
        let disk_bytes = limits.and_then(|limits| limits.disk_mib).map(|mib| u64::from(mib) << 20);
        let shared = self.policy.iter().flat_map(|policy| &policy.files);
        let fixed =
            shared.filter(|file| file.access == Access::ReadOnly).map(|file| ReadOnlyPath {
                path: file.path.clone(),
                // One that is not there is refused when it is copied.
                directory: file.source.is_dir(),
            });
        let tasks = limits.map_or(MAX_TASKS, |limits| limits.pids);
        LaunchSpec { spec, files, confined, tasks, disk_bytes, fixed: fixed.collect() }
    }

    /// The tiers that will do, in this order: those of the policy, which none may be added to, and of them the one that was
    /// asked for; or what was asked for.
    fn wanted(&self) -> Result<Vec<TierKind>, Error> {
        let asked = self.tier.into_iter().chain(self.fallback.iter().copied());
        let Some(policy) = &self.policy else {
            let first = self.tier.is_none().then_some(TierKind::Ironclaw);
            return Ok(first.into_iter().chain(asked).collect());
        };
        // Why none of them will do, if none does.
        policy.tier()?;
        let listed: Vec<TierKind> = policy.tiers().collect();
        let asked: Vec<TierKind> = asked.collect();
        if let Some(tier) = asked.iter().find(|tier| !listed.contains(tier)) {
            return Err(PolicyError::Tier { origin: policy.origin.clone(), tier: *tier }.into());
        }
        let asked = if asked.is_empty() { listed } else { asked };
        let able: Vec<TierKind> =
            asked.iter().copied().filter(|tier| policy.check_tier(*tier).is_ok()).collect();
        match (able.is_empty(), asked.first()) {
            (true, Some(tier)) => policy.check_tier(*tier).map(|()| able).map_err(Error::from),
            _ => Ok(able),
        }
    }

    /// The tier it will be.
    async fn choose(&self) -> Result<(Box<dyn Tier>, SelectedTier), Error> {
        let mut wanted: Vec<TierKind> = Vec::new();
        for tier in self.wanted()? {
            if !wanted.contains(&tier) {
                wanted.push(tier);
            }
        }
        if wanted == [TierKind::Ironclaw] {
            // The start says itself what is missing, and a probe takes time.
            return Ok((Box::new(MicrovmTier(self.artifacts.clone())), SelectedTier::microvm()));
        }
        let tier = |tier| tier_of(tier, &self.artifacts, cleanup::tracker());
        Ok(select_tier(wanted.into_iter().map(tier).collect()).await?)
    }

    /// The same container with this command in it and nothing of Chitin, to be measured beside; none of a microVM, which is
    /// nothing without a monitor.
    ///
    /// # Errors
    /// The tier cannot be had here, or something asked for is out of range.
    pub async fn bare(&self, argv: &[String]) -> Result<Option<BaselineContainer>, Error> {
        let (_, chosen) = self.choose().await?;
        let plan = self.container()?;
        let cleanup = cleanup::tracker();
        let made = BaselineContainer::create(chosen.tier, &self.artifacts, &plan, argv, cleanup);
        Ok(made.await?)
    }

    /// Keeps `size` monitors that have done all there is to be done before a guest runs, each for one sandbox.
    ///
    /// # Errors
    /// As for [`start`](Builder::start), for the first of them; a size of 0 or over [`MAX_POOL`](crate::pool::MAX_POOL).
    pub async fn pool(mut self, size: usize) -> Result<Pool, Error> {
        self.keep_policy()?;
        Pool::new(self, size).await
    }

    /// What a monitor is given.
    pub(crate) fn plan(&self) -> Result<LaunchSpec, Error> {
        let (mut spec, mut files, mut confined) = (self.spec()?, None, false);
        self.artifacts.check()?;
        self.egress.check()?;
        if let Some(name) = &self.template {
            let templates = self.place()?;
            let manifest = templates.inspect(name)?;
            (spec.vcpus, spec.memory_mib) = (manifest.vcpus, manifest.memory_mib);
            confined = self.check_template(&manifest)?;
            self.restore(&mut spec)?;
            files = Some(templates.open(name)?);
        }
        Ok(self.plan_of(spec, files, confined))
    }

    /// Fetches the secrets.
    pub(crate) async fn fetch(&self) -> Result<FetchedCredentials, Error> {
        let served = self.secrets.iter().find(|secret| secret.delivery == Delivery::Endpoint);
        if let Some(secret) = served
            && self
                .egress
                .endpoints
                .iter()
                .any(|endpoint| AwsCredentialServer::is_at(&endpoint.host, endpoint.port))
        {
            let reason = format!(
                "localhost:{AWS_SERVER_PORT} is its endpoint in the sandbox, and cannot be allowed beside it"
            );
            return Err(Error::Secret { name: secret.name.clone(), reason });
        }
        Ok(fetch_credentials(&self.secrets, &self.credentials, cleanup::tracker()).await?)
    }

    /// Makes what has been launched the sandbox that was asked for.
    #[tracing::instrument(name = "provision", level = "debug", skip_all)]
    pub(crate) async fn finish(
        &self,
        sandbox: Sandbox,
        plan: &LaunchSpec,
        mut fetched: FetchedCredentials,
    ) -> Result<Sandbox, Error> {
        let (keeper, changes) = (fetched.lease_renewer.take(), fetched.changes.take());
        let keys = fetched.aws_server.clone();
        let finishing = async {
            let sandbox = self.up(sandbox, plan.spec.restore, &fetched).await?;
            if let Some(proxy) = &fetched.proxy {
                trust(&sandbox.session, proxy).await?;
            }
            if !plan.confined {
                sandbox.confine().await?;
            }
            Ok(sandbox)
        };
        match finishing.await {
            Ok(mut sandbox) => {
                (sandbox.keeper, sandbox.keys) = (keeper, keys);
                // What has changed meanwhile is there to be read.
                let followed = sandbox.handed.clone().zip(changes);
                sandbox.following =
                    followed.map(|(handed, changes)| tokio::spawn(handed.apply_rotations(changes)));
                Ok(sandbox)
            }
            Err(error) => {
                FetchedCredentials { lease_renewer: keeper, ..FetchedCredentials::default() }
                    .revoke()
                    .await;
                Err(error)
            }
        }
    }

    /// Waits for the agent, which gets the secrets, after it has been made another one where it is a copy.
    pub(crate) async fn up(
        &self,
        mut sandbox: Sandbox,
        copy: bool,
        fetched: &FetchedCredentials,
    ) -> Result<Sandbox, Error> {
        let mut answers = Vec::new();
        if copy {
            // It is the first thing that a copy is told, and not before it listens: the time is in it.
            sandbox.up().await?;
            sandbox.session.reseed()?;
        }
        let audit = Arc::new(self.egress.open_audit()?);
        self.egress.record_deliveries(&audit, fetched.deliveries())?;
        let handed = DeliveredCredentials::new(sandbox.session.clone(), fetched, audit.clone());
        for CredentialValue { name, delivery, value } in &fetched.values {
            let request = sandbox.session.channel.name();
            let secret = Secret {
                request,
                name: name.clone(),
                value: value.to_bytes(),
                delivery: *delivery,
            };
            answers.push(sandbox.session.ask(request, &ToGuest::Secret(secret))?);
        }
        if self.egress.is_on() || fetched.aws_server.is_some() {
            let channel = sandbox.session.channel.clone();
            let (proxy, keys) = (fetched.proxy.clone(), fetched.aws_server.clone());
            let broker = Broker::new(&self.egress, audit, proxy, keys);
            let (endpoints, broker) = (broker.wire(), Arc::new(broker));
            sandbox.broker = Some(tokio::spawn(broker.serve(DialRequests::of(&channel))));
            let request = channel.name();
            answers.push(sandbox.session.ask(request, &ToGuest::Egress { request, endpoints })?);
        }
        sandbox.up().await?;
        tracing::debug!("the agent has answered");
        for answer in answers {
            sandbox.session.answered(answer).await?;
        }
        sandbox.handed = Some(Arc::new(handed));
        Ok(sandbox)
    }

    /// Boots, warms up, saves what there is then as a template of that name, and tries it out once, which tells which pages
    /// a copy needs first. A template of that name is replaced when all has gone well.
    ///
    /// # Errors
    /// As for [`start`](Builder::start); secrets are refused; the warm-up command fails.
    #[tracing::instrument(name = "template", skip_all, fields(name))]
    pub async fn build_template(
        mut self,
        name: &str,
        warming: &Warming,
    ) -> Result<Manifest, Error> {
        if let Some(secret) = self.secrets.first() {
            let reason = "a template would be a copy of it on disk".into();
            return Err(Error::Secret { name: secret.name.clone(), reason });
        }
        let started = Instant::now();
        self.keep_policy()?;
        let mut spec = self.spec()?;
        self.artifacts.check()?;
        let draft = self.place()?.draft(name)?;

        spec.template = true;
        let sandbox = self.launch(&spec, None, started)?;
        sandbox.up().await?;
        sandbox.confine().await?;
        if let Some(script) = &warming.warm_up {
            let output = sandbox.command("/bin/sh").args(["-c", script]).output().await?;
            if output.exit != Exit::Code(0) {
                let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
                return Err(Error::WarmUp { exit: output.exit, stderr });
            }
        }
        // What a copy starts first is started once here, so that the saved kernel knows the way.
        sandbox.trial(&warming.first).await?;
        let request = sandbox.session.channel.name();
        sandbox.session.request(request, &ToGuest::Freeze { request }).await?;
        let files = draft.files()?;
        let binding = self.restore(&mut spec)?;
        sandbox.save(&Request::Snapshot { binding }, &files).await?;

        (spec.template, spec.record) = (false, true);
        let copy = self.launch(&spec, Some(&draft.saved()?), Instant::now())?;
        copy.up().await?;
        copy.session.reseed()?;
        copy.trial(&warming.first).await?;
        copy.record(&draft.new_state()?, &draft.key()?).await?;

        let manifest = Manifest {
            name: name.into(),
            chitin: env!("CARGO_PKG_VERSION").into(),
            created: template::now(),
            vcpus: spec.vcpus,
            memory_mib: spec.memory_mib,
            warm_up: warming.warm_up.clone(),
            policy: self.policy.as_ref().map(|policy| policy.digest.clone()),
            memory_bytes: 0,
        };
        Ok(draft.publish(manifest)?)
    }

    /// Makes the policy's the builder's own, if it can be kept. Doing it again changes nothing.
    fn keep_policy(&mut self) -> Result<(), PolicyError> {
        let Some(policy) = &self.policy else {
            // To name a credential's hosts is to let the workload reach them.
            for secret in &self.secrets {
                if let Delivery::Proxy(reach) = &secret.delivery {
                    self.egress.allow(reach.hosts.iter().cloned());
                }
            }
            return Ok(());
        };
        policy.tier()?;
        if let Some(secret) = self.secrets.iter().find(|secret| !policy.secrets.contains(secret)) {
            return Err(PolicyError::Secret {
                origin: policy.origin.clone(),
                name: secret.name.clone(),
            });
        }
        if let Some(endpoint) =
            self.egress.endpoints.iter().find(|endpoint| !policy.may_reach(endpoint))
        {
            return Err(PolicyError::Egress {
                origin: policy.origin.clone(),
                endpoint: endpoint.clone(),
            });
        }
        if self.egress.endpoints.is_empty() {
            self.egress.allow(policy.egress.iter().cloned());
        }
        let limits = &policy.limits;
        let vcpus = policy.tighten("vcpus", self.vcpus.map(u64::from), limits.vcpus)?;
        self.vcpus = Some(u32::try_from(vcpus).unwrap_or(u32::MAX));
        self.memory_mib = Some(policy.tighten("memory_mib", self.memory_mib, limits.memory_mib)?);
        self.timeout = policy.tighten_timeout(self.timeout)?;
        self.secrets.clone_from(&policy.secrets);
        self.credentials.source.clone_from(&policy.credential_source);
        if let Some(image) = &policy.image {
            self.artifacts.root_image.clone_from(image);
        }
        Ok(())
    }

    /// Whether copies of this template are confined as they come. What its warm-up left running is confined by what it was built
    /// under, so that has to be this policy, or none.
    fn check_template(&self, manifest: &Manifest) -> Result<bool, PolicyError> {
        let mine = self.policy.as_ref().map(|policy| &policy.digest);
        let other = |built: &str| PolicyError::Template {
            template: manifest.name.clone(),
            built: built.into(),
        };
        if let Some(policy) = &self.policy {
            policy.tighten(
                "the template's vcpus",
                Some(manifest.vcpus.into()),
                policy.limits.vcpus,
            )?;
            policy.tighten(
                "the template's memory_mib",
                Some(manifest.memory_mib.into()),
                policy.limits.memory_mib,
            )?;
        }
        match (&manifest.policy, mine) {
            (Some(built), Some(mine)) if built == mine => Ok(true),
            (Some(_), Some(_)) => Err(other("another policy, or another version of this one")),
            (Some(_), None) => Err(other("a policy, which --policy has to name")),
            (None, _) => Ok(false),
        }
    }

    fn place(&self) -> Result<Templates, Error> {
        match &self.templates {
            Some(templates) => Ok(templates.clone()),
            None => Ok(Templates::locate()?),
        }
    }

    /// Makes it the specification of a copy. Returns what a saved guest is bound to.
    pub(crate) fn restore(&self, spec: &mut VmSpec) -> Result<String, Error> {
        spec.restore = true;
        spec.kernel = PathBuf::new();
        spec.binding = template::binding(&self.artifacts.root_image)
            .map_err(|source| Error::Host { what: "look at the root image", source })?;
        Ok(spec.binding.clone())
    }

    /// Starts a monitor and everything that watches it. Dropping what comes back ends it.
    pub(crate) fn launch(
        &self,
        spec: &VmSpec,
        files: Option<&GuestFiles>,
        started: Instant,
    ) -> Result<Sandbox, Error> {
        let (monitor, stream) = microvm::launch(&self.artifacts, spec, files)?;
        Ok(self.watch(monitor, stream, spec, started))
    }

    /// The same for a monitor that runs already.
    pub(crate) fn watch(
        &self,
        monitor: Monitor,
        stream: UnixStream,
        spec: &VmSpec,
        started: Instant,
    ) -> Sandbox {
        let launched = Launched { spawned: monitor.spawned, instance: Box::new(monitor), stream };
        self.attach(launched, spec, started)
    }

    /// A sandbox whose time counts from `started`.
    fn attach(&self, mut launched: Launched, spec: &VmSpec, started: Instant) -> Sandbox {
        let reported = launched.instance.monitor().map(|monitor| monitor.reported.clone());
        let session = Arc::new(Session {
            channel: Channel::new(launched.stream),
            spawned: launched.spawned,
            reported,
            instance: Mutex::new(launched.instance),
            memory_bytes: spec.memory_bytes(),
            environment: OnceLock::new(),
            timeout: self.timeout.map(|limit| (started + limit, limit)),
            reseeded: std::sync::Mutex::default(),
        });
        let clock = session.timeout.map(|(deadline, _)| {
            let channel = session.channel.clone();
            tokio::spawn(async move {
                tokio::time::sleep_until(deadline).await;
                channel.close();
            })
        });
        let origin = || Box::new(Origin { builder: self.clone(), spec: spec.clone(), started });
        let policy = self.policy.clone();
        let (chosen, origin) = (SelectedTier::microvm(), self.forkable.then(origin));
        Sandbox {
            session,
            clock,
            broker: None,
            keeper: None,
            keys: None,
            handed: None,
            following: None,
            chosen,
            origin,
            policy,
        }
    }

    fn spec(&self) -> Result<VmSpec, Error> {
        let mut spec = VmSpec::new(&self.artifacts.kernel, &self.artifacts.root_image);
        // What does not fit the field is out of range too: let the one check say so, with the range.
        if let Some(vcpus) = self.vcpus {
            spec.vcpus = u8::try_from(vcpus).unwrap_or(u8::MAX);
        }
        if let Some(memory_mib) = self.memory_mib {
            spec.memory_mib = u32::try_from(memory_mib).unwrap_or(u32::MAX);
        }
        spec.console = self.console;
        spec.template = self.forkable;
        spec.jail = self.jail;
        spec.validate()?;
        Ok(spec)
    }
}
