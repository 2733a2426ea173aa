//! A control group for each inmate, where the host lets us make one: what it may use of the host's memory, processors and process
//! table, also if it finds a way around what limits it from within.
//!
//! Only version 2, and only where it is ours to use: root has a group `chitin` at the top, as other runtimes have theirs; whoever
//! else has one beside its own, if its parent was delegated to it. A group is removed when its inmate has ended; one whose keeper
//! was killed before it could do that is removed by the next one that can.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};

use crate::spec::VmSpec;

/// Where hosts mount it: alone, or beside version 1.
const MOUNTS: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];

/// The group below which those of root's monitors are.
const ROOT_S: &str = "chitin";

/// What is limited.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];

/// What a monitor uses beside its guest's memory: itself, and what the kernel keeps for it. Some 8 MiB have been seen.
const OVERHEAD_MIB: u64 = 64;

/// Page tables of host and KVM take at most 2 × 8 bytes for each page of 4 KiB, and other things grow with memory too: a 64th.
const PART_OF_MEMORY: u64 = 64;

/// The period of the processors' limit, microseconds; the kernel's default.
const PERIOD_US: u64 = 100_000;

/// The names of groups: this, and the process id of the keeper.
const PREFIX: &str = "vm-";

/// How often the removal of a group is tried: the kernel needs a moment to see that a process has left it.
const REMOVALS: usize = 50;

/// A group that is removed with this.
pub struct Group {
    path: PathBuf,
    dir: File,
    /// Whether it is ours to remove.
    ours: bool,
}

impl Group {
    /// Makes one for a microVM.
    ///
    /// # Errors
    /// Why there is none, for people.
    pub fn make(spec: &VmSpec, root: bool) -> Result<Group, String> {
        // Whether everything is prepared is seen by making it: as a rule somebody has done that before us.
        let prepared = MOUNTS.into_iter().map(|mount| Path::new(mount).join(ROOT_S));
        let made = prepared.filter(|_| root).find_map(|base| Group::within(&base, spec).ok());
        made.map_or_else(|| Group::within(&base(root)?, spec), Ok)
    }

    fn within(base: &Path, spec: &VmSpec) -> Result<Group, String> {
        let path = base.join(format!("{PREFIX}{}", std::process::id()));
        let failed = |what: &Path| {
            let what = what.display().to_string();
            move |error: io::Error| format!("{what}: {error}")
        };
        fs::create_dir(&path).map_err(failed(&path))?;
        let dir = File::open(&path)
            .inspect_err(|_| drop(fs::remove_dir(&path)))
            .map_err(failed(&path))?;
        let group = Group { path, dir, ours: true };
        for (name, value) in limits(spec) {
            let file = group.path.join(name);
            // Nothing is created: in a directory of another kind this is an error.
            let written = File::options()
                .write(true)
                .open(&file)
                .and_then(|mut open| open.write_all(value.as_bytes()));
            match written {
                // Without swap there is nothing to limit.
                Err(error)
                    if error.kind() == io::ErrorKind::NotFound && name == "memory.swap.max" => {}
                result => result.map_err(failed(&file))?,
            }
        }
        Ok(group)
    }

    /// Leaves it to somebody else to remove. Where it is.
    pub fn leave(mut self) -> String {
        self.ours = false;
        self.path.display().to_string()
    }
}

impl AsRawFd for Group {
    fn as_raw_fd(&self) -> RawFd {
        self.dir.as_raw_fd()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let tries = if self.ours { REMOVALS } else { 0 };
        for _ in 0..tries {
            match fs::remove_dir(&self.path) {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
                _ => break,
            }
        }
        if self.ours
            && let Some(base) = self.path.parent()
        {
            sweep(base);
        }
    }
}

/// The limits of a group.
fn limits(spec: &VmSpec) -> [(&'static str, String); 4] {
    let guest = u64::from(spec.memory_mib);
    // A file of a template may be in memory itself, and is then counted too.
    let copies = if spec.template { 2 } else { 1 };
    let memory = (copies * guest + guest / PART_OF_MEMORY + OVERHEAD_MIB) << 20;
    let vcpus = u64::from(spec.vcpus);
    [
        ("memory.max", memory.to_string()),
        // What a guest knows is not to be written to a disk.
        ("memory.swap.max", "0".into()),
        // vCPUs, the VMM thread, and one of KVM's.
        ("pids.max", (vcpus + 2).to_string()),
        ("cpu.max", format!("{} {PERIOD_US}", (vcpus + 1) * PERIOD_US)),
    ]
}

/// Where groups can be made that have all the limits.
fn base(root: bool) -> Result<PathBuf, String> {
    let mount =
        MOUNTS.map(Path::new).into_iter().find(|mount| mount.join("cgroup.controllers").exists());
    let mount = mount.ok_or("cgroup version 2 is not mounted")?;
    if !has(mount, "cgroup.controllers") {
        return Err("cpu, memory and pids are not controllers of cgroup version 2 here".into());
    }
    if root {
        enable(mount)?;
        let base = mount.join(ROOT_S);
        match fs::create_dir(&base) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(format!("{}: {error}", base.display()));
            }
            _ => {}
        }
        enable(&base)?;
        return Ok(base);
    }
    let own = fs::read_to_string("/proc/self/cgroup")
        .map_err(|error| format!("/proc/self/cgroup: {error}"))?;
    let own = own
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .ok_or("no group of version 2 is ours")?;
    let own = mount.join(own);
    match own.parent() {
        Some(parent) if parent.starts_with(mount) && has(parent, "cgroup.subtree_control") => {
            Ok(parent.to_owned())
        }
        _ => Err(format!("{} was not delegated to us with cpu, memory and pids", own.display())),
    }
}

fn has(dir: &Path, file: &str) -> bool {
    let text = fs::read_to_string(dir.join(file)).unwrap_or_default();
    CONTROLLERS.iter().all(|wanted| text.split_whitespace().any(|found| found == *wanted))
}

/// Lets groups in `dir` have limits, if they have not.
fn enable(dir: &Path) -> Result<(), String> {
    let file = "cgroup.subtree_control";
    if has(dir, file) {
        return Ok(());
    }
    fs::write(dir.join(file), "+cpu +memory +pids")
        .map_err(|error| format!("{}: {error}", dir.join(file).display()))
}

/// Removes groups whose keepers are gone. One that still has somebody in it cannot be removed.
fn sweep(base: &Path) {
    for entry in fs::read_dir(base).into_iter().flatten().flatten() {
        if keeper(&entry.file_name())
            .is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists())
        {
            let _ = fs::remove_dir(entry.path());
        }
    }
}

/// Whose group has this name.
fn keeper(name: &OsStr) -> Option<u32> {
    name.to_str()?.strip_prefix(PREFIX)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_keepers() {
        assert_eq!(keeper(OsStr::new("vm-17")), Some(17));
        for other in ["vm-", "vm-x", "17", "vm--1", "system.slice"] {
            assert_eq!(keeper(OsStr::new(other)), None, "{other}");
        }
    }

    #[test]
    fn limits_leave_room_for_the_monitor_and_count_a_template_twice() {
        let spec = VmSpec { vcpus: 2, memory_mib: 256, ..VmSpec::new("k", "r") };
        let all = limits(&spec);
        assert_eq!(all[0].1, ((256 + 4 + 64) << 20).to_string());
        assert_eq!((all[2].1.as_str(), all[3].1.as_str()), ("4", "300000 100000"));
        let saved = limits(&VmSpec { template: true, ..spec });
        assert_eq!(saved[0].1, ((512 + 4 + 64) << 20).to_string());
    }
}
