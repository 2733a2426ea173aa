//! A separate Docker daemon for tests, on a socket and in directories that nothing else uses.

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::thread;
use std::time::{Duration, Instant};

use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::daemon_process::{STOP_LIMIT, new_daemon_command, spawn_daemon, stop_daemon};

/// The time limit of a start: the daemon starts containerd and scans its directories.
const START_LIMIT: Duration = Duration::from_secs(60);

/// A Docker daemon. Dropping it stops the daemon and removes its directories.
#[derive(Debug)]
pub struct Dockerd {
    child: Child,
    dir: TempDir,
    killed: bool,
}

impl Dockerd {
    /// Starts a daemon and waits until it answers.
    ///
    /// # Errors
    /// The daemon cannot be started, or ends; the error contains the end of its log.
    pub fn start() -> io::Result<Dockerd> {
        Dockerd::start_with(&[])
    }

    /// Starts a daemon with further options.
    ///
    /// # Errors
    /// As [`Dockerd::start`].
    pub fn start_with(options: &[&str]) -> io::Result<Dockerd> {
        let dir = tempfile::Builder::new().prefix("chitin-dockerd-").tempdir()?;
        let child = spawn_dockerd(dir.path(), options)?;
        let mut dockerd = Dockerd { child, dir, killed: false };
        dockerd.wait_until_ready()?;
        Ok(dockerd)
    }

    /// Stops the daemon's process (SIGSTOP) until [`Dockerd::resume`]: it accepts connections and
    /// never answers.
    ///
    /// # Panics
    /// The daemon has ended.
    pub fn suspend(&self) {
        kill_process(Pid::from_child(&self.child), Signal::STOP).expect("stop dockerd");
    }

    /// Continues the daemon.
    ///
    /// # Panics
    /// The daemon has ended.
    pub fn resume(&self) {
        kill_process(Pid::from_child(&self.child), Signal::CONT).expect("continue dockerd");
    }

    /// Returns the value for `DOCKER_HOST`.
    pub fn host(&self) -> String {
        format!("unix://{}", self.dir.path().join("socket").display())
    }

    /// Ends the daemon like a crash. Its containers stay until [`Dockerd::restart`] or the drop.
    pub fn kill(&mut self) {
        let containerd = fs::read_to_string(self.dir.path().join("exec/containerd/containerd.pid"));
        self.child.kill().expect("kill dockerd");
        self.child.wait().expect("wait for dockerd");
        self.killed = true;
        // Its containerd ends a little later, and the next daemon would adopt it until then.
        let containerd = Path::new("/proc").join(containerd.expect("read containerd.pid").trim());
        let deadline = Instant::now() + STOP_LIMIT;
        while containerd.exists() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Starts a killed daemon again, on its directories.
    ///
    /// # Errors
    /// As [`Dockerd::start`].
    pub fn restart(&mut self) -> io::Result<()> {
        // The daemon refuses to start while this file names a process, and the PID may be reused.
        let _ = fs::remove_file(self.dir.path().join("pid"));
        self.child = spawn_dockerd(self.dir.path(), &[])?;
        self.killed = false;
        self.wait_until_ready()
    }

    fn wait_until_ready(&mut self) -> io::Result<()> {
        wait_for_daemon(&self.host(), &mut self.child, &self.dir.path().join("log"))
    }
}

/// Waits until a daemon answers. If it does not, the error contains the end of its log.
pub(crate) fn wait_for_daemon(host: &str, child: &mut Child, log: &Path) -> io::Result<()> {
    let deadline = Instant::now() + START_LIMIT;
    while send_get(host, "/_ping").is_err() {
        let ended = child.try_wait()?;
        if ended.is_some() || Instant::now() > deadline {
            let log = fs::read_to_string(log).unwrap_or_default();
            let last: Vec<&str> = log.lines().rev().take(5).collect();
            let state = ended.map_or("does not answer".to_owned(), |status| status.to_string());
            return Err(io::Error::other(format!("daemon: {state}: {}", last.join("; "))));
        }
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Starts a daemon without a bridge and firewall rules, which no container here needs, so that the
/// host's network is unchanged.
fn spawn_dockerd(dir: &Path, options: &[&str]) -> io::Result<Child> {
    let path = |name: &str| dir.join(name).into_os_string();
    let mut dockerd = new_daemon_command("dockerd");
    dockerd
        .args(["--iptables=false", "--bridge=none"])
        .args(["--data-root".into(), path("data"), "--exec-root".into(), path("exec")])
        .args(["--pidfile".into(), path("pid"), "--host".into()])
        .arg(format!("unix://{}", dir.join("socket").display()))
        .args(options);
    spawn_daemon(&mut dockerd, "dockerd", dir)
}

impl Drop for Dockerd {
    fn drop(&mut self) {
        if self.killed {
            // Only a daemon can clean up containers, mounts and containerd of another.
            let _ = self.restart();
        }
        // A suspended daemon would not end. The signal fails if the daemon has ended.
        let _ = kill_process(Pid::from_child(&self.child), Signal::CONT);
        stop_daemon(&mut self.child);
        // A daemon bind-mounts its data directory onto itself, and does not unmount it when killed.
        // The call fails without a mount.
        let _ = unmount(self.dir.path().join("data"), UnmountFlags::DETACH);
    }
}

/// Returns `$DOCKER_HOST`, which names the daemon of `with-dockerd`. Tests do not use a daemon that
/// serves another purpose.
///
/// # Panics
/// The variable is not set.
pub fn host() -> String {
    env::var("DOCKER_HOST").expect(
        "no DOCKER_HOST: `cargo xtask test` starts a daemon, and so does `cargo run \
         -p chitin-integration --bin with-dockerd -- cargo nextest run --profile containers`",
    )
}

/// Lists the ids of all containers of a daemon, including those that have ended.
///
/// # Errors
/// The daemon does not answer.
pub fn list_containers(host: &str) -> io::Result<BTreeSet<String>> {
    let listed: Value = serde_json::from_str(&send_get(host, "/containers/json?all=1")?)?;
    let listed =
        listed.as_array().ok_or_else(|| io::Error::other(format!("not a list: {listed}")))?;
    Ok(listed.iter().filter_map(|container| Some(container["Id"].as_str()?.to_owned())).collect())
}

/// Lists the names of all images of a daemon; `<none>` for those without.
///
/// # Errors
/// The daemon does not answer.
pub fn list_images(host: &str) -> io::Result<Vec<String>> {
    let listed: Value = serde_json::from_str(&send_get(host, "/images/json?all=1")?)?;
    let listed = listed.as_array().cloned().unwrap_or_default();
    let name = |image: &Value| image["RepoTags"][0].as_str().unwrap_or("<none>").to_owned();
    Ok(listed.iter().map(name).collect())
}

/// Sends a GET request and returns the body of the response.
fn send_get(host: &str, path: &str) -> io::Result<String> {
    let socket = PathBuf::from(host.strip_prefix("unix://").unwrap_or(host));
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    // A response of HTTP/1.0 ends with the connection.
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) =
        answer.split_once("\r\n\r\n").ok_or_else(|| io::Error::other("no response"))?;
    match head.split(' ').nth(1) {
        Some("200") => Ok(body.to_owned()),
        _ => Err(io::Error::other(head.lines().next().unwrap_or_default().to_owned())),
    }
}
