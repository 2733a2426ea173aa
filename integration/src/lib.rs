//! What the end-to-end tests are written in: sentences about `chitin run` and the sandbox it runs.
//!
//! Those that boot microVMs need a usable KVM. `cargo xtask test` runs them on the host where `chitin doctor` says that it has
//! one, and in the emulated KVM host otherwise. Those of the container tiers need root, an OCI runtime and a Docker daemon of
//! their own, which `with-dockerd` starts. Elsewhere they fail, and say so; they are never skipped.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

pub use chitin::TierKind;
pub use docker::Dockerd;
pub use host_resources::Belongings;
pub use tier_under_test::{On, Policy};

pub mod canary;
pub mod docker;
pub mod host_resources;
mod tier_under_test;

/// How long one `chitin` may take. A boot takes seconds on the emulated host, and twenty that run at once take two minutes.
pub const LIMIT: Duration = Duration::from_secs(300);

/// How long a monitor may survive whoever held it.
const GONE_LIMIT: Duration = Duration::from_secs(20);

/// What one `chitin` did.
#[derive(Debug)]
pub struct Outcome {
    /// Its exit code, 128 + n if signal n ended it.
    pub code: i32,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error, lossy.
    pub stderr: String,
}

impl Outcome {
    /// Standard output as text, without the final newline.
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).expect("UTF-8 output").trim_end_matches('\n')
    }

    /// Asserts exit code 0 and returns the text.
    #[track_caller]
    pub fn ok(&self) -> &str {
        assert_eq!(self.code, 0, "{self:?}");
        self.text()
    }

    /// Asserts that Chitin refused, in one line that holds `words`.
    #[track_caller]
    pub fn refused(&self, words: &str) {
        assert_eq!(self.code, 125, "{self:?}");
        assert!(self.stderr.contains(words), "no `{words}` in: {}", self.stderr);
        assert_eq!(
            self.stderr.trim_end().lines().count(),
            1,
            "more than one line: {}",
            self.stderr
        );
        assert!(self.stderr.starts_with("chitin: "), "{}", self.stderr);
    }
}

/// A `chitin` about to be run, in a directory of its own: by that its processes are found again.
#[derive(Debug)]
pub struct Chitin {
    command: Command,
    dir: TempDir,
    stdin: Vec<u8>,
}

/// `chitin` with these arguments, split at spaces.
pub fn chitin(args: &str) -> Chitin {
    require_microvms();
    Chitin::new(args)
}

/// `chitin run --` with this command, split at spaces.
pub fn run(command: &str) -> Chitin {
    chitin(&format!("run -- {command}"))
}

/// `chitin run -- sh -c SCRIPT`.
pub fn sh(script: &str) -> Chitin {
    run("sh -c").arg(script)
}

impl Chitin {
    /// `chitin` with these arguments, split at spaces, wherever it is.
    pub fn new(args: &str) -> Chitin {
        let dir = tempfile::tempdir().expect("create a directory");
        let mut command = Command::new(binary("chitin"));
        command.args(args.split_whitespace()).current_dir(&dir);
        Chitin { command, dir, stdin: Vec::new() }
    }

    /// Adds one argument as it is.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Chitin {
        self.command.arg(arg);
        self
    }

    /// Adds arguments as they are.
    pub fn args(mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Chitin {
        self.command.args(args);
        self
    }

    /// Sets an environment variable of `chitin` itself.
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Chitin {
        self.command.env(name, value);
        self
    }

    /// What `chitin` reads from its standard input.
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Chitin {
        self.stdin = bytes.into();
        self
    }

    /// Starts it by way of another program, which gets the command after its own words.
    pub fn by(mut self, words: &[&OsStr]) -> Chitin {
        let [program, words @ ..] = words else { return self };
        let mut command = Command::new(program);
        command.args(words).arg(self.command.get_program()).args(self.command.get_args());
        for (name, value) in self.command.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command.current_dir(self.dir.path());
        self.command = command;
        self
    }

    /// The command, to be run in another way.
    pub fn command(&mut self) -> &mut Command {
        &mut self.command
    }

    /// Starts it with pipes on all three standard streams.
    pub fn spawn(mut self) -> Running {
        self.command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = self.command.spawn().expect("start chitin");
        Running { child, dir: self.dir, seen: RefCell::default() }
    }

    /// Runs it to its end, and asserts that it left no process behind.
    #[track_caller]
    pub fn outcome(mut self) -> Outcome {
        let stdin = std::mem::take(&mut self.stdin);
        let mut running = self.spawn();
        let mut pipe = running.child.stdin.take().expect("stdin is piped");
        let writer = thread::spawn(move || {
            // A workload need not read it all.
            let _ = pipe.write_all(&stdin);
        });
        let stdout = collect(running.child.stdout.take().expect("stdout is piped"));
        let stderr = collect(running.child.stderr.take().expect("stderr is piped"));
        let code = running.wait();
        writer.join().expect("write stdin");
        let stdout = stdout.join().expect("read stdout");
        let stderr = String::from_utf8_lossy(&stderr.join().expect("read stderr")).into_owned();
        running.assert_nothing_left();
        Outcome { code, stdout, stderr }
    }
}

/// A `chitin` that runs.
#[derive(Debug)]
pub struct Running {
    /// The process, with its pipes.
    pub child: Child,
    dir: TempDir,
    /// Number and start of every process that was found to be of this run.
    seen: RefCell<BTreeSet<(u32, u64)>>,
}

/// What is known of a process that has not ended.
struct Process {
    path: PathBuf,
    pid: u32,
    parent: u32,
    /// In clock ticks since the host's boot: with it a number that was given again is another process.
    started: u64,
    /// Whether it works in the directory of the run.
    here: bool,
}

impl Process {
    fn read(path: PathBuf, dir: &Path) -> Option<Process> {
        let pid = path.file_name()?.to_str()?.parse().ok()?;
        let stat = fs::read_to_string(path.join("stat")).ok()?;
        // Behind the name, which may hold anything: state, parent, and the start as the 22nd of all fields.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let (state, parent, started) = (*fields.first()?, fields.get(1)?, fields.get(19)?);
        let here = fs::read_link(path.join("cwd")).is_ok_and(|cwd| cwd == dir);
        let alive = !["Z", "X"].contains(&state);
        alive.then_some(Process {
            pid,
            parent: parent.parse().ok()?,
            started: started.parse().ok()?,
            here,
            path,
        })
    }
}

impl Running {
    /// Waits for its end; its exit code, or 128 + signal.
    #[track_caller]
    pub fn wait(&mut self) -> i32 {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.child.try_wait().expect("wait for chitin") {
                return status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
            }
            if Instant::now() > deadline {
                let _ = self.child.kill();
                panic!("chitin has not ended within {LIMIT:?}");
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("send a signal");
    }

    /// Waits until standard output holds a line, and returns it.
    #[track_caller]
    pub fn line(&mut self) -> String {
        let stdout = self.child.stdout.as_mut().expect("stdout is piped");
        let mut line = Vec::new();
        let mut byte = [0];
        while line.last() != Some(&b'\n') {
            if stdout.read(&mut byte).expect("read stdout") == 0 {
                break;
            }
            line.push(byte[0]);
        }
        String::from_utf8(line).expect("UTF-8").trim_end().to_owned()
    }

    /// The directory that `chitin` runs in.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The processes of this run: `chitin`, the monitor's keeper, and the monitor, which is in a jail. Whoever has been seen
    /// here once is recognized again, also when its parents are gone.
    pub fn processes(&self) -> Vec<PathBuf> {
        let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
        let own = fs::canonicalize(&self.dir).expect("the directory is there");
        let all: Vec<Process> =
            entries.filter_map(|entry| Process::read(entry.ok()?.path(), &own)).collect();
        let mut seen = self.seen.borrow_mut();
        loop {
            let children = all.iter().filter(|process| {
                process.here || seen.iter().any(|(pid, _)| *pid == process.parent)
            });
            let found: Vec<_> = children
                .map(|process| (process.pid, process.started))
                .filter(|id| !seen.contains(id))
                .collect();
            if found.is_empty() {
                break;
            }
            seen.extend(found);
        }
        all.into_iter()
            .filter(|process| seen.contains(&(process.pid, process.started)))
            .map(|process| process.path)
            .collect()
    }

    /// Asserts that every process of this run ends by itself.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        let deadline = Instant::now() + GONE_LIMIT;
        loop {
            let left = self.processes();
            if left.is_empty() {
                return;
            }
            assert!(Instant::now() < deadline, "left behind: {left:?}");
            thread::sleep(Duration::from_millis(20));
        }
    }
}

fn collect(mut from: impl Read + Send + 'static) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        from.read_to_end(&mut bytes).expect("read a pipe");
        bytes
    })
}

/// Fails the test, with the reason, where microVMs cannot run.
fn require_microvms() {
    static VERDICT: OnceLock<Result<(), String>> = OnceLock::new();
    let verdict = VERDICT.get_or_init(|| {
        let doctor = Command::new(binary("chitin")).args(["doctor"]).output();
        match doctor {
            Ok(output) if output.status.success() => Ok(()),
            Ok(output) => Err(String::from_utf8_lossy(&output.stdout).into_owned()),
            Err(error) => Err(format!("{}: {error}", binary("chitin").display())),
        }
    });
    if let Err(reason) = verdict {
        panic!("no microVMs here; `cargo xtask test` runs this where there are.\n{reason}");
    }
}

/// A release binary: in `$CHITIN_BIN_DIR`, else in the workspace's `target/release`.
pub fn binary(name: &str) -> PathBuf {
    let dir = std::env::var_os("CHITIN_BIN_DIR")
        .map_or_else(|| workspace().join("target/release"), PathBuf::from);
    dir.join(name)
}

/// The directory of the workspace.
pub fn workspace() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// Writes a file and returns its path as text.
pub fn file(dir: &Path, name: &str, content: impl AsRef<[u8]>) -> io::Result<String> {
    let path = dir.join(name);
    fs::write(&path, content)?;
    Ok(path.into_os_string().into_string().expect("UTF-8 path"))
}

/// A library sandbox of the files that `cargo xtask` builds.
pub fn builder() -> chitin::Builder {
    let built = workspace().join("target/artifacts");
    chitin::Sandbox::builder().artifacts(chitin::Artifacts {
        kernel: built.join("vmlinux"),
        root_image: built.join("root.img"),
        monitor: binary("chitin-vmm"),
    })
}

/// Seconds since 1970, to compare a guest's clock with.
pub fn unix_time() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .expect("a clock after 1970")
        .as_secs()
}
