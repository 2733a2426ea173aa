//! The OCI runtimes, and the search for one that works.
//!
//! A runtime that is installed may fail or hang on this kernel, so the search runs a container in
//! it, once.

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::process::Command;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::task::TaskTracker;

use super::private_dir::open_private_dir;
use super::programs::{PATH, find_program};
use super::{Container, RUN, run_silently};
use chitin_vmm::HostError;

use crate::container::Limits;
use crate::error::ContainerError;
use crate::{Capabilities, Error, Instance, Unavailable};

/// All engines, the strongest first. gVisor has one entry for each platform that intercepts system
/// calls, the recommended one first.
const ENGINES: [(&str, Option<&str>); 5] = [
    ("runsc", Some("systrap")),
    ("runsc", Some("kvm")),
    ("runsc", Some("ptrace")),
    ("crun", None),
    ("runc", None),
];

/// Time limit of a trial. A container answers within a tenth of it; gVisor hangs on a KVM that
/// cannot run guests.
const TRIAL_LIMIT: Duration = Duration::from_secs(10);

/// Time that a trial has left when a weaker platform of the same program has answered.
const GRACE: Duration = Duration::from_secs(1);

const VERSION_LIMIT: Duration = Duration::from_secs(5);

/// Limits of a trial: the least memory of a microVM.
const TRIAL_LIMITS: Limits = Limits { vcpus: 1, memory: 64 << 20, tasks: 64, disk: None };

/// Threads of gVisor's kernel and its helper on the host, in addition to those that run the
/// sandbox's.
const GVISOR_TASKS: u32 = 256;

const CGROUPS: &str = "/sys/fs/cgroup";

/// Attempts to remove a cgroup. Killed processes stay in it until the kernel has reaped them.
const REMOVE_ATTEMPTS: u32 = 20;
const REMOVE_PAUSE: Duration = Duration::from_millis(50);

/// The result of the last search. /run is empty after a boot.
const RESULT_FILE: &str = "/run/chitin/works.json";

/// An OCI runtime on a platform.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Engine {
    pub name: &'static str,
    pub program: PathBuf,
    platform: Option<&'static str>,
    version: String,
    /// The stronger engines, each with the reason against it.
    short_of: Vec<String>,
}

/// The result of a search, remembered until the next boot.
#[derive(Serialize, Deserialize)]
struct SearchResult {
    /// Identities of the programs at the time of the search.
    programs: Vec<String>,
    /// Index in [`ENGINES`].
    engine: usize,
    version: String,
    short_of: Vec<String>,
}

impl Engine {
    /// Finds an engine by name, to remove its leftovers.
    pub fn find(name: &str) -> Option<Engine> {
        let (name, _) = ENGINES.into_iter().find(|(known, _)| *known == name)?;
        Some(Engine { program: find_program(name).ok()?, ..Engine::new(name, None) })
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

    /// Returns the program, and its platform if it has several.
    fn full_name(&self) -> String {
        match self.platform {
            Some(platform) => format!("{}/{platform}", self.name),
            None => self.name.to_owned(),
        }
    }

    /// Returns true if its sandboxes do not share the host's kernel.
    pub fn has_own_kernel(&self) -> bool {
        self.name == "runsc"
    }

    /// Returns the host's task limit for a container with this many tasks.
    ///
    /// gVisor uses one or two host tasks for each, and its kernel enforces the exact number inside.
    /// Only a compromised kernel reaches this limit.
    pub fn host_tasks(&self, tasks: u32) -> u32 {
        if self.has_own_kernel() {
            tasks.saturating_mul(2).saturating_add(GVISOR_TASKS)
        } else {
            tasks
        }
    }

    pub fn capabilities(&self) -> Capabilities {
        Capabilities {
            implementation: self.full_name(),
            version: self.version.clone(),
            short_of: self.short_of.clone(),
        }
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        // Our environment may hold secrets.
        command.env_clear().env("PATH", PATH).process_group(0);
        command.arg("--root").arg(Path::new(RUN).join(self.name));
        if self.name == "runsc" {
            command.arg("--network=none");
        }
        if let Some(platform) = self.platform {
            command.arg(format!("--platform={platform}"));
        }
        command.args(args);
        command
    }

    /// Ends a container by force and removes its state. Returns true if nothing is left.
    pub async fn delete(&self, name: &str) -> bool {
        // A runtime may report an error if the container does not exist.
        let deleted = run_silently(&mut self.command(&["delete", "--force", name])).await;
        let mut attempts = 0;
        while !self.remove_leftovers(name) {
            attempts += 1;
            if attempts == REMOVE_ATTEMPTS {
                return false;
            }
            tokio::time::sleep(REMOVE_PAUSE).await;
        }
        deleted || !self.has_state(name)
    }

    /// Kills every process of a container.
    pub fn kill_container(&self, name: &str) {
        for cgroup in container_cgroups(name) {
            let processes = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
            for pid in processes.lines().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)) {
                // The pidfd comes before the check, so that a reused pid cannot name another
                // process.
                let pidfd = pidfd_open(pid, PidfdFlags::empty());
                let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
                if let Ok(process) = pidfd
                    && cgroup.lines().any(|line| line.ends_with(&format!("/chitin/{name}")))
                {
                    let _ = pidfd_send_signal(process, Signal::KILL);
                }
            }
        }
    }

    /// Removes what a killed runtime leaves: empty cgroups and locks. Returns true if all are
    /// removed.
    pub fn remove_leftovers(&self, name: &str) -> bool {
        let removed = container_cgroups(name).all(|cgroup| fs::remove_dir(cgroup).is_ok());
        for state in self.state_files(name).filter(|path| path.extension() == Some("lock".as_ref()))
        {
            let _ = fs::remove_file(state);
        }
        removed
    }

    fn state_files(&self, name: &str) -> impl Iterator<Item = PathBuf> {
        let states = fs::read_dir(Path::new(RUN).join(self.name)).into_iter().flatten().flatten();
        let is_named = move |path: &PathBuf| path.to_string_lossy().contains(name);
        states.map(|state| state.path()).filter(is_named)
    }

    /// Returns true if the engine has state of a container.
    pub fn has_state(&self, name: &str) -> bool {
        self.state_files(name).next().is_some()
    }
}

/// Returns the cgroups of a container: one, or one in each hierarchy of version 1.
pub(super) fn container_cgroups(name: &str) -> impl Iterator<Item = PathBuf> {
    let root = Path::new(CGROUPS);
    let hierarchies = fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path());
    let cgroups = hierarchies
        .chain([root.to_owned()])
        .map(move |hierarchy| hierarchy.join("chitin").join(name));
    cgroups.filter(|cgroup| cgroup.is_dir())
}

/// Finds the strongest engine that runs a container.
pub(crate) async fn find_working_engine(
    root: &Path,
    cleanup: &TaskTracker,
) -> Result<Engine, Unavailable> {
    let programs: Vec<String> = ENGINES.iter().map(|(name, _)| program_identity(name)).collect();
    if let Some(engine) = load_result(&programs) {
        return Ok(engine);
    }
    let mut short_of: Vec<String> = Vec::new();
    let mut trials = Trials {
        name: "",
        version: Ok(String::new()),
        running: VecDeque::new(),
        works: watch::Sender::new(false),
    };
    for (index, (name, platform)) in ENGINES.into_iter().enumerate() {
        let engine = Engine::new(name, platform);
        let program = match find_program(name) {
            Ok(program) => program,
            Err(reason) => {
                if !short_of.contains(&reason) {
                    short_of.push(reason);
                }
                continue;
            }
        };
        let engine = Engine { program, ..engine };
        match trials.outcome_of(&engine, root, cleanup).await {
            Ok(version) => {
                let found = SearchResult { programs, engine: index, version, short_of };
                // If this fails, the next process searches again.
                let _ = store_result(&found);
                return Ok(Engine { version: found.version, short_of: found.short_of, ..engine });
            }
            Err(reason) => short_of.push(format!("{} does not work: {reason}", engine.full_name())),
        }
    }
    Err(Unavailable {
        reason: short_of.join(", "),
        remedy: "install runsc (Debian: apt-get install runsc), crun or runc".into(),
    })
}

fn load_result(programs: &[String]) -> Option<Engine> {
    let found: SearchResult = serde_json::from_slice(&fs::read(RESULT_FILE).ok()?).ok()?;
    let (name, platform) = *ENGINES.get(found.engine)?;
    (found.programs == programs).then_some(())?;
    let engine = Engine::new(name, platform);
    Some(Engine {
        program: find_program(name).ok()?,
        version: found.version,
        short_of: found.short_of,
        ..engine
    })
}

/// Replaces the file, so that another process reads the old or the new result.
fn store_result(found: &SearchResult) -> io::Result<()> {
    open_private_dir(Path::new(RUN), 0o711)?;
    let mut file = tempfile::NamedTempFile::new_in(RUN)?;
    serde_json::to_writer(&mut file, found)?;
    file.persist(RESULT_FILE)?;
    Ok(())
}

/// The trials of one program on all its platforms, run concurrently so that platforms that hang
/// cost the time limit once.
struct Trials {
    name: &'static str,
    version: Result<String, String>,
    running: VecDeque<JoinHandle<Result<String, String>>>,
    /// True once a platform of this program has run a container.
    works: watch::Sender<bool>,
}

impl Trials {
    /// Returns the outcome of an engine: its version, or the reason why it does not work.
    async fn outcome_of(
        &mut self,
        engine: &Engine,
        root: &Path,
        cleanup: &TaskTracker,
    ) -> Result<String, String> {
        if self.name != engine.name {
            self.name = engine.name;
            self.running.clear();
            self.works = watch::Sender::new(false);
            self.version = query_version(engine).await;
            let Ok(version) = &self.version else { return self.version.clone() };
            let platforms = ENGINES.into_iter().filter(|(name, _)| *name == engine.name);
            self.running = platforms
                .map(|(_, platform)| {
                    let (engine, root) = (Engine { platform, ..engine.clone() }, root.to_owned());
                    let (version, works) = (version.clone(), self.works.clone());
                    let tracker = cleanup.clone();
                    // Tracked, because one that is aborted still has a container to remove.
                    cleanup.spawn(async move {
                        let outcome = run_trial(&engine, &root, &tracker).await;
                        works.send_if_modified(|works| {
                            outcome.is_ok() && !std::mem::replace(works, true)
                        });
                        outcome.map(|()| version)
                    })
                })
                .collect();
        }
        match self.running.pop_front() {
            Some(trial) => self.await_trial(trial).await,
            None => self.version.clone(),
        }
    }

    /// Waits for a trial. One that hangs is given up soon after another platform of the same
    /// program has worked, which isolates as well.
    async fn await_trial(
        &self,
        mut trial: JoinHandle<Result<String, String>>,
    ) -> Result<String, String> {
        let mut works = self.works.subscribe();
        let other_works = async {
            // The sender lives as long as the trials.
            let _ = works.wait_for(|works| *works).await;
            tokio::time::sleep(GRACE).await;
        };
        tokio::select! {
            outcome = &mut trial => outcome.unwrap_or_else(|error| Err(error.to_string())),
            () = other_works => {
                trial.abort();
                Err("no answer of the agent, while another platform answered".into())
            }
        }
    }
}

impl Drop for Trials {
    fn drop(&mut self) {
        // Do not wait for engines that are weaker than the one that works.
        self.running.iter().for_each(JoinHandle::abort);
    }
}

/// Returns a text that changes when the program is replaced.
fn program_identity(name: &str) -> String {
    let Ok(path) = find_program(name) else { return String::new() };
    let Ok(metadata) = fs::metadata(&path) else { return String::new() };
    format!("{} {} {} {}", path.display(), metadata.ino(), metadata.len(), metadata.mtime())
}

async fn query_version(engine: &Engine) -> Result<String, String> {
    let mut version = engine.command(&[]);
    version.kill_on_drop(true).arg("--version");
    let asked = tokio::time::timeout(VERSION_LIMIT, version.output()).await;
    let output = asked
        .map_err(|_| "it does not print its version".to_owned())?
        .map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let first_line = text.lines().next().unwrap_or_default();
    Ok(first_line.rsplit(' ').next().unwrap_or_default().to_owned())
}

/// Runs a container until its agent has answered.
async fn run_trial(engine: &Engine, root: &Path, cleanup: &TaskTracker) -> Result<(), String> {
    let (mut container, stream) = Container::start(engine, root, TRIAL_LIMITS, &[], cleanup)
        .map_err(|error| match error {
            Error::Spawn { source, .. } | Error::Host(HostError { source, .. }) => {
                source.to_string()
            }
            other => other.to_string(),
        })?;
    let mut stream = stream
        .set_nonblocking(true)
        .and_then(|()| UnixStream::from_std(stream))
        .map_err(|error| error.to_string())?;
    let hello = tokio::time::timeout(TRIAL_LIMIT, stream.read(&mut [0])).await;
    let outcome = match hello {
        Ok(Ok(1)) => {
            container.release_start_resources();
            Ok(())
        }
        Ok(_) => Err(match container.wait_for_end().await {
            Error::Container { source: ContainerError::Reported(message), .. } => message,
            other => other.to_string(),
        }),
        Err(_) => {
            container.kill_runtime();
            Err(format!("no answer of the agent within {} s", TRIAL_LIMIT.as_secs()))
        }
    };
    drop(stream);
    container.stop().await.map_err(|error| error.to_string())?;
    outcome
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn trials() -> Trials {
        let works = watch::Sender::new(false);
        Trials { name: "", version: Ok(String::new()), running: VecDeque::new(), works }
    }

    #[tokio::test]
    async fn hanging_trial_ends_once_another_platform_works() {
        let trials = trials();
        let hanging = tokio::spawn(std::future::pending());
        trials.works.send_replace(true);
        let started = Instant::now();
        assert!(trials.await_trial(hanging).await.is_err());
        assert!(started.elapsed() >= GRACE);
        // The stronger one is not given up while it may still answer.
        let slow = tokio::spawn(async {
            tokio::time::sleep(GRACE / 4).await;
            Ok("1".to_owned())
        });
        assert_eq!(trials.await_trial(slow).await, Ok("1".into()));
    }
}
