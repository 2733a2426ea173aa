//! The specification of a sandbox after validation: settings, policy and limits agree.

use std::sync::Arc;
use std::time::Duration;

use chitin_broker::aws::{AwsCredentialServer, PORT as AWS_SERVER_PORT};
use chitin_broker::credentials::{CredentialSpec, FetchedCredentials, fetch_credentials};
use chitin_broker::egress::EgressSpec;
use chitin_policy::{Access, Policy};
use chitin_spec::{Delivery, SecretSpec, TierKind};
use chitin_tiers::microvm::MicrovmTier;
use chitin_tiers::{
    Artifacts, GuestFiles, LaunchSpec, ReadOnlyPath, SelectedTier, Tier, select_tier, tier_of,
};
use chitin_vmm::{HostError, VmSpec};
use tokio::time::Instant;

use crate::cleanup;
use crate::error::Error;
use crate::kvm_verdict::recall_verdict;
use crate::template::restore::{bind_to_root_image, check_policy};
use crate::template::{OpenTemplate, TemplateError, Templates};

/// Processes and threads of a sandbox if no policy sets fewer: ample for a build, and a fork bomb
/// is stopped by it.
pub(crate) const MAX_TASKS: u32 = 4096;

/// The settings of a sandbox under its policy. Nothing is opened or started yet.
#[derive(Debug, Clone)]
pub(crate) struct SandboxSpec {
    pub artifacts: Artifacts,
    pub vm: VmSpec,
    /// The acceptable tiers, the preferred first.
    pub tiers: Vec<TierKind>,
    pub timeout: Option<Duration>,
    /// The time after `timeout` in which files can still be copied out.
    pub copy_grace: Duration,
    pub secrets: Vec<SecretSpec>,
    pub credentials: Box<CredentialSpec>,
    pub egress: Box<EgressSpec>,
    pub policy: Option<Arc<Policy>>,
    pub templates: Option<Templates>,
    /// The template to copy instead of booting.
    pub template: Option<String>,
    pub forkable: bool,
}

impl SandboxSpec {
    /// Returns the moment at which the time limit is reached, and the limit. One that is too far
    /// away for the clock is none.
    pub fn deadline(&self, started: Instant) -> Option<(Instant, Duration)> {
        let limit = self.timeout?;
        // The time for copies must be representable as well.
        let end = started.checked_add(limit)?.checked_add(self.copy_grace)?;
        Some((end - self.copy_grace, limit))
    }

    /// Awaits a step of the start, at most until the time limit.
    pub async fn limit_time<T>(
        &self,
        started: Instant,
        step: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        match self.deadline(started) {
            Some((at, limit)) => {
                tokio::time::timeout_at(at, step).await.unwrap_or(Err(Error::Timeout { limit }))
            }
            None => step.await,
        }
    }

    /// Selects the first acceptable tier that is available on this host.
    pub async fn select_tier(&self) -> Result<(Box<dyn Tier>, SelectedTier), Error> {
        if self.tiers == [TierKind::Ironclaw] {
            // A launch reports by itself what is missing, and a probe takes time.
            return Ok((Box::new(MicrovmTier(self.artifacts.clone())), SelectedTier::microvm()));
        }
        let tiers = self.tiers.iter();
        let tiers = tiers.map(|kind| tier_of(*kind, &self.artifacts, cleanup::tracker()));
        Ok(select_tier(tiers.collect()).await?)
    }

    /// Prepares a launch on a tier.
    pub fn launch_spec(&self, tier: TierKind) -> Result<LaunchSpec, Error> {
        match tier {
            TierKind::Ironclaw => self.microvm_launch_spec(),
            TierKind::Nanoclaw | TierKind::Nemoclaw => self.container_launch_spec(),
        }
    }

    /// Prepares the launch of a microVM: checks the artifacts, and opens the template if there is
    /// one.
    pub fn microvm_launch_spec(&self) -> Result<LaunchSpec, Error> {
        let (mut vm, mut files, mut has_policy_files) = (self.vm.clone(), None, false);
        self.artifacts.check()?;
        if let Some(error) = recall_verdict(&self.artifacts) {
            return Err(error);
        }
        self.egress.validate()?;
        if let Some(name) = &self.template {
            // Manifest and files are those that were verified together.
            let OpenTemplate { manifest, files: opened } = self.locate_templates()?.open(name)?;
            (vm.vcpus, vm.memory_mib) = (manifest.vcpus, manifest.memory_mib);
            has_policy_files = check_policy(&manifest, self.policy.as_deref())?;
            self.bind_restored(&mut vm)?;
            files = Some(opened);
        }
        Ok(self.assemble_launch_spec(vm, files, has_policy_files))
    }

    /// Prepares the launch of a container, which gets the limits. Templates and forks are refused.
    pub fn container_launch_spec(&self) -> Result<LaunchSpec, Error> {
        if self.template.is_some() || self.forkable {
            return Err(Error::MicrovmRequired);
        }
        self.egress.validate()?;
        Ok(self.assemble_launch_spec(self.vm.clone(), None, false))
    }

    fn assemble_launch_spec(
        &self,
        spec: VmSpec,
        files: Option<GuestFiles>,
        has_policy_files: bool,
    ) -> LaunchSpec {
        let limits = self.policy.as_ref().map(|policy| &policy.limits);
        let disk_bytes = limits.and_then(|limits| limits.disk_mib).map(|mib| u64::from(mib) << 20);
        let shared = self.policy.iter().flat_map(|policy| &policy.files);
        let read_only = shared.filter(|file| file.access == Access::ReadOnly);
        let fixed = read_only.map(|file| ReadOnlyPath {
            path: file.path.clone(),
            // A missing source is refused when it is copied.
            directory: file.source.is_dir(),
        });
        let tasks = limits.map_or(MAX_TASKS, |limits| limits.pids);
        LaunchSpec {
            vm: spec,
            guest_files: files,
            has_policy_files,
            max_tasks: tasks,
            disk_bytes,
            read_only_paths: fixed.collect(),
        }
    }

    /// Checks that a microVM is acceptable, for uses that no other tier can serve.
    pub fn require_microvm(&self) -> Result<(), Error> {
        match self.tiers.contains(&TierKind::Ironclaw) {
            true => Ok(()),
            false => Err(Error::MicrovmRequired),
        }
    }

    /// Fetches the credentials. Dropping the future revokes what a vault has issued meanwhile.
    pub async fn fetch_credentials(&self) -> Result<FetchedCredentials, Error> {
        let served = self.secrets.iter().find(|secret| secret.delivery == Delivery::Endpoint);
        let mut endpoints = self.egress.endpoints.iter();
        if let Some(secret) = served
            && endpoints.any(|endpoint| AwsCredentialServer::is_at(&endpoint.host, endpoint.port))
        {
            let name = secret.name.clone();
            return Err(Error::EndpointConflict { name, port: AWS_SERVER_PORT });
        }
        let cleanup = cleanup::tracker();
        Ok(fetch_credentials(&self.secrets, &self.credentials, cleanup).await?)
    }

    /// Returns the template directory: the one that was set, or the user's.
    pub fn locate_templates(&self) -> Result<Templates, TemplateError> {
        self.templates.clone().map_or_else(Templates::locate, Ok)
    }

    /// Turns a VM specification into that of a restored guest. Returns the binding of its files.
    pub fn bind_restored(&self, vm: &mut VmSpec) -> Result<String, HostError> {
        bind_to_root_image(vm, &self.artifacts.root_image)
            .map_err(HostError::during("inspect the root image"))
    }
}
