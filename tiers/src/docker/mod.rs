//! The container tier of a Docker daemon, or of Podman's, through its socket.
//!
//! ```text
//!   create ──▶ attach ──▶ start ──▶ hello ──our side closes──▶ agent ends ──▶ daemon removes it
//!     └── no such image: import the root's archive once, by digest
//! ```
//!
//! The channel is the container's standard input and output. The daemon closes them when our
//! connection closes, also by the death of this process. A container of a client that died between
//! create and start has a label with its process, and the next start removes it. A daemon that
//! crashes leaves its containers running until it is restarted, and then ends them.

use std::collections::HashMap;
use std::os::unix::net::UnixStream as StdStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bollard::container::{AttachContainerResults, LogOutput};
use bollard::models::{
    ContainerCreateBody, ContainerSummaryStateEnum, HostConfig, HostConfigLogConfig,
};
use bollard::query_parameters::{
    AttachContainerOptionsBuilder, CreateContainerOptionsBuilder, CreateImageOptionsBuilder,
    InspectContainerOptions, ListContainersOptionsBuilder, RemoveContainerOptionsBuilder,
    StartContainerOptions, WaitContainerOptionsBuilder,
};
use bollard::{API_DEFAULT_VERSION, Docker};
use chitin_spec::{EndCause, TierKind};
use chitin_text::error_chain;
use chitin_vmm::HostError;
use futures_util::StreamExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{OnceCell, oneshot};
use tokio::task::JoinHandle;
use tokio_util::io::ReaderStream;
use tokio_util::task::TaskTracker;

use crate::clock::monotonic_ns;
use crate::container::{
    AGENT, CAPABILITIES, CREDENTIAL_BYTES, CREDENTIALS, HOST_NAME, Limits, Log, Owner, RootArchive,
    START_LIMIT, STOP_LIMIT, random_name, read_only_mount_bytes, scratch_mounts,
};
use crate::error::{ContainerError, Rejections};
use crate::{
    Artifacts, Capabilities, Error, GuestEnd, Instance, LaunchSpec, LaunchedInstance, Pending,
    RejectedTier, Tier, Unavailable,
};

/// Time limit of the probe. A daemon answers in milliseconds.
const PROBE_LIMIT: Duration = Duration::from_secs(5);

/// Time limit of a request, in seconds. The import of the root takes longest.
const REQUEST_LIMIT: u64 = 120;

/// The API of Docker 20.10, the first with private cgroup namespaces.
const OLDEST_API: (usize, usize) = (1, 41);

/// Label of our containers, so that no other one is ever removed. Its value is the process that
/// created the container.
const LABEL: &str = "chitin.sandbox";

/// Name of our images. The tag is the digest of the root.
const IMAGE: &str = "chitin-root";

/// Age after which a container that was not started is abandoned.
const STALE: Duration = Duration::from_secs(120);

/// Bytes of one read from the channel, the capacity of its socket.
const CHUNK: usize = 64 * 1024;

const REMEDY: &str = "start it (Debian: apt-get install docker.io), join the group docker, or set \
                      DOCKER_HOST to its socket";

/// The tier of containers of a Docker daemon.
#[derive(Debug)]
pub(crate) struct DockerTier {
    artifacts: Artifacts,
    daemon: OnceCell<Daemon>,
    cleanup: TaskTracker,
}

#[derive(Debug, Clone)]
struct Daemon {
    docker: Docker,
    archive: RootArchive,
    version: String,
    implementation: String,
}

impl DockerTier {
    pub fn new(artifacts: &Artifacts, cleanup: &TaskTracker) -> DockerTier {
        let (artifacts, cleanup) = (artifacts.clone(), cleanup.clone());
        DockerTier { artifacts, daemon: OnceCell::new(), cleanup }
    }

    async fn daemon(&self) -> Result<&Daemon, Unavailable> {
        self.daemon.get_or_try_init(|| self.find_daemon()).await
    }

    async fn find_daemon(&self) -> Result<Daemon, Unavailable> {
        let address = daemon_address();
        let missing = |reason| Unavailable { reason, remedy: REMEDY.into() };
        let connect = async {
            let docker = connect(&address)?.negotiate_version().await?;
            let version = docker.version().await?;
            Ok::<_, bollard::errors::Error>((docker, version))
        };
        let (docker, version) = match tokio::time::timeout(PROBE_LIMIT, connect).await {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => {
                return Err(missing(format!(
                    "no Docker daemon answers at {address}: {}",
                    error_chain(&error)
                )));
            }
            Err(_) => {
                return Err(missing(format!(
                    "the Docker daemon at {address} did not answer within {} s",
                    PROBE_LIMIT.as_secs()
                )));
            }
        };
        let api = docker.client_version();
        if (api.major_version, api.minor_version) < OLDEST_API {
            let (major, minor) = OLDEST_API;
            return Err(Unavailable {
                reason: format!(
                    "the Docker daemon at {address} has API {api}, and {major}.{minor} is required"
                ),
                remedy: "use Docker 20.10 or newer".into(),
            });
        }
        let archive = RootArchive::find(&self.artifacts)?;
        let components = version.components.unwrap_or_default();
        let podman = components.iter().any(|component| component.name.starts_with("Podman"));
        let implementation = if podman { "Podman" } else { "Docker" }.into();
        Ok(Daemon { docker, archive, version: version.version.unwrap_or_default(), implementation })
    }
}

/// Returns `$DOCKER_HOST`, or the first existing socket.
fn daemon_address() -> String {
    if let Ok(host) = std::env::var("DOCKER_HOST")
        && !host.is_empty()
    {
        return host;
    }
    let runtime_dir = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).unwrap_or_default();
    let sockets = [
        PathBuf::from("/run/docker.sock"),
        PathBuf::from("/var/run/docker.sock"),
        runtime_dir.join("docker.sock"),
        runtime_dir.join("podman/podman.sock"),
        PathBuf::from("/run/podman/podman.sock"),
    ];
    let found =
        sockets.iter().find(|path| path.is_absolute() && path.exists()).unwrap_or(&sockets[1]);
    format!("unix://{}", found.display())
}

fn connect(address: &str) -> Result<Docker, bollard::errors::Error> {
    match address.starts_with("unix://") || address.starts_with('/') {
        true => Docker::connect_with_unix(address, REQUEST_LIMIT, API_DEFAULT_VERSION),
        false => Docker::connect_with_http(address, REQUEST_LIMIT, API_DEFAULT_VERSION),
    }
}

impl Tier for DockerTier {
    fn kind(&self) -> TierKind {
        TierKind::Nemoclaw
    }

    fn probe(&self) -> Pending<'_, Result<Capabilities, Unavailable>> {
        Box::pin(async {
            self.daemon().await.map(|daemon| Capabilities {
                implementation: daemon.implementation.clone(),
                version: daemon.version.clone(),
                short_of: Vec::new(),
            })
        })
    }

    fn launch<'a>(&'a self, spec: &'a LaunchSpec) -> Pending<'a, Result<LaunchedInstance, Error>> {
        Box::pin(async {
            let daemon = self.require_daemon().await?;
            let (implementation, version) = (&daemon.implementation, &daemon.version);
            tracing::debug!(implementation, version, "start a container");
            let spawned = monotonic_ns();
            let (container, stream) = daemon.start_container(spec, &self.cleanup).await?;
            Ok(LaunchedInstance { instance: Box::new(container), stream, spawned })
        })
    }
}

impl DockerTier {
    async fn require_daemon(&self) -> Result<&Daemon, Error> {
        self.daemon().await.map_err(|unavailable| {
            let tier = TierKind::Nemoclaw;
            Error::NoTier(Rejections(vec![RejectedTier { tier, unavailable }]))
        })
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
        let body = daemon.container_body(Limits::of(spec), &[]);
        let host = body.host_config.unwrap_or_default();
        let number = |value: Option<i64>| value.unwrap_or_default().to_string();
        let mut args: Vec<String> =
            ["--host", &daemon_address(), "run", "--rm", "--read-only"].map(Into::into).into();
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

impl Daemon {
    fn error(&self, source: ContainerError) -> Error {
        Error::Container { engine: self.implementation.clone(), source }
    }

    fn request_error(&self, error: &bollard::errors::Error) -> Error {
        self.error(ContainerError::Reported(error_chain(error)))
    }

    /// Starts a container.
    ///
    /// The daemon completes a request even if the caller no longer waits for it. Such a container
    /// is removed in the background, which `cleanup` tracks.
    async fn start_container(
        &self,
        spec: &LaunchSpec,
        cleanup: &TaskTracker,
    ) -> Result<(Container, StdStream), Error> {
        let mount_points = self.archive.mount_points(&spec.read_only_paths)?;
        let body = self.container_body(Limits::of(spec), &mount_points);
        let (sender, receiver) = oneshot::channel();
        let (daemon, token) = (self.clone(), cleanup.token());
        tokio::spawn(async move {
            let started = daemon.create_container(body).await;
            if let Err(Ok((mut container, _))) = sender.send(started) {
                // If this fails, the next start finds the container by its label.
                let _ = container.remove().await;
            }
            drop(token);
        });
        receiver.await.unwrap_or_else(|_| Err(self.error(ContainerError::Cancelled)))
    }

    async fn create_container(
        &self,
        body: ContainerCreateBody,
    ) -> Result<(Container, StdStream), Error> {
        let name = random_name()?;
        let options = CreateContainerOptionsBuilder::default().name(&name).build();
        let mut created = self.docker.create_container(Some(options.clone()), body.clone()).await;
        if is_status(&created, 404) {
            self.import_root().await?;
            created = self.docker.create_container(Some(options), body).await;
        }
        let id = created.map_err(|error| self.request_error(&error))?.id;
        let mut container = Container {
            docker: self.docker.clone(),
            implementation: self.implementation.clone(),
            id,
            log: Log::default(),
            broken: Arc::default(),
            bridge: None,
            answered: false,
            gone: false,
        };
        match container.attach_and_start().await {
            Ok(stream) => Ok((container, stream)),
            Err(error) => {
                container.remove().await?;
                Err(self.request_error(&error))
            }
        }
    }

    /// Imports the archive as an image. Concurrent imports create the same image.
    async fn import_root(&self) -> Result<(), Error> {
        let archive = self.archive.clone();
        let checking = tokio::task::spawn_blocking(move || archive.check());
        let checked = checking.await.map_err(|error| error.to_string()).and_then(|checked| checked);
        checked.map_err(|reason| self.error(ContainerError::Root(reason)))?;
        let path = &self.archive.path;
        let file = tokio::fs::File::open(path)
            .await
            .map_err(HostError::during("open the archive of the root"))?;
        let options =
            CreateImageOptionsBuilder::default().from_src("-").repo(IMAGE).tag(self.tag()).build();
        let body = bollard::body_try_stream(ReaderStream::with_capacity(file, CHUNK));
        let mut progress = Box::pin(self.docker.create_image(Some(options), Some(body), None));
        while let Some(step) = progress.next().await {
            step.map_err(|error| self.request_error(&error))?;
        }
        Ok(())
    }

    fn tag(&self) -> &str {
        &self.archive.digest[..32]
    }

    fn container_body(&self, limits: Limits, mount_points: &[PathBuf]) -> ContainerCreateBody {
        let bytes = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
        let [work, tmp, shm] = scratch_mounts(limits);
        let options = |mode: &str, owner: u32, bytes: u64| {
            format!("rw,nosuid,nodev,exec,mode={mode},uid={owner},gid={owner},size={bytes}")
        };
        let mut tmpfs: HashMap<String, String> = [work, tmp]
            .map(|scratch| {
                (scratch.path.into(), options(scratch.mode, scratch.owner, scratch.bytes))
            })
            .into();
        let size = CREDENTIAL_BYTES;
        let credentials = format!("rw,nosuid,nodev,noexec,mode=0755,size={size}");
        tmpfs.insert(CREDENTIALS.into(), credentials);
        for mount_point in mount_points {
            // A policy is UTF-8, so that nothing is lost.
            let path = mount_point.to_string_lossy().into_owned();
            let bytes = read_only_mount_bytes(limits, mount_points.len());
            tmpfs.insert(path, options("0755", 0, bytes));
        }
        let host = HostConfig {
            auto_remove: Some(true),
            network_mode: Some("none".into()),
            // The daemon replaces the image's resolv.conf, so that it must name the agent here as
            // well.
            dns: Some(vec!["127.0.0.53".into()]),
            dns_search: Some(vec![".".into()]),
            // The daemon replaces the image's hosts as well.
            extra_hosts: Some(vec![format!("{HOST_NAME}:127.0.0.1")]),
            ipc_mode: Some("private".into()),
            readonly_rootfs: Some(true),
            cap_drop: Some(vec!["ALL".into()]),
            cap_add: Some(CAPABILITIES.map(str::to_owned).to_vec()),
            // The daemon's default seccomp filter stays in force.
            security_opt: Some(vec!["no-new-privileges".into()]),
            tmpfs: Some(tmpfs),
            shm_size: Some(bytes(shm.bytes)),
            memory: Some(bytes(limits.memory)),
            memory_swap: Some(bytes(limits.memory)),
            nano_cpus: Some(bytes(u64::from(limits.vcpus) * 1_000_000_000)),
            pids_limit: Some(limits.tasks.into()),
            // The channel must not be written to a log on disk.
            log_config: Some(HostConfigLogConfig { typ: Some("none".into()), config: None }),
            init: Some(false),
            ..Default::default()
        };
        ContainerCreateBody {
            image: Some(format!("{IMAGE}:{}", self.tag())),
            cmd: Some(AGENT.map(str::to_owned).to_vec()),
            env: Some(vec!["PATH=/usr/bin".into()]),
            working_dir: Some("/".into()),
            user: Some("0:0".into()),
            hostname: Some(HOST_NAME.into()),
            labels: Some(HashMap::from([(LABEL.into(), Owner::this_process().to_string())])),
            attach_stdin: Some(true),
            attach_stdout: Some(true),
            attach_stderr: Some(true),
            open_stdin: Some(true),
            stdin_once: Some(true),
            tty: Some(false),
            host_config: Some(host),
            ..Default::default()
        }
    }
}

fn is_status<T>(result: &Result<T, bollard::errors::Error>, code: u16) -> bool {
    matches!(
        result,
        Err(bollard::errors::Error::DockerResponseServerError { status_code, .. })
            if *status_code == code
    )
}

/// A container of the daemon.
#[derive(Debug)]
struct Container {
    docker: Docker,
    implementation: String,
    id: String,
    log: Log,
    /// The error that broke the connection.
    broken: Arc<Mutex<Option<String>>>,
    bridge: Option<JoinHandle<()>>,
    answered: bool,
    /// The daemon has removed the container.
    gone: bool,
}

impl Container {
    async fn attach_and_start(&mut self) -> Result<StdStream, bollard::errors::Error> {
        let (ours, theirs) = UnixStream::pair()?;
        let ours = ours.into_std()?;
        let options = AttachContainerOptionsBuilder::default()
            .stdin(true)
            .stdout(true)
            .stderr(true)
            .stream(true)
            .build();
        // Attach before the start, so that the agent's first message is not lost.
        let attached = self.docker.attach_container(&self.id, Some(options)).await?;
        let bridge = copy_both_ways(attached, theirs, self.log.clone(), self.broken.clone());
        self.bridge = Some(tokio::spawn(bridge));
        self.docker.start_container(&self.id, None::<StartContainerOptions>).await?;
        tokio::spawn(remove_abandoned(self.docker.clone()));
        Ok(ours)
    }

    /// Waits until the daemon has removed the container, which it does at the end of the agent.
    async fn wait_until_removed(&mut self) -> bool {
        let options = WaitContainerOptionsBuilder::default().condition("removed").build();
        let waiting = async {
            let mut answers = Box::pin(self.docker.wait_container(&self.id, Some(options)));
            match answers.next().await {
                // The exit code does not matter here.
                Some(Ok(_) | Err(bollard::errors::Error::DockerContainerWaitError { .. }))
                | None => true,
                Some(error) => is_status(&error, 404),
            }
        };
        tokio::time::timeout(STOP_LIMIT, waiting).await.unwrap_or(false)
    }

    /// Removes the container by force.
    async fn remove(&mut self) -> Result<(), Error> {
        let options = RemoveContainerOptionsBuilder::default().force(true).v(true).build();
        let removed = self.docker.remove_container(&self.id, Some(options)).await;
        // 409: the removal is in progress.
        self.gone = removed.is_ok()
            || is_status(&removed, 404)
            || (is_status(&removed, 409) && self.wait_until_removed().await);
        match (self.gone, removed) {
            (false, Err(error)) => {
                let id = &self.id[..self.id.len().min(12)];
                let (engine, cause) = (&self.implementation, error_chain(&error));
                Err(Error::Leftover {
                    leftover: format!("the container {id} of {engine}: {cause}"),
                })
            }
            _ => Ok(()),
        }
    }
}

impl Instance for Container {
    fn release_start_resources(&mut self) {
        self.answered = true;
    }

    fn start_limit(&self) -> Duration {
        START_LIMIT
    }

    fn wait_for_end(&mut self) -> Pending<'_, Error> {
        Box::pin(async {
            if let Some(bridge) = &mut self.bridge {
                let _ = bridge.await;
                self.bridge = None;
            }
            let broken = self.broken.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let inspected =
                self.docker.inspect_container(&self.id, None::<InspectContainerOptions>).await;
            let (cause, reason) = match (&inspected, broken) {
                (Err(bollard::errors::Error::DockerResponseServerError { .. }), _) => {
                    (EndCause::Host, "its container has ended".into())
                }
                (Err(error), _) => {
                    let reason = format!(
                        "the {} daemon no longer answers; it ends the container when it is \
                         restarted ({})",
                        self.implementation,
                        error_chain(error)
                    );
                    (EndCause::Host, reason)
                }
                (Ok(_), Some(broken)) => {
                    let engine = &self.implementation;
                    (
                        EndCause::Host,
                        format!("the connection to the {engine} daemon broke: {broken}"),
                    )
                }
                (Ok(container), None) => {
                    let state = container.state.as_ref();
                    match state.and_then(|state| state.oom_killed) {
                        Some(true) => {
                            (EndCause::OutOfMemory, "its container ran out of memory".into())
                        }
                        _ => (EndCause::Host, "its container has ended".into()),
                    }
                }
            };
            if self.answered {
                return Error::GuestEnded(GuestEnd { cause, reason, log: self.log.to_text() });
            }
            let source = ContainerError::Reported(self.log.last_line().unwrap_or(reason));
            Error::Container { engine: self.implementation.clone(), source }
        })
    }

    fn stop(&mut self) -> Pending<'_, Result<(), Error>> {
        Box::pin(async {
            if self.gone {
                return Ok(());
            }
            if let Some(bridge) = self.bridge.take() {
                // The channel is closed, and the rest of its bytes is not needed.
                bridge.abort();
                let _ = bridge.await;
            }
            if self.answered && self.wait_until_removed().await {
                self.gone = true;
                return Ok(());
            }
            self.remove().await
        })
    }
}

/// Copies the bytes of the channel until one of its ends has closed.
async fn copy_both_ways(
    attached: AttachContainerResults,
    stream: UnixStream,
    log: Log,
    broken: Arc<Mutex<Option<String>>>,
) {
    let AttachContainerResults { mut output, mut input } = attached;
    let (mut from_host, mut to_host) = stream.into_split();
    let to_host_task = async {
        while let Some(message) = output.next().await {
            match message {
                Ok(LogOutput::StdOut { message } | LogOutput::Console { message }) => {
                    if to_host.write_all(&message).await.is_err() {
                        return;
                    }
                }
                Ok(LogOutput::StdErr { message }) => log.push(&message),
                Ok(LogOutput::StdIn { .. }) => {}
                Err(error) => {
                    *broken.lock().unwrap_or_else(PoisonError::into_inner) =
                        Some(error_chain(&error));
                    return;
                }
            }
        }
    };
    let to_container_task = async {
        let mut chunk = vec![0; CHUNK];
        while let Ok(count) = from_host.read(&mut chunk).await
            && count > 0
        {
            if input.write_all(&chunk[..count]).await.is_err() || input.flush().await.is_err() {
                // The other direction may still deliver the cause.
                std::future::pending::<()>().await;
            }
        }
        let _ = input.shutdown().await;
    };
    tokio::select! {
        () = to_host_task => {}
        () = to_container_task => {}
    }
}

/// Removes containers whose creators died before they started them.
async fn remove_abandoned(docker: Docker) {
    let filters =
        HashMap::from([("label", vec![LABEL]), ("status", vec!["created", "exited", "dead"])]);
    let options = ListContainersOptionsBuilder::default().all(true).filters(&filters).build();
    let Ok(listed) = docker.list_containers(Some(options)).await else { return };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    for container in listed {
        let created = Duration::from_secs(
            container.created.and_then(|at| u64::try_from(at).ok()).unwrap_or(0),
        );
        let idle = container.state != Some(ContainerSummaryStateEnum::RUNNING);
        let owner = container.labels.as_ref().and_then(|labels| Owner::parse(labels.get(LABEL)?));
        let abandoned =
            owner.is_some_and(|owner| owner.has_ended()) || now.saturating_sub(created) > STALE;
        if let (Some(id), true) = (container.id, idle && abandoned) {
            let force = RemoveContainerOptionsBuilder::default().force(true).v(true).build();
            let _ = docker.remove_container(&id, Some(force)).await;
        }
    }
}
