//! The container tier of a Docker daemon, or of Podman's, through its socket.
//!
//! ```text
//!   create ──▶ attach ──▶ start ──▶ hello ──our side closes──▶ agent ends ──▶ daemon removes it
//!     └── no such image: import the root's archive once, by digest, under a lock
//! ```
//!
//! The channel is the container's standard input and output. The daemon closes them when our
//! connection closes, also by the death of this process. A container of a client that died between
//! create and start has a label with its process, and the next start removes it. A daemon that
//! crashes leaves its containers running until it is restarted, and then ends them. A daemon that
//! stops answering holds up nothing: each call has a deadline, and what was left is named.

mod body;
mod channel;
mod connect;
mod container;
mod daemon;
mod endpoint;
mod image;
mod liveness;
mod prune;

use std::time::Duration;

use chitin_spec::TierKind;
use chitin_text::error_chain;
use chitin_vmm::HostError;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::sync::OnceCell;
use tokio_util::task::TaskTracker;

use self::daemon::Daemon;
use self::image::ImageKind;
use crate::clock::monotonic_ns;
use crate::container::Limits;
use crate::error::{ContainerError, Rejections};
use crate::{
    Artifacts, Capabilities, Error, Instance, LaunchSpec, LaunchedInstance, Pending, Pruned,
    RejectedTier, Tier, Unavailable,
};

/// Label of our containers, so that no other one is ever removed. Its value is the process that
/// created the container.
const LABEL: &str = "chitin.sandbox";

/// Time in which a container that tries out the daemon must answer.
const TRIAL_LIMIT: Duration = Duration::from_secs(20);

/// The note about a daemon without a user namespace.
const UNMAPPED_USERS: &str = "a container's root is root of the daemon's host: set userns-remap, or \
                              use a rootless daemon";

/// The limits of that container.
const TRIAL_LIMITS: Limits = Limits { vcpus: 1, memory: 64 << 20, tasks: 16, disk: None };

/// The tier of containers of a Docker daemon.
#[derive(Debug)]
pub(crate) struct DockerTier {
    artifacts: Artifacts,
    daemon: OnceCell<Daemon>,
    cleanup: TaskTracker,
}

impl DockerTier {
    pub fn new(artifacts: &Artifacts, cleanup: &TaskTracker) -> DockerTier {
        let (artifacts, cleanup) = (artifacts.clone(), cleanup.clone());
        DockerTier { artifacts, daemon: OnceCell::new(), cleanup }
    }

    async fn daemon(&self) -> Result<&Daemon, Unavailable> {
        self.daemon.get_or_try_init(|| Daemon::find(&self.artifacts)).await
    }

    async fn require_daemon(&self) -> Result<&Daemon, Error> {
        self.daemon().await.map_err(|unavailable| {
            let tier = TierKind::Nemoclaw;
            Error::NoTier(Rejections(vec![RejectedTier { tier, unavailable }]))
        })
    }

    async fn describe(&self) -> Result<Capabilities, Unavailable> {
        self.daemon().await.map(|daemon| Capabilities {
            implementation: daemon.engine.to_string(),
            version: daemon.version.clone(),
            short_of: Vec::new(),
        })
    }

    /// Runs the agent in a container as a sandbox would have, without the rest of the root, and
    /// waits for its first bytes.
    async fn run_trial(&self) -> Result<(), Error> {
        let daemon = self.require_daemon().await?;
        let started = daemon.start_container(ImageKind::Probe, TRIAL_LIMITS, &[], &self.cleanup);
        let (mut container, stream) = started.await?;
        let hello = async {
            let failed = HostError::during("read from the trial container");
            stream.set_nonblocking(true).map_err(&failed)?;
            let mut stream = UnixStream::from_std(stream).map_err(&failed)?;
            let mut first = [0];
            if stream.read_exact(&mut first).await.is_err() {
                return Err(container.wait_for_end().await);
            }
            container.release_start_resources();
            Ok(())
        };
        let answered = tokio::time::timeout(TRIAL_LIMIT, hello).await;
        let ended = container.end().await;
        answered.unwrap_or_else(|_| Err(daemon.error(ContainerError::Silent)))?;
        ended
    }

    /// Returns the arguments of a `docker run` that creates the same container with a command
    /// instead of the agent, to measure the cost of Docker alone. The image exists once a sandbox
    /// has started.
    pub async fn baseline_args(
        &self,
        spec: &LaunchSpec,
        argv: &[String],
    ) -> Result<Vec<String>, Error> {
        let daemon = self.require_daemon().await?;
        let body = daemon.container_body(ImageKind::Root, Limits::of(spec), &[]);
        let host = body.host_config.unwrap_or_default();
        let number = |value: Option<i64>| value.unwrap_or_default().to_string();
        let mut args: Vec<String> =
            ["--host", &daemon.address.to_string(), "run", "--rm", "--read-only"]
                .map(Into::into)
                .into();
        let mut option = |name: &str, values: Vec<String>| {
            args.extend(values.into_iter().map(|value| format!("--{name}={value}")));
        };
        option("network", host.network_mode.into_iter().collect());
        option("dns", host.dns.unwrap_or_default());
        option("dns-search", host.dns_search.unwrap_or_default());
        option("add-host", host.extra_hosts.unwrap_or_default());
        option("ipc", host.ipc_mode.into_iter().collect());
        option("cap-drop", host.cap_drop.unwrap_or_default());
        option("cap-add", host.cap_add.unwrap_or_default());
        option("security-opt", host.security_opt.unwrap_or_default());
        let tmpfs = host.tmpfs.unwrap_or_default();
        option("tmpfs", tmpfs.iter().map(|(path, options)| format!("{path}:{options}")).collect());
        option("shm-size", vec![number(host.shm_size)]);
        option("memory", vec![number(host.memory)]);
        option("memory-swap", vec![number(host.memory_swap)]);
        option("cpus", vec![spec.vm.vcpus.to_string()]);
        option("pids-limit", vec![number(host.pids_limit)]);
        option("log-driver", vec!["none".into()]);
        option("user", body.user.into_iter().collect());
        option("hostname", body.hostname.into_iter().collect());
        option("workdir", body.working_dir.into_iter().collect());
        option("env", body.env.unwrap_or_default());
        args.extend(body.image);
        args.extend_from_slice(argv);
        Ok(args)
    }
}

impl Tier for DockerTier {
    fn kind(&self) -> TierKind {
        TierKind::Nemoclaw
    }

    fn probe(&self) -> Pending<'_, Result<Capabilities, Unavailable>> {
        Box::pin(self.describe())
    }

    fn try_out(&self) -> Pending<'_, Result<Capabilities, Unavailable>> {
        Box::pin(async {
            let mut capabilities = self.describe().await?;
            match self.run_trial().await {
                Ok(()) => {
                    if !self.daemon().await?.maps_users().await {
                        capabilities.short_of.push(UNMAPPED_USERS.into());
                    }
                    Ok(capabilities)
                }
                Err(error) => Err(Unavailable {
                    reason: format!("a container was tried: {}", error_chain(&error)),
                    remedy: "repair the daemon, or set DOCKER_HOST to another one".into(),
                }),
            }
        })
    }

    fn launch<'a>(&'a self, spec: &'a LaunchSpec) -> Pending<'a, Result<LaunchedInstance, Error>> {
        Box::pin(async {
            let daemon = self.require_daemon().await?;
            let (implementation, version) = (daemon.engine.to_string(), &daemon.version);
            tracing::debug!(implementation, version, "start a container");
            let spawned = monotonic_ns();
            let mount_points = daemon.archive.mount_points(&spec.read_only_paths)?;
            let (image, limits) = (ImageKind::Root, Limits::of(spec));
            let started = daemon.start_container(image, limits, &mount_points, &self.cleanup);
            let (container, stream) = started.await?;
            Ok(LaunchedInstance { instance: Box::new(container), stream, spawned })
        })
    }

    fn prune(&self) -> Pending<'_, Result<Vec<Pruned>, Error>> {
        Box::pin(async { self.require_daemon().await?.prune().await })
    }
}
