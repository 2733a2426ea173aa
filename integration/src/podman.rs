//! A separate service of Podman for tests, on a socket and in directories that nothing else uses.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::docker::wait_for_daemon;

/// The time limit of a stop.
const STOP_LIMIT: Duration = Duration::from_secs(30);

/// Settings that do not need systemd. Debian's crun refuses hosts with both cgroup versions.
const CONFIG: &str = "[engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\n\
                      runtime = \"runc\"\n";

/// A service of Podman. Dropping it stops the service and removes its directories.
#[derive(Debug)]
pub struct Podman {
    child: Child,
    dir: TempDir,
}

impl Podman {
    /// Starts a service and waits until it answers.
    ///
    /// # Errors
    /// The service cannot be started, or ends; the error contains the end of its log.
    pub fn start() -> io::Result<Podman> {
        let dir = tempfile::Builder::new().prefix("chitin-podman-").tempdir()?;
        let child = spawn_service(dir.path())?;
        let mut podman = Podman { child, dir };
        let (host, log) = (podman.host(), podman.dir.path().join("log"));
        wait_for_daemon(&host, &mut podman.child, &log)?;
        Ok(podman)
    }

    /// Returns the value for `DOCKER_HOST`.
    pub fn host(&self) -> String {
        format!("unix://{}", self.dir.path().join("socket").display())
    }
}

fn spawn_service(dir: &Path) -> io::Result<Child> {
    let config = dir.join("containers.conf");
    fs::write(&config, CONFIG)?;
    let log = File::options().create(true).append(true).open(dir.join("log"))?;
    // The service ends with this process, even if this process is killed.
    Command::new("setpriv")
        .args(["--pdeathsig", "TERM", "podman", "--root"])
        .arg(dir.join("root"))
        .arg("--runroot")
        .arg(dir.join("run"))
        .args(["--tmpdir".into(), dir.join("tmp").into_os_string()])
        .args(["--storage-driver", "overlay", "system", "service", "--time", "0"])
        .arg(format!("unix://{}", dir.join("socket").display()))
        .env("CONTAINERS_CONF", config)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .map_err(|error| {
            io::Error::other(format!("start podman: {error} (cargo xtask setup installs it)"))
        })
}

impl Drop for Podman {
    fn drop(&mut self) {
        // The signal fails if the service has ended.
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        let deadline = Instant::now() + STOP_LIMIT;
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        // The storage library bind-mounts its directory onto itself. The call fails without a
        // mount.
        for mounted in ["root/overlay", "root"] {
            let _ = unmount(self.dir.path().join(mounted), UnmountFlags::DETACH);
        }
    }
}
