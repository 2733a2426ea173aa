//! A Docker daemon for tests: one of their own, on a socket and in directories that nobody else uses.

use std::collections::BTreeSet;
use std::env;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

/// It starts containerd, and looks over what is in its directories.
const START_LIMIT: Duration = Duration::from_secs(60);

/// It stops containers first, if there are any.
const STOP_LIMIT: Duration = Duration::from_secs(30);

/// A daemon. Dropping it stops it and removes its directories.
#[derive(Debug)]
pub struct Dockerd {
    child: Child,
    dir: TempDir,
    killed: bool,
}

impl Dockerd {
    /// Starts one and waits until it answers.
    ///
    /// # Errors
    /// It cannot be started, or ends; the error carries what it said.
    pub fn start() -> io::Result<Dockerd> {
        let dir = tempfile::Builder::new().prefix("chitin-dockerd-").tempdir()?;
        let child = daemon(dir.path())?;
        let mut dockerd = Dockerd { child, dir, killed: false };
        dockerd.wait_until_it_answers()?;
        Ok(dockerd)
    }

    /// What to set `DOCKER_HOST` to.
    pub fn host(&self) -> String {
        format!("unix://{}", self.dir.path().join("socket").display())
    }

    /// Ends it as a crash would. Its containers stay until [`Dockerd::restart`], or the drop.
    pub fn kill(&mut self) {
        let containerd = fs::read_to_string(self.dir.path().join("exec/containerd/containerd.pid"));
        self.child.kill().expect("kill dockerd");
        self.child.wait().expect("wait for dockerd");
        self.killed = true;
        // Its containerd ends with it, but not at once, and the next daemon would take it for its own.
        let containerd = Path::new("/proc").join(containerd.expect("read containerd.pid").trim());
        let deadline = Instant::now() + STOP_LIMIT;
        while containerd.exists() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Starts it again, on what it has left.
    ///
    /// # Errors
    /// As [`Dockerd::start`].
    pub fn restart(&mut self) -> io::Result<()> {
        // The daemon refuses to start while this names a process, and the number may have been given again.
        let _ = fs::remove_file(self.dir.path().join("pid"));
        self.child = daemon(self.dir.path())?;
        self.killed = false;
        self.wait_until_it_answers()
    }

    fn wait_until_it_answers(&mut self) -> io::Result<()> {
        let deadline = Instant::now() + START_LIMIT;
        while get(&self.host(), "/_ping").is_err() {
            let ended = self.child.try_wait()?;
            if ended.is_some() || Instant::now() > deadline {
                let log = fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
                let last: Vec<&str> = log.lines().rev().take(5).collect();
                let state = ended.map_or("does not answer".to_owned(), |status| status.to_string());
                return Err(io::Error::other(format!("dockerd: {state}: {}", last.join("; "))));
            }
            thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }
}

/// Without a bridge and rules of a firewall, which no container here needs, it leaves the host's network alone.
fn daemon(dir: &Path) -> io::Result<Child> {
    let path = |name: &str| dir.join(name).into_os_string();
    let log = File::options().create(true).append(true).open(dir.join("log"))?;
    // It ends with whoever started it, also if that is killed.
    Command::new("setpriv")
        .args(["--pdeathsig", "TERM", "dockerd", "--iptables=false", "--bridge=none"])
        .args(["--data-root".into(), path("data"), "--exec-root".into(), path("exec")])
        .args(["--pidfile".into(), path("pid"), "--host".into()])
        .arg(format!("unix://{}", dir.join("socket").display()))
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .map_err(|error| {
            io::Error::other(format!("start dockerd: {error} (cargo xtask setup installs it)"))
        })
}

impl Drop for Dockerd {
    fn drop(&mut self) {
        if self.killed {
            // Only a daemon clears up behind a daemon: containers, mounts, containerd.
            let _ = self.restart();
        }
        // An error is one that has ended.
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        let deadline = Instant::now() + STOP_LIMIT;
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        // A daemon mounts its data over itself, and one that was killed has not undone it. An error is that there is none.
        let _ = unmount(self.dir.path().join("data"), UnmountFlags::DETACH);
    }
}

/// `$DOCKER_HOST`, which names the daemon of `with-dockerd`. A daemon that is there for something else is not for tests.
///
/// # Panics
/// If it is not set.
pub fn host() -> String {
    env::var("DOCKER_HOST").expect(
        "no DOCKER_HOST: `cargo xtask test` starts a daemon for this, and so does \
         `cargo run -p chitin-integration --bin with-dockerd -- cargo nextest run --profile containers`",
    )
}

/// The identifiers of all containers of a daemon, also of those that have ended.
///
/// # Errors
/// It does not answer.
pub fn containers(host: &str) -> io::Result<BTreeSet<String>> {
    let listed: Value = serde_json::from_str(&get(host, "/containers/json?all=1")?)?;
    let listed = listed.as_array().ok_or_else(|| io::Error::other(format!("no list: {listed}")))?;
    Ok(listed.iter().filter_map(|container| Some(container["Id"].as_str()?.to_owned())).collect())
}

/// The body of an answer.
fn get(host: &str, path: &str) -> io::Result<String> {
    let socket = PathBuf::from(host.strip_prefix("unix://").unwrap_or(host));
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    // In this version an answer ends with the connection.
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) =
        answer.split_once("\r\n\r\n").ok_or_else(|| io::Error::other("no answer"))?;
    match head.split(' ').nth(1) {
        Some("200") => Ok(body.to_owned()),
        _ => Err(io::Error::other(head.lines().next().unwrap_or_default().to_owned())),
    }
}
