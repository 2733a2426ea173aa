//! Observes which limits of the sandbox its processes have run into: memory, tasks, disk.
//!
//! A killed or failed process does not know why, and its exit status tells it to nobody. The kernel
//! counts kills and refusals in files of the cgroup, which stay open here: reading them again costs
//! less than starting a process by two orders of magnitude.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use chitin_protocol::ReachedLimits;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;

use crate::cgroup::Cgroups;

/// Longest content of a file of counters: six lines of a name and a number.
const MAX_FILE: usize = 512;

/// The cgroup of a container, as the runtime mounts it: version 2, or the hierarchies of version 1.
const CONTAINER_MEMORY: [&str; 2] =
    ["/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control"];
const CONTAINER_TASKS: [&str; 2] =
    ["/sys/fs/cgroup/pids.events", "/sys/fs/cgroup/pids/pids.events"];

/// Writable file systems of a container. Those of a microVM are one.
const CONTAINER_SCRATCH: [&str; 3] = ["/work", "/tmp", "/dev/shm"];

/// The files and file systems in which the kernel shows that a limit was reached.
#[derive(Default)]
pub struct LimitWatch {
    /// Has a line `oom_kill N`.
    memory: Option<OwnedFd>,
    tasks: Option<TaskFiles>,
    /// The file system that takes everything that is written, if the agent has made it.
    scratch: Option<OwnedFd>,
    /// Otherwise the paths of the container's. No descriptor of them is kept, because gVisor lets
    /// every process open the descriptors of others.
    scratch_paths: &'static [&'static str],
}

/// The source of refused tasks.
enum TaskFiles {
    /// A file with a line `max N`.
    Events(OwnedFd),
    /// A directory with the files `pids.current` and `pids.max`, of a kernel that counts no
    /// refusals. They are readable for all, and therefore not kept open.
    Level(OwnedFd),
}

/// The counters at one moment. They only grow.
#[derive(Debug, Clone, Copy, Default)]
pub struct LimitCounts {
    oom_kills: u64,
    refused_tasks: u64,
}

impl LimitWatch {
    /// Opens the files of the workload's cgroup, and of the container if the agent has made none.
    /// What is missing is not observed.
    pub fn open(cgroups: &Cgroups, scratch: Option<&OwnedFd>) -> LimitWatch {
        let (memory, tasks) = match (&cgroups.v2, &cgroups.pids_v1) {
            (Some(cgroup), _) => {
                let directory = cgroup.directory();
                (open_file(directory, "memory.events"), open_file(directory, "pids.events"))
            }
            (None, _) => (open_first(&CONTAINER_MEMORY), open_first(&CONTAINER_TASKS)),
        };
        let level = cgroups.pids_v1.as_ref();
        let level = level.and_then(|cgroup| cgroup.directory().try_clone_to_owned().ok());
        let level = level.map(TaskFiles::Level);
        let scratch_paths: &[&str] = if scratch.is_none() { &CONTAINER_SCRATCH } else { &[] };
        let scratch = scratch.and_then(|scratch| scratch.try_clone().ok());
        LimitWatch { memory, tasks: level.or(tasks.map(TaskFiles::Events)), scratch, scratch_paths }
    }

    /// Reads the counters.
    pub fn count(&self) -> LimitCounts {
        let oom_kills = self.memory.as_ref().map(|file| read_counter(file, "oom_kill"));
        let refused_tasks = match &self.tasks {
            Some(TaskFiles::Events(file)) => read_counter(file, "max"),
            Some(TaskFiles::Level(directory)) => {
                let read = |name| read_number(open_file(directory.as_fd(), name)?);
                // The process that was refused one has ended since.
                let full = read("pids.current").zip(read("pids.max"));
                full.is_some_and(|(current, max)| current.saturating_add(1) >= max).into()
            }
            None => 0,
        };
        LimitCounts { oom_kills: oom_kills.unwrap_or_default(), refused_tasks }
    }

    /// Returns the limits that were reached since the counters were read.
    pub fn reached_since(&self, before: LimitCounts) -> ReachedLimits {
        let now = self.count();
        let since =
            |now: u64, before: u64| u32::try_from(now.saturating_sub(before)).unwrap_or(u32::MAX);
        ReachedLimits {
            oom_kills: since(now.oom_kills, before.oom_kills),
            refused_tasks: since(now.refused_tasks, before.refused_tasks),
            disk_full: self
                .scratch
                .as_ref()
                .is_some_and(|disk| is_full(rustix::fs::fstatvfs(disk)))
                || self.scratch_paths.iter().any(|path| is_full(rustix::fs::statvfs(*path))),
        }
    }
}

fn open_first(paths: &[&str]) -> Option<OwnedFd> {
    paths.iter().find_map(|path| open_file(CWD, path))
}

fn open_file(directory: BorrowedFd<'_>, path: &str) -> Option<OwnedFd> {
    rustix::fs::openat(directory, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()
}

/// Returns true if no block or no inode is left.
fn is_full(file_system: Result<rustix::fs::StatVfs, Errno>) -> bool {
    file_system.is_ok_and(|stat| {
        (stat.f_blocks > 0 && stat.f_bavail == 0) || (stat.f_files > 0 && stat.f_favail == 0)
    })
}

/// Reads the number after a name in a file of lines; 0 if it is missing.
fn read_counter(file: impl AsFd, name: &str) -> u64 {
    read_text(file).as_deref().map_or(0, |text| find_counter(text, name))
}

fn find_counter(text: &str, name: &str) -> u64 {
    let mut lines = text.lines().filter_map(|line| line.split_once(' '));
    let value =
        lines.find(|(key, _)| *key == name).and_then(|(_, value)| value.trim().parse().ok());
    value.unwrap_or_default()
}

fn read_number(file: impl AsFd) -> Option<u64> {
    read_text(file)?.trim().parse().ok()
}

fn read_text(file: impl AsFd) -> Option<String> {
    let mut text = [0; MAX_FILE];
    let count = rustix::io::pread(file, &mut text, 0).ok()?;
    std::str::from_utf8(text.get(..count)?).map(str::to_owned).ok()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn counter_is_found_by_its_whole_name() {
        let events = "low 0\nhigh 1\nmax 22\noom 3\noom_kill 4\noom_group_kill 5\n";
        for (name, value) in [("max", 22), ("oom", 3), ("oom_kill", 4), ("kill", 0), ("", 0)] {
            assert_eq!(find_counter(events, name), value, "{name}");
        }
        let control = "oom_kill_disable 0\nunder_oom 0\noom_kill 7\n";
        assert_eq!(find_counter(control, "oom_kill"), 7);
        assert_eq!(find_counter("max -1\n", "max"), 0);
    }

    #[test]
    fn only_later_events_are_reached_limits() {
        let dir = tempfile::tempdir().unwrap();
        let (memory, tasks) = (dir.path().join("memory"), dir.path().join("tasks"));
        let write = |kills: u32, refused: u32| {
            fs::write(&memory, format!("oom 9\noom_kill {kills}\n")).unwrap();
            fs::write(&tasks, format!("max {refused}\n")).unwrap();
        };
        write(2, 5);
        let open = |path| OwnedFd::from(fs::File::open(path).unwrap());
        let watch = LimitWatch {
            memory: Some(open(&memory)),
            tasks: Some(TaskFiles::Events(open(&tasks))),
            ..LimitWatch::default()
        };
        let before = watch.count();
        assert!(!watch.reached_since(before).any());
        write(3, 7);
        let reached = ReachedLimits { oom_kills: 1, refused_tasks: 2, disk_full: false };
        assert_eq!(watch.reached_since(before), reached);
    }

    #[test]
    fn level_at_the_maximum_is_a_refusal() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            fs::write(dir.path().join(name), text).unwrap();
        };
        let open = || Some(TaskFiles::Level(fs::File::open(dir.path()).unwrap().into()));
        for (level, refused) in [("3", 0), ("62", 0), ("63", 1), ("64", 1)] {
            write("pids.current", level);
            write("pids.max", "64\n");
            let tasks = open();
            let watch = LimitWatch { tasks, ..LimitWatch::default() };
            assert_eq!(watch.reached_since(LimitCounts::default()).refused_tasks, refused);
        }
        write("pids.current", "3");
        write("pids.max", "max");
        let watch = LimitWatch { tasks: open(), ..LimitWatch::default() };
        assert!(!watch.reached_since(LimitCounts::default()).any());
    }
}
