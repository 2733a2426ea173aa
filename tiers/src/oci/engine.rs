//! Which OCI runtime there is, and whether it works: found out by running a container, once, because a runtime that is
//! installed may still not work on this kernel, and may hang.

use std::collections::VecDeque;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::process::Command;
use tokio::task::JoinHandle;
use tokio_util::task::TaskTracker;

use super::{Container, RUN, succeeds};
use crate::container::Limits;
use crate::{Capabilities, Error, Instance, Unavailable};

/// All there are, the strongest first; of gVisor each way to intercept system calls, the one it recommends first.
const ENGINES: [(&str, Option<&str>); 5] = [
    ("runsc", Some("systrap")),
    ("runsc", Some("kvm")),
    ("runsc", Some("ptrace")),
    ("crun", None),
    ("runc", None),
];

/// A container that says hello takes a tenth of it. A gVisor whose KVM does not run guests hangs.
const TRIAL_LIMIT: Duration = Duration::from_secs(10);

const VERSION_LIMIT: Duration = Duration::from_secs(5);

/// The least that a microVM has too.
const TRIAL: Limits = Limits { vcpus: 1, memory: 64 << 20, tasks: 64, disk: None };

/// Threads that gVisor's kernel and its helper have on the host, beside those by which it runs the sandbox's.
const GVISOR_TASKS: u32 = 256;

const CGROUPS: &str = "/sys/fs/cgroup";

/// Processes that were killed are in their cgroup until the kernel is done with them.
const CLEAR_TRIES: u32 = 20;
const CLEAR_PAUSE: Duration = Duration::from_millis(50);

const FOUND: &str = "/run/chitin/works.json";

/// A runtime.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Engine {
    pub name: &'static str,
    pub program: PathBuf,
    platform: Option<&'static str>,
    version: String,
    /// Why none of those before it.
    short_of: Vec<String>,
}

/// What is remembered until the next boot.
#[derive(Serialize, Deserialize)]
struct Found {
    /// What the runtimes were at that time.
    programs: Vec<String>,
    /// The index in [`ENGINES`].
    engine: usize,
    version: String,
    short_of: Vec<String>,
}

impl Engine {
    /// The one of that name, to clear up behind it.
    pub fn named(name: &str) -> Option<Engine> {
        let (name, _) = ENGINES.into_iter().find(|(known, _)| *known == name)?;
        Some(Engine { program: find(name)?, ..Engine::new(name, None) })
    }

    fn new(name: &'static str, platform: Option<&'static str>) -> Engine {
        Engine {
            name,
            program: PathBuf::new(),
            platform,
            version: String::new(),
            short_of: Vec::new(),
        }
    }

    /// The program, and its platform if it has several.
    fn title(&self) -> String {
        match self.platform {
            Some(platform) => format!("{}/{platform}", self.name),
            None => self.name.to_owned(),
        }
    }

    /// Whether a sandbox under it has a kernel that is not the host's.
    pub fn has_own_kernel(&self) -> bool {
        self.name == "runsc"
    }

    /// The most tasks of the host by which so many of a container run. gVisor has one or two for each, and the agent has it keep
    /// the exact number inside: this one is met only by a kernel that does not.
    pub fn host_tasks(&self, tasks: u32) -> u32 {
        if self.has_own_kernel() {
            tasks.saturating_mul(2).saturating_add(GVISOR_TASKS)
        } else {
            tasks
        }
    }

    pub fn capabilities(&self) -> Capabilities {
        Capabilities {
            implementation: self.title(),
            version: self.version.clone(),
            short_of: self.short_of.clone(),
        }
    }

    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        // Our environment may hold the very secrets that are handed over.
        command.env_clear().env("PATH", PATH).process_group(0);
        command.arg("--root").arg(Path::new(RUN).join(self.name));
        if self.name == "runsc" {
            command.arg("--network=none");
        }
        if let Some(platform) = self.platform {
            command.arg(format!("--platform={platform}"));
        }
        command.args(words);
        command
    }

    /// Ends a container by force and forgets it; whether nothing is left of it.
    pub async fn delete(&self, name: &str) -> bool {
        // A runtime may call it a failure that there was none.
        let deleted = succeeds(&mut self.command(&["delete", "--force", name])).await;
        for _ in 0..CLEAR_TRIES {
            if self.clear(name) {
                break;
            }
            tokio::time::sleep(CLEAR_PAUSE).await;
        }
        deleted || !self.knows(name)
    }

    /// Kills every process of a container at the same time.
    pub fn kill(&self, name: &str) {
        for cgroup in cgroups(name) {
            let processes = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
            for pid in processes.lines().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)) {
                // Held before it is looked at, so that a number that is given again means nobody else.
                let held = pidfd_open(pid, PidfdFlags::empty());
                let place = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
                if let Ok(process) = held
                    && place.lines().any(|line| line.ends_with(&format!("/chitin/{name}")))
                {
                    let _ = pidfd_send_signal(process, Signal::KILL);
                }
            }
        }
    }

    /// Removes what a runtime forgets of a container when it was killed itself: cgroups, which have to be empty, and locks.
    fn clear(&self, name: &str) -> bool {
        let cleared = cgroups(name).all(|cgroup| fs::remove_dir(cgroup).is_ok());
        for state in self.states(name).filter(|path| path.extension() == Some("lock".as_ref())) {
            let _ = fs::remove_file(state);
        }
        cleared
    }

    fn states(&self, name: &str) -> impl Iterator<Item = PathBuf> {
        let states = fs::read_dir(Path::new(RUN).join(self.name)).into_iter().flatten().flatten();
        let of_it = move |path: &PathBuf| path.to_string_lossy().contains(name);
        states.map(|state| state.path()).filter(of_it)
    }

    /// Whether it has anything of a container.
    pub fn knows(&self, name: &str) -> bool {
        self.states(name).next().is_some()
    }
}

/// Those of a container: one, or with version 1 one in each hierarchy.
fn cgroups(name: &str) -> impl Iterator<Item = PathBuf> {
    let root = Path::new(CGROUPS);
    let hierarchies = fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path());
    let places = hierarchies
        .chain([root.to_owned()])
        .map(move |hierarchy| hierarchy.join("chitin").join(name));
    places.filter(|cgroup| cgroup.is_dir())
}

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The program of that name: where this process would find it, or where administrators' tools are.
fn find(name: &str) -> Option<PathBuf> {
    let own = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&own).chain(std::env::split_paths(PATH)).collect::<Vec<_>>();
    places
        .into_iter()
        .filter(|place| place.is_absolute())
        .map(|place| place.join(name))
        .find(|path| path.is_file())
}

/// The strongest that works.
pub(crate) async fn that_works(root: &Path, cleanup: &TaskTracker) -> Result<Engine, Unavailable> {
    let programs: Vec<String> = ENGINES.iter().map(|(name, _)| identity(name)).collect();
    if let Some(engine) = remembered(&programs) {
        return Ok(engine);
    }
    let mut short_of: Vec<String> = Vec::new();
    let mut trials = Trials { name: "", version: Ok(String::new()), running: VecDeque::new() };
    for (index, (name, platform)) in ENGINES.into_iter().enumerate() {
        let engine = Engine::new(name, platform);
        let Some(program) = find(name) else {
            let reason = format!("{name} is not installed");
            if !short_of.contains(&reason) {
                short_of.push(reason);
            }
            continue;
        };
        let engine = Engine { program, ..engine };
        match trials.outcome(&engine, root, cleanup).await {
            Ok(version) => {
                let found = Found { programs, engine: index, version, short_of };
                // Not remembered, it is found out again.
                let _ = serde_json::to_vec(&found).map(|json| fs::write(FOUND, json));
                return Ok(Engine { version: found.version, short_of: found.short_of, ..engine });
            }
            Err(reason) => short_of.push(format!("{} does not work: {reason}", engine.title())),
        }
    }
    Err(Unavailable {
        reason: short_of.join(", "),
        remedy: "install runsc (Debian: apt-get install runsc), crun or runc".into(),
    })
}

fn remembered(programs: &[String]) -> Option<Engine> {
    let found: Found = serde_json::from_slice(&fs::read(FOUND).ok()?).ok()?;
    let (name, platform) = *ENGINES.get(found.engine)?;
    (found.programs == programs).then_some(())?;
    let engine = Engine::new(name, platform);
    Some(Engine {
        program: find(name)?,
        version: found.version,
        short_of: found.short_of,
        ..engine
    })
}

/// Trials of one program, all its platforms at the same time: one that hangs costs its time once.
struct Trials {
    name: &'static str,
    version: Result<String, String>,
    running: VecDeque<JoinHandle<Result<String, String>>>,
}

impl Trials {
    /// Of the next platform of its program.
    async fn outcome(
        &mut self,
        engine: &Engine,
        root: &Path,
        cleanup: &TaskTracker,
    ) -> Result<String, String> {
        if self.name != engine.name {
            self.name = engine.name;
            self.running.clear();
            self.version = version(engine).await;
            let Ok(version) = &self.version else { return self.version.clone() };
            let platforms = ENGINES.into_iter().filter(|(name, _)| *name == engine.name);
            self.running = platforms
                .map(|(_, platform)| {
                    let (engine, root) = (Engine { platform, ..engine.clone() }, root.to_owned());
                    let (version, cleanup) = (version.clone(), cleanup.clone());
                    tokio::spawn(async move {
                        try_out(&engine, &root, &cleanup).await.map(|()| version)
                    })
                })
                .collect();
        }
        match self.running.pop_front() {
            Some(trial) => trial.await.unwrap_or_else(|error| Err(error.to_string())),
            None => self.version.clone(),
        }
    }
}

impl Drop for Trials {
    fn drop(&mut self) {
        // What is weaker than what works is not waited for.
        self.running.iter().for_each(JoinHandle::abort);
    }
}

/// Changes when the program does.
fn identity(name: &str) -> String {
    let Some(path) = find(name) else { return String::new() };
    let Ok(is) = fs::metadata(&path) else { return String::new() };
    format!("{} {} {} {}", path.display(), is.ino(), is.len(), is.mtime())
}

async fn version(engine: &Engine) -> Result<String, String> {
    let mut version = engine.command(&[]);
    version.kill_on_drop(true).arg("--version");
    let asked = tokio::time::timeout(VERSION_LIMIT, version.output()).await;
    let output = asked
        .map_err(|_| "it does not say its version".to_owned())?
        .map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let words = text.lines().next().unwrap_or_default();
    Ok(words.rsplit(' ').next().unwrap_or_default().to_owned())
}

/// Runs a container that says hello.
async fn try_out(engine: &Engine, root: &Path, cleanup: &TaskTracker) -> Result<(), String> {
    let (mut container, stream) =
        Container::start(engine, root, TRIAL, &[], cleanup).map_err(|error| match error {
            Error::Spawn { source, .. } | Error::Host { source, .. } => source.to_string(),
            other => other.to_string(),
        })?;
    let mut stream = stream
        .set_nonblocking(true)
        .and_then(|()| UnixStream::from_std(stream))
        .map_err(|error| error.to_string())?;
    let hello = tokio::time::timeout(TRIAL_LIMIT, stream.read(&mut [0])).await;
    let outcome = match hello {
        Ok(Ok(1)) => {
            container.answered();
            Ok(())
        }
        Ok(_) => Err(match container.ended().await {
            Error::Container { reason, .. } => reason,
            other => other.to_string(),
        }),
        Err(_) => {
            // It has had its time.
            container.kill();
            Err(format!("a container has not answered for {} s", TRIAL_LIMIT.as_secs()))
        }
    };
    drop(stream);
    container.stop().await.map_err(|error| error.to_string())?;
    outcome
}
