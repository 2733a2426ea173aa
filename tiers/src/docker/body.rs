//! The description of a container: what it may use, and what it is refused.

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use bollard::models::{
    ContainerCreateBody, HostConfig, HostConfigLogConfig, Mount, MountType, ResourcesUlimits,
};
use rustix::process::{Resource, getrlimit};

use super::LABEL;
use super::daemon::{Daemon, Engine};
use super::endpoint::DaemonEndpoint;
use super::image::{ImageKind, runtime_dir};
use crate::container::{
    AGENT, CAPABILITIES, CREDENTIAL_BYTES, CREDENTIALS, HOST_NAME, Limits, Owner,
    read_only_mount_bytes, scratch_mounts,
};

/// Open files of a process: soft limit, and the bounds of the hard limit. A daemon may have any
/// default.
const SOFT_FILES: i64 = 1024;
const HARD_FILES: std::ops::RangeInclusive<u64> = 4096..=65_536;

/// Maximum limit of processes of a user, less than `pid_max` of any host.
const MAX_PROCESSES: u64 = 16_384;

/// Present where SELinux labels decide which files a container may read.
const SELINUX: &str = "/sys/fs/selinux/enforce";

/// The names of a sandbox. Docker's file also maps `localhost` to ::1, which no sandbox has, and
/// Podman's repeats the names of the host.
const HOSTS: &str = "127.0.0.1\tlocalhost\n127.0.0.1\tchitin\n";
const HOSTS_PATH: &str = "/etc/hosts";

impl Daemon {
    /// Returns the description of a container with this image.
    pub(super) fn container_body(
        &self,
        image: ImageKind,
        limits: Limits,
        mount_points: &[PathBuf],
    ) -> ContainerCreateBody {
        ContainerCreateBody {
            image: Some(image.reference(&self.archive.digest)),
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
            host_config: Some(self.host_config(limits, mount_points)),
            ..Default::default()
        }
    }

    fn host_config(&self, limits: Limits, mount_points: &[PathBuf]) -> HostConfig {
        let [.., shm] = scratch_mounts(limits);
        let mut host = HostConfig {
            auto_remove: Some(true),
            network_mode: Some("none".into()),
            // The daemon replaces the image's resolv.conf, so that it must name the agent here as
            // well.
            dns: Some(vec!["127.0.0.53".into()]),
            dns_search: Some(vec![".".into()]),
            ipc_mode: Some("private".into()),
            readonly_rootfs: Some(true),
            cap_drop: Some(vec!["ALL".into()]),
            cap_add: Some(CAPABILITIES.map(str::to_owned).to_vec()),
            // The daemon's seccomp filter stays in force, and the agent adds its own, which holds
            // for the workload whatever the daemon's allows.
            security_opt: Some(vec!["no-new-privileges".into()]),
            tmpfs: Some(self.tmpfs(limits, mount_points)),
            shm_size: Some(signed(shm.bytes)),
            memory: Some(signed(limits.memory)),
            memory_swap: Some(signed(limits.memory)),
            nano_cpus: Some(signed(u64::from(limits.vcpus) * 1_000_000_000)),
            pids_limit: Some(limits.tasks.into()),
            ulimits: Some(self.ulimits()),
            // The channel must not be written to a log on disk.
            log_config: Some(HostConfigLogConfig { typ: Some("none".into()), config: None }),
            init: Some(false),
            ..Default::default()
        };
        if let (DaemonEndpoint::Socket(_), Some(hosts)) = (&self.address, provide_hosts()) {
            mount_hosts(&mut host, &hosts);
        } else {
            // The daemon writes a file of its own.
            host.extra_hosts = Some(vec![format!("{HOST_NAME}:127.0.0.1")]);
        }
        host
    }

    /// Returns the limits of a process. A daemon without privileges cannot raise them above its own,
    /// which are those of this user.
    fn ulimits(&self) -> Vec<ResourcesUlimits> {
        let files = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
        let files = files.clamp(*HARD_FILES.start(), *HARD_FILES.end());
        let mut ulimits = vec![ulimit("nofile", SOFT_FILES, signed(files))];
        if self.engine == Engine::Podman {
            // Podman's default may be more than it can set. The cgroup limits processes; this only
            // has to be more.
            let processes = getrlimit(Resource::Nproc).maximum.unwrap_or(u64::MAX);
            let processes = signed(processes.min(MAX_PROCESSES));
            ulimits.push(ulimit("nproc", processes, processes));
        }
        ulimits
    }

    fn tmpfs(&self, limits: Limits, mount_points: &[PathBuf]) -> HashMap<String, String> {
        let options = |mode: &str, owner: u32, bytes: u64| {
            // Podman knows no owner of a tmpfs; the agent changes it there.
            let owner = match self.engine {
                Engine::Docker => format!("uid={owner},gid={owner},"),
                Engine::Podman => String::new(),
            };
            format!("rw,nosuid,nodev,exec,mode={mode},{owner}size={bytes}")
        };
        let [work, tmp, _] = scratch_mounts(limits);
        let mut tmpfs: HashMap<String, String> = [work, tmp]
            .map(|scratch| {
                (scratch.path.into(), options(scratch.mode, scratch.owner, scratch.bytes))
            })
            .into();
        let credentials = format!("rw,nosuid,nodev,noexec,mode=0755,size={CREDENTIAL_BYTES}");
        tmpfs.insert(CREDENTIALS.into(), credentials);
        for mount_point in mount_points {
            // A policy is UTF-8, so that nothing is lost.
            let path = mount_point.to_string_lossy().into_owned();
            let bytes = read_only_mount_bytes(limits, mount_points.len());
            tmpfs.insert(path, options("0755", 0, bytes));
        }
        tmpfs
    }
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn ulimit(name: &str, soft: i64, hard: i64) -> ResourcesUlimits {
    ResourcesUlimits { name: Some(name.into()), soft: Some(soft), hard: Some(hard) }
}

/// Mounts our file of hosts.
fn mount_hosts(host: &mut HostConfig, hosts: &Path) {
    let source = hosts.to_string_lossy();
    if Path::new(SELINUX).exists() {
        // `z` labels the file so that containers may read it.
        host.binds = Some(vec![format!("{source}:{HOSTS_PATH}:ro,z")]);
        return;
    }
    host.mounts = Some(vec![Mount {
        typ: Some(MountType::BIND),
        source: Some(source.into_owned()),
        target: Some(HOSTS_PATH.into()),
        read_only: Some(true),
        ..Default::default()
    }]);
}

/// Returns the path of our file of hosts, which is written once. Returns `None` if there is no
/// place for it.
fn provide_hosts() -> Option<PathBuf> {
    let path = runtime_dir()?.join("hosts");
    if fs::read_to_string(&path).is_ok_and(|found| found == HOSTS) {
        return Some(path);
    }
    // Another process may write it meanwhile: the rename makes both right.
    let temporary = path.with_extension(std::process::id().to_string());
    let mut file = fs::File::create_new(&temporary).ok()?;
    let written = file.write_all(HOSTS.as_bytes()).and_then(|()| fs::rename(&temporary, &path));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written.ok().map(|()| path)
}
