//! The settings of a sandbox, and its start.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use chitin_broker::credentials::CredentialSpec;
use chitin_broker::egress::{EgressSpec, RefusalObserver, RefusedEgress};
use chitin_policy::{Consent, Policy, PolicyError};
use chitin_spec::{
    Delivery, EgressLimits, Endpoint, SecretSource, SecretSpec, TierKind, VaultConfig, VaultSource,
};
use chitin_tiers::{Artifacts, BaselineContainer};
use chitin_vmm::VmSpec;
use tokio::time::Instant;

use crate::cleanup;
use crate::error::Error;
use crate::launch;
use crate::sandbox::Sandbox;
use crate::spec::SandboxSpec;
use crate::template::build::{WarmUpSpec, build_template};
use crate::template::{Manifest, Templates};

/// The settings of a sandbox. [`Sandbox::builder`] has the defaults.
#[derive(Debug, Clone)]
pub struct Builder {
    artifacts: Artifacts,
    /// If not set, the policy's or the default.
    vcpus: Option<u32>,
    /// If not set, the policy's or the default.
    memory_mib: Option<u64>,
    console: bool,
    jail: bool,
    private_memory: bool,
    timeout: Option<Duration>,
    copy_grace: Duration,
    secrets: Vec<SecretSpec>,
    templates: Option<Templates>,
    template: Option<String>,
    forkable: bool,
    policy: Option<Arc<Policy>>,
    consents: Vec<Consent>,
    // Boxed: most sandboxes have none.
    egress: Box<EgressSpec>,
    tier: Option<TierKind>,
    fallback: Vec<TierKind>,
    credentials: Box<CredentialSpec>,
}

impl Builder {
    /// Creates the default settings.
    pub(crate) fn new() -> Builder {
        Builder {
            artifacts: Artifacts::locate(),
            vcpus: None,
            memory_mib: None,
            console: false,
            jail: true,
            private_memory: false,
            timeout: None,
            copy_grace: Duration::ZERO,
            secrets: Vec::new(),
            templates: None,
            template: None,
            forkable: false,
            policy: None,
            consents: Vec::new(),
            egress: Box::default(),
            tier: None,
            fallback: Vec::new(),
            credentials: Box::default(),
        }
    }

    /// Uses these files instead of those that [`Artifacts::locate`] finds.
    pub fn artifacts(mut self, artifacts: Artifacts) -> Builder {
        self.artifacts = artifacts;
        self
    }

    /// Sets the number of virtual CPUs, 1 to [`chitin_vmm::spec::MAX_VCPUS`]; 1 if not set.
    pub fn vcpus(mut self, vcpus: u32) -> Builder {
        self.vcpus = Some(vcpus);
        self
    }

    /// Sets the memory in MiB, [`chitin_vmm::spec::MIN_MEMORY_MIB`] to
    /// [`chitin_vmm::spec::MAX_MEMORY_MIB`]; 256 if not set. Files that the workload writes are
    /// kept in it as well.
    pub fn memory_mib(mut self, memory_mib: u64) -> Builder {
        self.memory_mib = Some(memory_mib);
        self
    }

    /// Gives the guest a serial console that writes to this process's standard error.
    pub fn console(mut self, console: bool) -> Builder {
        self.console = console;
        self
    }

    /// Turns the monitor's jail on or off; on if not set. Without a jail, a guest that takes over
    /// its monitor has the rights of this process: its files, its network, its user.
    pub fn jail(mut self, jail: bool) -> Builder {
        self.jail = jail;
        self
    }

    /// Copies kernel, root image and the memory of a template for this sandbox alone, instead of
    /// sharing their pages with every other sandbox of the host; off if not set. Through shared
    /// pages, a guest can observe by the time of its accesses which of them another guest uses, on
    /// any core. Costs the size of the root image in memory and the time to copy it. Only microVMs
    /// have it, so that no other tier is used.
    pub fn private_memory(mut self, private_memory: bool) -> Builder {
        self.private_memory = private_memory;
        self
    }

    /// Ends the sandbox this long after its start, whatever it does.
    pub fn timeout(mut self, timeout: Duration) -> Builder {
        self.timeout = Some(timeout);
        self
    }

    /// Keeps a sandbox that has started for this long after its time limit, so that the results of
    /// an unfinished command can be copied out; none if not set.
    ///
    /// [`Process::wait`](crate::Process::wait) kills its command at the limit and returns
    /// [`Error::Timeout`], and no command starts afterwards. A hostile guest can use this time too.
    pub fn copy_grace(mut self, grace: Duration) -> Builder {
        self.copy_grace = grace;
        self
    }

    /// Delivers a credential in memory: the workload reads it from the file that `NAME_FILE` names.
    pub fn secret(self, name: impl Into<String>, source: SecretSource) -> Builder {
        self.secret_spec(SecretSpec { name: name.into(), source, delivery: Delivery::Memory })
    }

    /// Delivers a credential in the way that its specification names.
    pub fn secret_spec(mut self, secret: SecretSpec) -> Builder {
        self.secrets.push(secret);
        self
    }

    /// Delivers each field of a Vault secret as a credential in memory, named after the field.
    pub fn credential_source(mut self, source: VaultSource) -> Builder {
        self.credentials.source = Some(source);
        self
    }

    /// Sets the Vault server and the login. If not set, they are read from the environment of this
    /// process: `VAULT_ADDR` and related variables.
    pub fn vault(mut self, vault: VaultConfig) -> Builder {
        self.credentials.vault = Some(vault);
        self
    }

    /// Uses this template directory instead of the one that [`Templates::locate`] finds.
    pub fn templates(mut self, templates: Templates) -> Builder {
        self.templates = Some(templates);
        self
    }

    /// Starts a copy of this template instead of booting. The number of CPUs and the memory size
    /// are the template's.
    pub fn template(mut self, name: impl Into<String>) -> Builder {
        self.template = Some(name.into());
        self
    }

    /// Allows the sandbox to be [forked](Sandbox::fork). Its monitor then allows the guest a second
    /// connection.
    pub fn forkable(mut self, forkable: bool) -> Builder {
        self.forkable = forkable;
        self
    }

    /// Sets the CA certificates, PEM, that proxied credentials' hosts are verified against, instead
    /// of the system's: for a server with a private CA.
    pub fn trust(mut self, certificates: impl Into<String>) -> Builder {
        self.credentials.trusted = Some(certificates.into());
        self
    }

    /// Enforces a policy on the sandbox. Its credentials and files are delivered at the start.
    /// Numbers set here may be lower than the policy's; a credential must be listed in it.
    ///
    /// A policy that uses the host (commands, environment, files, Vault, another image) is refused
    /// without [`policy_may`](Builder::policy_may).
    pub fn policy(mut self, policy: Policy) -> Builder {
        self.policy = Some(Arc::new(policy));
        self
    }

    /// Consents to what the policy does on the host: runs commands, reads the environment, files or
    /// Vault, writes files back, boots another image. [`Policy::host_uses`] lists it. A credential
    /// that is also set here with the same source needs no further consent.
    pub fn policy_may(mut self, consents: impl IntoIterator<Item = Consent>) -> Builder {
        self.consents.extend(consents);
        self
    }

    /// Lets the workload connect to an endpoint, `HOST:PORT` or `*.DOMAIN:PORT`. Without any, it
    /// reaches nothing. An invalid endpoint is reported by [`start`](Builder::start).
    pub fn allow(mut self, endpoint: impl AsRef<str>) -> Builder {
        match endpoint.as_ref().parse() {
            Ok(endpoint) => self.egress.allow_endpoints([endpoint]),
            Err(error) => self.egress.invalid = self.egress.invalid.or(Some(error)),
        }
        self
    }

    /// Lets the workload connect to endpoints that are parsed already, such as
    /// [`Policy::egress`](crate::Policy::egress).
    pub fn allow_all(mut self, endpoints: impl IntoIterator<Item = Endpoint>) -> Builder {
        self.egress.allow_endpoints(endpoints);
        self
    }

    /// Lets allowed names resolve to loopback and private addresses. Use it for test servers: the
    /// owner of such a name can point it at anything that listens on this host or its networks.
    pub fn allow_private(mut self, allow: bool) -> Builder {
        self.egress.allow_private = allow;
        self
    }

    /// Limits the workload's connections.
    pub fn egress_limits(mut self, limits: EgressLimits) -> Builder {
        self.egress.limits = limits;
        self
    }

    /// Appends a line of JSON to this file for each connection that the workload attempts.
    pub fn audit(mut self, path: impl Into<PathBuf>) -> Builder {
        self.egress.audit = Some(path.into());
        self
    }

    /// Calls a function for each distinct refusal of egress, at most some twenty at once and one a
    /// minute. Inside the sandbox a refusal looks like a broken network. The function must not
    /// block.
    pub fn on_refused_egress(
        mut self,
        observe: impl Fn(RefusedEgress) + Send + Sync + 'static,
    ) -> Builder {
        self.egress.observer = Some(RefusalObserver::new(observe));
        self
    }

    /// Sets the tier. If not set, the policy's; without a policy, a microVM.
    pub fn tier(mut self, tier: TierKind) -> Builder {
        self.tier = Some(tier);
        self
    }

    /// Sets the tiers to try, in order, if the first is unavailable. [`Sandbox::selected_tier`]
    /// reports the one in use.
    pub fn fallback(mut self, fallback: impl IntoIterator<Item = TierKind>) -> Builder {
        self.fallback = fallback.into_iter().collect();
        self
    }

    /// Starts the sandbox. Returns when the agent has answered, holds the credentials and enforces
    /// the policy.
    ///
    /// # Errors
    /// A setting that is missing, contradictory or out of range, before anything is started; then a
    /// failure of the launch. Nothing is left running.
    pub async fn start(self) -> Result<Sandbox, Error> {
        let started = Instant::now();
        let spec = self.validate()?;
        let (tier, selected) = spec.limit_time(started, spec.select_tier()).await?;
        let launch_spec = spec.launch_spec(selected.tier)?;
        let fetched = spec.limit_time(started, spec.fetch_credentials()).await?;
        let provisioned =
            launch::launch_on_tier(tier.as_ref(), selected, &spec, &launch_spec, fetched, started);
        Ok(Sandbox::from(provisioned.await?))
    }

    /// Creates the container of the selected tier with this command and without Chitin's agent, as
    /// the baseline of a benchmark. Returns `None` on a microVM, which cannot run without a
    /// monitor.
    ///
    /// # Errors
    /// The tier is unavailable on this host, or a setting is out of range.
    pub async fn create_baseline(
        self,
        argv: &[String],
    ) -> Result<Option<BaselineContainer>, Error> {
        let spec = self.validate()?;
        let (_, selected) = spec.select_tier().await?;
        let launch_spec = spec.container_launch_spec()?;
        let cleanup = cleanup::tracker();
        let created =
            BaselineContainer::create(selected.tier, &spec.artifacts, &launch_spec, argv, cleanup);
        Ok(created.await?)
    }

    /// Boots a guest, warms it up and saves it as a template of this name. Then starts one copy of
    /// it to record the pages that a copy needs first. An existing template is replaced only when
    /// all of this has succeeded.
    ///
    /// # Errors
    /// As for [`start`](Builder::start); in addition, a credential is set, no acceptable tier is a
    /// microVM, or the warm-up command fails.
    #[tracing::instrument(name = "template", skip_all, fields(name))]
    pub async fn build_template(self, name: &str, warm_up: &WarmUpSpec) -> Result<Manifest, Error> {
        if let Some(secret) = self.secrets.first() {
            return Err(Error::SecretInTemplate { name: secret.name.clone() });
        }
        build_template(self.validate()?, name, warm_up).await
    }

    /// Applies the policy and checks that the settings agree.
    pub(crate) fn validate(mut self) -> Result<SandboxSpec, Error> {
        self.check_secret_names()?;
        match self.policy.clone() {
            Some(policy) => self.apply_policy(&policy)?,
            None => self.allow_proxied_hosts(),
        }
        let mut tiers = self.list_acceptable_tiers()?;
        if self.private_memory {
            tiers.retain(|tier| *tier == TierKind::Ironclaw);
            if tiers.is_empty() {
                return Err(Error::PrivateMemory);
            }
        }
        let vm = self.build_vm_spec()?;
        Ok(SandboxSpec {
            artifacts: self.artifacts,
            vm,
            tiers,
            timeout: self.timeout,
            copy_grace: self.copy_grace,
            secrets: self.secrets,
            credentials: self.credentials,
            egress: self.egress,
            policy: self.policy,
            templates: self.templates,
            template: self.template,
            forkable: self.forkable,
        })
    }

    /// Checks that no credential would replace another one of its name.
    fn check_secret_names(&self) -> Result<(), Error> {
        for (index, secret) in self.secrets.iter().enumerate() {
            if self.secrets[..index].iter().any(|earlier| earlier.name == secret.name) {
                return Err(Error::DuplicateCredential { name: secret.name.clone() });
            }
        }
        Ok(())
    }

    /// Adds the hosts of proxied credentials to the allowed endpoints: naming a credential's hosts
    /// lets the workload reach them.
    fn allow_proxied_hosts(&mut self) {
        for secret in &self.secrets {
            if let Delivery::Proxy(scope) = &secret.delivery {
                self.egress.allow_endpoints(scope.hosts.iter().cloned());
            }
        }
    }

    /// Replaces settings by the policy's, after a check that none asks for more than it allows.
    fn apply_policy(&mut self, policy: &Policy) -> Result<(), PolicyError> {
        policy.tier()?;
        policy.check_consent(&self.consents, &self.secrets)?;
        let unlisted = self.secrets.iter().find(|secret| !policy.secrets.contains(secret));
        if let Some(secret) = unlisted {
            let (origin, name) = (policy.origin.clone(), secret.name.clone());
            return Err(PolicyError::Secret { origin, name });
        }
        let unlisted = self.egress.endpoints.iter().find(|endpoint| !policy.may_reach(endpoint));
        if let Some(endpoint) = unlisted {
            let (origin, endpoint) = (policy.origin.clone(), endpoint.clone());
            return Err(PolicyError::Egress { origin, endpoint });
        }
        if self.egress.endpoints.is_empty() {
            self.egress.allow_endpoints(policy.egress.iter().cloned());
        }
        let limits = &policy.limits;
        let vcpus = policy.tighten("vcpus", self.vcpus.map(u64::from), limits.vcpus)?;
        self.vcpus = Some(u32::try_from(vcpus).unwrap_or(u32::MAX));
        self.memory_mib = Some(policy.tighten("memory_mib", self.memory_mib, limits.memory_mib)?);
        self.timeout = policy.tighten_timeout(self.timeout)?;
        self.private_memory |= policy.private_memory;
        self.secrets.clone_from(&policy.secrets);
        self.credentials.source.clone_from(&policy.credential_source);
        if let Some(image) = &policy.image {
            self.artifacts.root_image.clone_from(image);
        }
        Ok(())
    }

    /// Lists the acceptable tiers, the preferred first, each once. A policy's list cannot be
    /// extended, only narrowed to the tiers that were asked for and that can enforce the policy.
    fn list_acceptable_tiers(&self) -> Result<Vec<TierKind>, Error> {
        let asked: Vec<TierKind> =
            self.tier.into_iter().chain(self.fallback.iter().copied()).collect();
        let Some(policy) = &self.policy else {
            let default = self.tier.is_none().then_some(TierKind::Ironclaw);
            return Ok(without_duplicates(default.into_iter().chain(asked)));
        };
        let listed: Vec<TierKind> = policy.tiers().collect();
        if let Some(tier) = asked.iter().find(|tier| !listed.contains(tier)) {
            return Err(PolicyError::Tier { origin: policy.origin.clone(), tier: *tier }.into());
        }
        let asked = if asked.is_empty() { listed } else { asked };
        let able = asked.iter().copied().filter(|tier| policy.check_tier(*tier).is_ok());
        let able = without_duplicates(able);
        if able.is_empty() {
            // The first one's reason is the one to report.
            asked.first().map_or(Ok(()), |tier| policy.check_tier(*tier))?;
        }
        Ok(able)
    }

    fn build_vm_spec(&self) -> Result<VmSpec, Error> {
        let mut vm = VmSpec::new(&self.artifacts.kernel, &self.artifacts.root_image);
        // A number that does not fit the field is out of range as well: `validate` reports it, with
        // the range.
        if let Some(vcpus) = self.vcpus {
            vm.vcpus = u8::try_from(vcpus).unwrap_or(u8::MAX);
        }
        if let Some(memory_mib) = self.memory_mib {
            vm.memory_mib = u32::try_from(memory_mib).unwrap_or(u32::MAX);
        }
        vm.console = self.console;
        vm.template = self.forkable;
        vm.jail = self.jail;
        vm.private_memory = self.private_memory;
        vm.validate()?;
        Ok(vm)
    }
}

fn without_duplicates(tiers: impl Iterator<Item = TierKind>) -> Vec<TierKind> {
    let mut unique = Vec::new();
    for tier in tiers {
        if !unique.contains(&tier) {
            unique.push(tier);
        }
    }
    unique
}

#[cfg(test)]
#[path = "builder_test.rs"]
mod tests;
