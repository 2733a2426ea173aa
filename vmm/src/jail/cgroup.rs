//! A control group for each child, where the host allows one: limits of memory, processors and
//! threads that hold even if the child escapes its own limits.
//!
//! Only version 2 is used, and only where it belongs to this user. Root creates groups below
//! `chitin` at the top of the hierarchy, as other runtimes do. Another user creates them next to
//! the user's own group, if its parent was delegated to the user.
//!
//! ```text
//!  created ─▶ limited ─▶ joined by the child (clone3) ─▶ removed by the supervisor when it ends
//!                                                     └▶ orphaned (the supervisor was killed)
//!                                                          └▶ removed by a later supervisor
//! ```

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::spec::VmSpec;

/// Mount points of version 2: alone, or in addition to version 1.
const MOUNTS: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];

/// The parent of the groups of root's monitors.
const ROOT_PARENT: &str = "chitin";

/// The controllers that limits need.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];

/// Memory that a monitor uses in addition to its guest's: its own, and the kernel's on its behalf.
/// About 8 MiB have been measured.
const OVERHEAD_MIB: u64 = 64;

/// Divides a guest's memory into the part that is added for page tables. Those of the host and KVM
/// take at most 2 × 8 bytes for each page of 4 KiB, a 256th; other overhead grows with memory too.
const PAGE_TABLE_DIVISOR: u64 = 64;

/// The period of the limit on processor time, in microseconds: the kernel's default.
const PERIOD_US: u64 = 100_000;

/// The prefix of a group's name; the process id of the supervisor follows.
const PREFIX: &str = "vm-";

/// Attempts to remove a group, a millisecond apart: the kernel needs a moment to notice that a
/// process has left it.
const REMOVE_ATTEMPTS: usize = 50;

/// A control group, removed when this value is dropped.
pub struct Cgroup {
    path: PathBuf,
    dir: File,
    /// True in the process that removes the group: the supervisor, and not the child.
    owned: bool,
}

impl Cgroup {
    /// Creates a group for a microVM.
    ///
    /// # Errors
    /// The reason why there is none, for users.
    pub fn create(spec: &VmSpec, is_root: bool) -> Result<Cgroup, String> {
        // Root's parent usually exists, prepared by an earlier run: creating a group in it is the
        // fastest way to find out.
        let parents = MOUNTS.into_iter().map(|mount| Path::new(mount).join(ROOT_PARENT));
        let created =
            parents.filter(|_| is_root).find_map(|parent| Cgroup::create_in(&parent, spec).ok());
        created.map_or_else(|| Cgroup::create_in(&prepare_parent(is_root)?, spec), Ok)
    }

    fn create_in(parent: &Path, spec: &VmSpec) -> Result<Cgroup, String> {
        let path = parent.join(format!("{PREFIX}{}", std::process::id()));
        fs::create_dir(&path).map_err(name_path(&path))?;
        let dir = File::open(&path)
            .inspect_err(|_| drop(fs::remove_dir(&path)))
            .map_err(name_path(&path))?;
        let cgroup = Cgroup { path, dir, owned: true };
        for (name, value) in compute_limits(spec) {
            let file = cgroup.path.join(name);
            // Opened without creating it: a directory of another kind of file system is an error.
            let written = File::options()
                .write(true)
                .open(&file)
                .and_then(|mut open| open.write_all(value.as_bytes()));
            match written {
                // A kernel without swap has no limit for it.
                Err(error)
                    if error.kind() == io::ErrorKind::NotFound && name == "memory.swap.max" => {}
                result => result.map_err(name_path(&file))?,
            }
        }
        Ok(cgroup)
    }

    /// Leaves the group to its other owner, which removes it. Returns its path.
    pub fn into_path(mut self) -> String {
        self.owned = false;
        self.path.display().to_string()
    }
}

impl AsRawFd for Cgroup {
    fn as_raw_fd(&self) -> RawFd {
        self.dir.as_raw_fd()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if !self.owned {
            return;
        }
        for _ in 0..REMOVE_ATTEMPTS {
            match fs::remove_dir(&self.path) {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                _ => break,
            }
        }
        if let Some(parent) = self.path.parent() {
            remove_orphans(parent);
        }
    }
}

/// Adds the path to an error.
fn name_path(path: &Path) -> impl FnOnce(io::Error) -> String {
    let path = path.display().to_string();
    move |error| format!("{path}: {error}")
}

/// Computes the limits of a group, as names and contents of its files.
fn compute_limits(spec: &VmSpec) -> [(&'static str, String); 4] {
    let guest_mib = u64::from(spec.memory_mib);
    // A template's memory file may be in memory itself, and is counted too then.
    let copies = if spec.template { 2 } else { 1 };
    let memory = (copies * guest_mib + guest_mib / PAGE_TABLE_DIVISOR + OVERHEAD_MIB) << 20;
    let memory = memory + private_image_bytes(spec);
    let vcpus = u64::from(spec.vcpus);
    [
        ("memory.max", memory.to_string()),
        // A guest's secrets are not written to a disk.
        ("memory.swap.max", "0".into()),
        // The vCPUs, the VMM thread, and one thread of KVM's.
        ("pids.max", (vcpus + 2).to_string()),
        ("cpu.max", format!("{} {PERIOD_US}", (vcpus + 1) * PERIOD_US)),
    ]
}

/// Returns the size of a private copy of the root image, if the specification asks for one. A file
/// that cannot be examined is reported when it is mapped.
fn private_image_bytes(spec: &VmSpec) -> u64 {
    let image = || fs::metadata(&spec.root_image).map_or(0, |metadata| metadata.len());
    if spec.private_memory { image() } else { 0 }
}

/// Returns a directory in which groups can be created that have every limit.
fn prepare_parent(is_root: bool) -> Result<PathBuf, String> {
    let mount =
        MOUNTS.map(Path::new).into_iter().find(|mount| mount.join("cgroup.controllers").exists());
    let mount = mount.ok_or("cgroup version 2 is not mounted")?;
    if !has_controllers(mount, "cgroup.controllers") {
        return Err("cpu, memory and pids are not controllers of cgroup version 2 here".into());
    }
    if is_root { prepare_root_parent(mount) } else { find_delegated_parent(mount) }
}

fn prepare_root_parent(mount: &Path) -> Result<PathBuf, String> {
    enable_controllers(mount)?;
    let parent = mount.join(ROOT_PARENT);
    match fs::create_dir(&parent) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(name_path(&parent)(error));
        }
        _ => {}
    }
    enable_controllers(&parent)?;
    Ok(parent)
}

fn find_delegated_parent(mount: &Path) -> Result<PathBuf, String> {
    let file = Path::new("/proc/self/cgroup");
    let groups = fs::read_to_string(file).map_err(name_path(file))?;
    let own = groups
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .ok_or("this process is in no group of version 2")?;
    let own = mount.join(own);
    match own.parent() {
        Some(parent)
            if parent.starts_with(mount) && has_controllers(parent, "cgroup.subtree_control") =>
        {
            Ok(parent.to_owned())
        }
        _ => Err(format!(
            "the parent of {} was not delegated to this user with cpu, memory and pids",
            own.display()
        )),
    }
}

/// Tests whether a file of a group lists every controller that limits need.
fn has_controllers(dir: &Path, file: &str) -> bool {
    let text = fs::read_to_string(dir.join(file)).unwrap_or_default();
    CONTROLLERS.iter().all(|wanted| text.split_whitespace().any(|found| found == *wanted))
}

/// Enables the controllers for the children of a group, unless they are enabled.
fn enable_controllers(dir: &Path) -> Result<(), String> {
    if has_controllers(dir, "cgroup.subtree_control") {
        return Ok(());
    }
    let file = dir.join("cgroup.subtree_control");
    fs::write(&file, "+cpu +memory +pids").map_err(name_path(&file))
}

/// Removes the groups of supervisors that were killed. The kernel keeps a group that has processes.
fn remove_orphans(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        if supervisor_pid(&entry.file_name())
            .is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists())
        {
            let _ = fs::remove_dir(entry.path());
        }
    }
}

/// Returns the process id in the name of a group.
fn supervisor_pid(name: &OsStr) -> Option<u32> {
    name.to_str()?.strip_prefix(PREFIX)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup_name_contains_the_supervisor_pid() {
        assert_eq!(supervisor_pid(OsStr::new("vm-17")), Some(17));
        for other in ["vm-", "vm-x", "17", "vm--1", "system.slice"] {
            assert_eq!(supervisor_pid(OsStr::new(other)), None, "{other}");
        }
    }

    #[test]
    fn limits_include_monitor_and_template_memory() {
        let spec = VmSpec { vcpus: 2, memory_mib: 256, ..VmSpec::new("k", "r") };
        let limits = compute_limits(&spec);
        assert_eq!(limits[0].1, ((256 + 4 + 64) << 20).to_string());
        assert_eq!((limits[2].1.as_str(), limits[3].1.as_str()), ("4", "300000 100000"));
        let saved = compute_limits(&VmSpec { template: true, ..spec });
        assert_eq!(saved[0].1, ((512 + 4 + 64) << 20).to_string());
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(8 << 20).unwrap();
        let spec = VmSpec { memory_mib: 256, ..VmSpec::new("k", image.path()) };
        let private = compute_limits(&VmSpec { private_memory: true, ..spec.clone() });
        assert_eq!(private[0].1, ((256 + 4 + 64 + 8) << 20).to_string());
        assert_eq!(compute_limits(&spec)[0].1, limits[0].1);
    }
}
