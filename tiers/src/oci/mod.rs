//! The container tier without a daemon: an OCI bundle and an OCI runtime.
//!
//! The runtime is gVisor's `runsc`, whose kernel is a user-space program. If no `runsc` works, it
//! is `crun` or `runc`, which share the host's kernel; the tier is then reported as
//! `nanoclaw/runc`.
//!
//! A runtime has no interface but its command line. It stays in the foreground as our child and
//! gets the other end of the channel as standard input and output, which the agent inherits. When
//! our end closes, also by the death of this process, the agent ends, then the container, and the
//! runtime cleans up.
//!
//! ```text
//!   /run/chitin/
//!     bundles/ENGINE-NAME   config.json, and a lock that the owner holds; removed when the agent has
//!                           answered
//!     mounts/ENGINE-NAME    a read-only mount of the unpacked root, and the top of a root with
//!                           additional mount points of a policy; removed with its bundle
//!     users/INDEX           the lock of a range of host users
//!     ENGINE                state of the runtime
//!     works.json            the runtime that works on this host, found by a trial
//!   /var/cache/chitin/
//!     images/DIGEST         an unpacked root, which only root can enter
//! ```

mod bundle;
mod counters;
mod engine;
pub(crate) mod gvisor;
mod oom_watch;
mod private_dir;
mod programs;
mod root;
mod root_mount;
mod tree;
mod user_range;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use chitin_spec::{EndCause, ReachedLimits, TierKind};
use chitin_vmm::HostError;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::AsyncReadExt;
use tokio::process::{Child, Command};
use tokio::sync::OnceCell;
use tokio_util::task::TaskTracker;

use self::bundle::{Bundle, Content};
use self::counters::Counters;
use self::engine::Engine;
use self::oom_watch::OomWatch;
use self::user_range::UserRange;
use crate::clock::monotonic_ns;
use crate::container::{AGENT, Limits, Log, Owner, RootArchive, START_LIMIT, STOP_LIMIT};
use crate::error::{ContainerError, PathError, Rejections};
use crate::{
    Artifacts, Capabilities, Error, GuestEnd, Instance, LaunchSpec, LaunchedInstance, Pending,
    Pruned, RejectedTier, Tier, Unavailable,
};

/// Directory of the bundles and of the state of the runtimes.
const RUN: &str = "/run/chitin";

/// Option of the agent: it limits the workload's processes itself.
const OWN_KERNEL: &str = "--own-kernel";

/// Time limit of a forced deletion. A runtime that hangs is noticed within this limit and the
/// trial's.
const DELETE_LIMIT: Duration = Duration::from_secs(5);

/// Time that standard error may stay open after the runtime has ended.
const LOG_LIMIT: Duration = Duration::from_millis(500);

/// Exit code of a runtime whose container was ended by SIGKILL.
const KILLED: i32 = 137;

/// Exit code of gVisor's kernel after a panic, as of every Go program.
const PANICKED: i32 = 2;

const WRITE_BUNDLE: &str = "prepare an OCI bundle in /run/chitin";

/// The tier of containers of an OCI runtime.
#[derive(Debug)]
pub(crate) struct OciTier {
    artifacts: Artifacts,
    ready: OnceCell<Ready>,
    cleanup: TaskTracker,
}

/// The parts of every container.
#[derive(Debug)]
struct Ready {
    engine: Engine,
    archive: RootArchive,
    /// The unpacked archive.
    root: PathBuf,
}

impl OciTier {
    pub fn new(artifacts: &Artifacts, cleanup: &TaskTracker) -> OciTier {
        let (artifacts, cleanup) = (artifacts.clone(), cleanup.clone());
        OciTier { artifacts, ready: OnceCell::new(), cleanup }
    }

    async fn ready(&self) -> Result<&Ready, Unavailable> {
        self.ready
            .get_or_try_init(|| async {
                if !rustix::process::geteuid().is_root() {
                    return Err(Unavailable {
                        reason: "an OCI runtime needs root to give a container its own users"
                            .into(),
                        remedy: "run chitin as root, or use nemoclaw, whose daemon is root".into(),
                    });
                }
                let archive = RootArchive::find(&self.artifacts)?;
                let packed = archive.clone();
                let unpacking = tokio::task::spawn_blocking(move || root::unpack_once(&packed));
                let root = unpacking.await.map_err(|error| error.to_string()).and_then(|root| root);
                let root = root.map_err(|reason| Unavailable {
                    reason: format!("the root cannot be unpacked: {reason}"),
                    remedy:
                        "free space in /var/cache/chitin, or rebuild it with `cargo xtask rootfs`"
                            .into(),
                })?;
                let engine = engine::find_working_engine(&root, &self.cleanup).await?;
                Ok(Ready { engine, archive, root })
            })
            .await
    }
}

impl Tier for OciTier {
    fn kind(&self) -> TierKind {
        TierKind::Nanoclaw
    }

    fn probe(&self) -> Pending<'_, Result<Capabilities, Unavailable>> {
        Box::pin(async { self.ready().await.map(|ready| ready.engine.capabilities()) })
    }

    fn prune(&self) -> Pending<'_, Result<Vec<Pruned>, Error>> {
        Box::pin(async {
            bundle::remove_abandoned().await;
            Ok(Vec::new())
        })
    }

    fn launch<'a>(&'a self, spec: &'a LaunchSpec) -> Pending<'a, Result<LaunchedInstance, Error>> {
        Box::pin(async {
            let Ready { engine, archive, root } = self.require_ready().await?;
            tracing::debug!(?engine, "start a container");
            bundle::remove_abandoned().await;
            let limits = Limits::of(spec);
            if let (Some(file), true) = (spec.read_only_paths.first(), engine.has_own_kernel()) {
                let path = file.path.clone();
                return Err(Error::Path { path, reason: PathError::NoLandlock });
            }
            let mount_points = archive.mount_points(&spec.read_only_paths)?;
            let spawned = monotonic_ns();
            let (container, stream) =
                Container::start(engine, root, limits, &mount_points, &self.cleanup)?;
            Ok(LaunchedInstance { instance: Box::new(container), stream, spawned })
        })
    }
}

/// A container that runs a command instead of the agent.
#[derive(Debug)]
pub(crate) struct Baseline {
    engine: Engine,
    bundle: Bundle,
}

impl OciTier {
    async fn require_ready(&self) -> Result<&Ready, Error> {
        self.ready().await.map_err(|unavailable| {
            let tier = TierKind::Nanoclaw;
            Error::NoTier(Rejections(vec![RejectedTier { tier, unavailable }]))
        })
    }

    /// Creates a container that measures the cost of the runtime alone.
    pub async fn create_baseline(
        &self,
        spec: &LaunchSpec,
        argv: &[String],
    ) -> Result<Baseline, Error> {
        let Ready { engine, root, .. } = self.require_ready().await?;
        let content = Content { root, limits: Limits::of(spec), mount_points: &[], argv };
        let bundle = Bundle::create(engine, &content).map_err(HostError::during(WRITE_BUNDLE))?;
        Ok(Baseline { engine: engine.clone(), bundle })
    }
}

impl Baseline {
    pub fn command(&self) -> Command {
        let mut command = self.engine.command(&["run", "--bundle"]);
        command.arg(self.bundle.path()).arg(self.bundle.name());
        command
    }
}

/// A container and the runtime that runs it in the foreground.
#[derive(Debug)]
struct Container {
    engine: Engine,
    limits: Limits,
    name: String,
    child: Child,
    /// Kept until the agent has answered, or as long as the container's root is in it.
    bundle: Option<Bundle>,
    _users: Option<UserRange>,
    answered: bool,
    /// A stop has begun and not ended.
    stopping: bool,
    log: Log,
    reader: tokio::task::JoinHandle<()>,
    ended: Option<ExitStatus>,
    counters: Counters,
    oom_watch: Option<OomWatch>,
    cleanup: TaskTracker,
}

impl Container {
    fn start(
        engine: &Engine,
        root: &Path,
        limits: Limits,
        mount_points: &[PathBuf],
        cleanup: &TaskTracker,
    ) -> Result<(Container, UnixStream), Error> {
        let argv = AGENT.into_iter().chain(engine.has_own_kernel().then_some(OWN_KERNEL));
        let argv: Vec<String> = argv.map(str::to_owned).collect();
        let content = Content { root, limits, mount_points, argv: &argv };
        let mut bundle =
            Bundle::create(engine, &content).map_err(HostError::during(WRITE_BUNDLE))?;
        let users = bundle.take_users();
        let (ours, theirs) =
            UnixStream::pair().map_err(HostError::during("create a socket pair"))?;
        let stdin: OwnedFd =
            theirs.try_clone().map_err(HostError::during("duplicate the channel"))?.into();
        let mut child = engine
            .command(&["run", "--bundle"])
            .arg(bundle.path())
            .arg(bundle.name())
            .stdin(Stdio::from(stdin))
            .stdout(Stdio::from(OwnedFd::from(theirs)))
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|source| Error::Spawn { path: engine.program.clone(), source })?;
        if let Some(pid) = child.id() {
            // Without the record only this process can end the runtime.
            let _ = bundle.record_runtime(&Owner::of(pid));
        }
        let log = Log::default();
        let reader = tokio::spawn({
            let (log, stderr) = (log.clone(), child.stderr.take());
            async move {
                let Some(mut stderr) = stderr else { return };
                let mut chunk = [0; 4096];
                while let Ok(count) = stderr.read(&mut chunk).await
                    && count > 0
                {
                    log.push(&chunk[..count]);
                }
            }
        });
        let name = bundle.name().to_owned();
        let container = Container {
            engine: engine.clone(),
            limits,
            name,
            child,
            bundle: Some(bundle),
            _users: users,
            answered: false,
            stopping: false,
            log,
            reader,
            ended: None,
            counters: Counters::default(),
            oom_watch: None,
            cleanup: cleanup.clone(),
        };
        Ok((container, ours))
    }

    /// Waits for the end of the runtime and its last output.
    async fn wait_for_runtime(&mut self) -> ExitStatus {
        match self.ended {
            Some(status) => status,
            None => {
                let status = self.child.wait().await.unwrap_or_default();
                // Its last output is on its way, and a leftover process could hold the pipe for
                // ever.
                let _ = tokio::time::timeout(LOG_LIMIT, &mut self.reader).await;
                *self.ended.insert(status)
            }
        }
    }

    /// Returns the cause of the end of a container that had started.
    fn explain_end(&self, status: ExitStatus, out_of_memory: bool) -> (EndCause, String) {
        let mib = self.limits.memory >> 20;
        match (status.code(), self.engine.has_own_kernel()) {
            // gVisor's kernel is in the cgroup, so that the limit ends all of it, and not the
            // process that exceeded it.
            (_, true) if out_of_memory => {
                let reason =
                    format!("gVisor's kernel was killed, as the sandbox used its {mib} MiB");
                (EndCause::OutOfMemory, reason)
            }
            (_, false) if out_of_memory => {
                let reason = format!("its agent was killed, as the sandbox used its {mib} MiB");
                (EndCause::OutOfMemory, reason)
            }
            (Some(KILLED), true) => (EndCause::Host, "gVisor's kernel was killed".into()),
            (Some(PANICKED), true) => {
                let reason =
                    "gVisor's kernel panicked, as when the sandbox starts too many processes";
                (EndCause::GuestPanic, reason.into())
            }
            _ => (EndCause::Host, format!("its container has ended ({status})")),
        }
    }

    /// Kills the runtime and its process group.
    fn kill_runtime(&self) {
        if let Some(pid) = self.child.id().and_then(|pid| Pid::from_raw(pid.try_into().ok()?)) {
            let _ = kill_process_group(pid, Signal::KILL);
        }
    }
}

impl Instance for Container {
    fn release_start_resources(&mut self) {
        self.answered = true;
        self.oom_watch = OomWatch::start(&self.name);
        // The container's mounts are on the tree and would go with it.
        self.bundle.take_if(|bundle| !bundle.has_tree());
    }

    fn start_limit(&self) -> Duration {
        START_LIMIT
    }

    fn reached_limits(&mut self) -> ReachedLimits {
        let reached = self.counters.update(&self.name);
        // Around gVisor's kernel the limit counts threads of that kernel, not tasks of the sandbox.
        let refused_tasks = if self.engine.has_own_kernel() { 0 } else { reached.refused_tasks };
        ReachedLimits { refused_tasks, ..reached }
    }

    fn wait_for_end(&mut self) -> Pending<'_, Error> {
        Box::pin(async {
            let status = self.wait_for_runtime().await;
            if self.answered {
                let out_of_memory = match &mut self.oom_watch {
                    Some(watch) => watch.has_observed().await,
                    None => false,
                };
                let (cause, reason) = self.explain_end(status, out_of_memory);
                return Error::GuestEnded(GuestEnd { cause, reason, log: self.log.to_text() });
            }
            let message = self.log.last_line();
            let message = message.unwrap_or_else(|| format!("it ended without output ({status})"));
            let engine = self.engine.name.into();
            Error::Container { engine, source: ContainerError::Reported(message) }
        })
    }

    fn stop(&mut self) -> Pending<'_, Result<(), Error>> {
        Box::pin(async {
            self.stopping = true;
            // gVisor's kernel ends its helper processes after itself. `runsc` finds them in the
            // cgroup that it removes then, and tries again a tenth of a second later.
            if self.answered && self.engine.has_own_kernel() {
                self.engine.kill_container(&self.name);
            }
            let ended = tokio::time::timeout(STOP_LIMIT, self.wait_for_runtime()).await.is_ok();
            // A runtime that fails after the agent has answered may leave its state of the
            // container, and one that is hurried may leave the cgroup of killed processes.
            if ended
                && self.answered
                && !self.engine.has_state(&self.name)
                && self.engine.remove_leftovers(&self.name)
            {
                self.bundle = None;
                self.stopping = false;
                return Ok(());
            }
            self.kill_runtime();
            self.wait_for_runtime().await;
            let deleted = self.engine.delete(&self.name).await;
            self.bundle = None;
            self.stopping = false;
            match deleted {
                true => Ok(()),
                false => Err(Error::Leftover {
                    leftover: format!("the {} container {}", self.engine.name, self.name),
                }),
            }
        })
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // After an answer the container ends with its channel, and its runtime cleans up. A stop that
        // was interrupted has killed processes already, which the runtime does not expect.
        if (self.answered || self.ended.is_some()) && !self.stopping {
            return;
        }
        self.kill_runtime();
        let (engine, name) = (self.engine.clone(), self.name.clone());
        let leftovers = (self.bundle.take(), self.cleanup.token());
        // Without an async runtime, the next start removes the leftovers.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                engine.delete(&name).await;
                drop(leftovers);
            });
        }
    }
}

/// Runs a command without input and output. Returns true if it succeeds in time.
async fn run_silently(command: &mut Command) -> bool {
    let status = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .status();
    matches!(tokio::time::timeout(DELETE_LIMIT, status).await, Ok(Ok(status)) if status.success())
}
