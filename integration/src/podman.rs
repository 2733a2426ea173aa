//! A separate service of Podman for tests, on a socket and in directories that nothing else uses.

use std::fs;
use std::io;
use std::path::Path;
use std::process::Child;

use rustix::mount::{UnmountFlags, unmount};
use tempfile::TempDir;

use crate::daemon_process::{new_daemon_command, spawn_daemon, stop_daemon};
use crate::docker::wait_for_daemon;

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
    let mut podman = new_daemon_command("podman");
    podman
        .arg("--root")
        .arg(dir.join("root"))
        .arg("--runroot")
        .arg(dir.join("run"))
        .args(["--tmpdir".into(), dir.join("tmp").into_os_string()])
        .args(["--storage-driver", "overlay", "system", "service", "--time", "0"])
        .arg(format!("unix://{}", dir.join("socket").display()))
        .env("CONTAINERS_CONF", config);
    spawn_daemon(&mut podman, "podman", dir)
}

impl Drop for Podman {
    fn drop(&mut self) {
        stop_daemon(&mut self.child);
        // The storage library bind-mounts its directory onto itself. The call fails without a
        // mount.
        for mounted in ["root/overlay", "root"] {
            let _ = unmount(self.dir.path().join(mounted), UnmountFlags::DETACH);
        }
    }
}
