//! The container tier without a daemon: an OCI bundle, run by gVisor's `runsc`, whose kernel is a program of its own; where
//! there is none that works, by `crun` or `runc`, which share the host's kernel, and then it is reported as `nanoclaw/runc`.
//!
//! A runtime has no interface but its command line. It stays in the foreground and is our child: what it is given as standard
//! input and output, the channel's other end, is what the agent gets. When we close ours, however we end, the agent ends, the
//! container with it, and the runtime clears up behind it.
//!
//! ```text
//!   /run/chitin/bundles/ENGINE-NAME    config.json, and a lock that its owner holds; gone when the agent has answered
//!   /run/chitin/ENGINE                 the runtime's own state
//!   /run/chitin/works.json             which runtime works here, found out once
//!   /var/cache/chitin/roots/DIGEST     an unpacked root
//!   /var/cache/chitin/trees/ENGINE-NAME    the top of a root in which a policy has a place; as long as its bundle
//! ```

mod bundle;
mod engine;
mod root;
mod tree;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use chitin_spec::TierKind;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::AsyncReadExt;
use tokio::process::{Child, Command};
use tokio::sync::OnceCell;
use tokio_util::task::TaskTracker;

use self::bundle::{Bundle, Content};
use self::engine::Engine;
use crate::clock::now_ns;
use crate::container::{AGENT, Limits, Log, Owner, RootArchive, START_LIMIT, STOP_LIMIT};
use crate::{
    Artifacts, Capabilities, Error, GuestEnd, Instance, LaunchSpec, Launched, Pending, Tier,
    Unavailable,
};

/// Where bundles are, and what runtimes know of their containers.
const RUN: &str = "/run/chitin";

/// Tells the agent that it may bound the workload's processes itself.
const OWN_KERNEL: &str = "--own-kernel";

/// How long a runtime may take to clear up by force: one that hangs is noticed within this and the time of its trial.
const DELETE_LIMIT: Duration = Duration::from_secs(5);

/// How long standard error may stay open behind a runtime that has ended.
const LOG_LIMIT: Duration = Duration::from_millis(500);

/// What a runtime exits with when its container was ended by SIGKILL.
const KILLED: i32 = 137;

/// What gVisor's kernel exits with, as every Go program, when it cannot go on.
const PANICKED: i32 = 2;

/// Containers of an OCI runtime.
#[derive(Debug)]
pub(crate) struct OciTier {
    artifacts: Artifacts,
    ready: OnceCell<Ready>,
    cleanup: TaskTracker,
}

/// What containers are made of.
#[derive(Debug)]
struct Ready {
    engine: Engine,
    archive: RootArchive,
    /// Its content.
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
                        reason: "an OCI runtime needs root to give a container users of its own"
                            .into(),
                        remedy: "run chitin as root, or use nemoclaw, where the daemon is root"
                            .into(),
                    });
                }
                let archive = RootArchive::of(&self.artifacts)?;
                let packed = archive.clone();
                let unpacking = tokio::task::spawn_blocking(move || root::unpacked(&packed));
                let root = unpacking.await.map_err(|error| error.to_string()).and_then(|root| root);
                let root = root.map_err(|reason| Unavailable {
                    reason: format!("the root cannot be unpacked: {reason}"),
                    remedy:
                        "make room in /var/cache/chitin, or build it anew with `cargo xtask rootfs`"
                            .into(),
                })?;
                let engine = engine::that_works(&root, &self.cleanup).await?;
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

    fn launch<'a>(&'a self, plan: &'a LaunchSpec) -> Pending<'a, Result<Launched, Error>> {
        Box::pin(async {
            let Ready { engine, archive, root } = self.ready().await.map_err(|unavailable| {
                Error::NoTier { missing: format!("{}: {unavailable}", TierKind::Nanoclaw) }
            })?;
            bundle::sweep().await;
            let limits = Limits::of(plan);
            if let (Some(fixed), true) = (plan.fixed.first(), engine.has_own_kernel()) {
                return Err(Error::Place {
                    path: fixed.path.clone(),
                    reason: "gVisor's kernel has no Landlock, by which a policy's files are kept: choose the tier ironclaw \
                             or nemoclaw"
                        .into(),
                });
            }
            let places = archive.places(&plan.fixed)?;
            tracing::debug!(engine = ?engine, "start a container");
            let spawned = now_ns();
            let (container, stream) =
                Container::start(engine, root, limits, &places, &self.cleanup)?;
            Ok(Launched { instance: Box::new(container), stream, spawned })
        })
    }
}

/// A container of a command instead of the agent.
#[derive(Debug)]
pub(crate) struct Baseline {
    engine: Engine,
    bundle: Bundle,
}

impl OciTier {
    /// For measuring what the runtime alone takes.
    pub async fn baseline(&self, plan: &LaunchSpec, argv: &[String]) -> Result<Baseline, Error> {
        let Ready { engine, root, .. } = self.ready().await.map_err(|unavailable| {
            Error::NoTier { missing: format!("{}: {unavailable}", TierKind::Nanoclaw) }
        })?;
        let content = Content { root, limits: Limits::of(plan), places: &[], argv };
        let bundle = Bundle::create(engine, &content)
            .map_err(|source| Error::Host { what: "write an OCI bundle in /run/chitin", source })?;
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

/// A container, by the runtime that runs it in the foreground.
#[derive(Debug)]
struct Container {
    engine: Engine,
    limits: Limits,
    name: String,
    child: Child,
    /// Until the agent has answered, or as long as the container's root is in it.
    bundle: Option<Bundle>,
    answered: bool,
    log: Log,
    reader: tokio::task::JoinHandle<()>,
    ended: Option<ExitStatus>,
    cleanup: TaskTracker,
}

impl Container {
    fn start(
        engine: &Engine,
        root: &Path,
        limits: Limits,
        places: &[PathBuf],
        cleanup: &TaskTracker,
    ) -> Result<(Container, UnixStream), Error> {
        let host = |what| move |source| Error::Host { what, source };
        let argv = AGENT.into_iter().chain(engine.has_own_kernel().then_some(OWN_KERNEL));
        let argv: Vec<String> = argv.map(str::to_owned).collect();
        let content = Content { root, limits, places, argv: &argv };
        let bundle =
            Bundle::create(engine, &content).map_err(host("write an OCI bundle in /run/chitin"))?;
        let (ours, theirs) = UnixStream::pair().map_err(host("create a socket pair"))?;
        let again: OwnedFd = theirs.try_clone().map_err(host("hand over the channel"))?.into();
        let mut child = engine
            .command(&["run", "--bundle"])
            .arg(bundle.path())
            .arg(bundle.name())
            .stdin(Stdio::from(again))
            .stdout(Stdio::from(OwnedFd::from(theirs)))
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|source| Error::Spawn { path: engine.program.clone(), source })?;
        if let Some(pid) = child.id() {
            // Without it, it can be ended by us alone.
            let _ = bundle.note(&Owner::of(pid));
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
            answered: false,
            log,
            reader,
            ended: None,
            cleanup: cleanup.clone(),
        };
        Ok((container, ours))
    }

    async fn wait(&mut self) -> ExitStatus {
        match self.ended {
            Some(status) => status,
            None => {
                let status = self.child.wait().await.unwrap_or_default();
                // What it said last is on its way; what it left behind could hold the pipe for ever.
                let _ = tokio::time::timeout(LOG_LIMIT, &mut self.reader).await;
                *self.ended.insert(status)
            }
        }
    }

    /// Kills the runtime, which has not ended by itself, and whatever shares its process group.
    fn kill(&self) {
        if let Some(pid) = self.child.id().and_then(|pid| Pid::from_raw(pid.try_into().ok()?)) {
            let _ = kill_process_group(pid, Signal::KILL);
        }
    }
}

impl Instance for Container {
    fn answered(&mut self) {
        self.answered = true;
        // A tree is what the container's mounts are on: they would go with it.
        self.bundle.take_if(|bundle| !bundle.has_tree());
    }

    fn start_limit(&self) -> Duration {
        START_LIMIT
    }

    fn ended(&mut self) -> Pending<'_, Error> {
        Box::pin(async {
            let status = self.wait().await;
            let said = self.log.last_line();
            if self.answered {
                let reason = match (status.code(), self.engine.has_own_kernel()) {
                    // Its own kernel is in its cgroup: what meets the limits is all of it, and not the one that asked too much.
                    (Some(KILLED), true) => format!(
                        "gVisor's kernel was killed, as it is when the sandbox uses up its {} MiB",
                        self.limits.memory >> 20
                    ),
                    (Some(PANICKED), true) => {
                        "gVisor's kernel has given up, as it does when the sandbox starts too many processes"
                            .into()
                    }
                    _ => format!("its container has ended ({status})"),
                };
                return Error::GuestEnded(GuestEnd { reason, log: self.log.text() });
            }
            let reason = said.unwrap_or_else(|| format!("it has ended without a word ({status})"));
            Error::Container { engine: self.engine.name.into(), reason }
        })
    }

    fn stop(&mut self) -> Pending<'_, Result<(), Error>> {
        Box::pin(async {
            // gVisor's kernel would end the processes by which it runs the sandbox after itself, and `runsc`, which finds them in
            // the cgroup that it removes then, looks again a tenth of a second later.
            if self.answered && self.engine.has_own_kernel() {
                self.engine.kill(&self.name);
            }
            let by_itself = tokio::time::timeout(STOP_LIMIT, self.wait()).await.is_ok();
            // A runtime that fails when the agent has answered already may leave what it knows of the container.
            if by_itself && self.answered && !self.engine.knows(&self.name) {
                self.bundle = None;
                return Ok(());
            }
            self.kill();
            self.wait().await;
            let deleted = self.engine.delete(&self.name).await;
            self.bundle = None;
            match deleted {
                true => Ok(()),
                false => Err(Error::Left {
                    what: format!("the {} container {}", self.engine.name, self.name),
                }),
            }
        })
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // One that has answered ends with its channel, and its runtime clears up.
        if self.answered || self.ended.is_some() {
            return;
        }
        self.kill();
        let (engine, name) = (self.engine.clone(), self.name.clone());
        let left = (self.bundle.take(), self.cleanup.token());
        // Where nothing runs any more, the next start finds what is left.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                engine.delete(&name).await;
                drop(left);
            });
        }
    }
}

/// Runs a command that has nothing to say; whether it has succeeded in time.
async fn succeeds(command: &mut Command) -> bool {
    let status = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .status();
    matches!(tokio::time::timeout(DELETE_LIMIT, status).await, Ok(Ok(status)) if status.success())
}
