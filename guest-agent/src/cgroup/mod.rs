//! The cgroup that bounds the workload as a whole, so that it can exhaust itself and not the agent.

pub mod pids_v1;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::{Context, SystemError};

/// Ample for a build with as many jobs as eight CPUs take; a fork bomb is held at it.
const MAX_TASKS: u64 = 4096;

/// Kept from the workload for the agent (1 MiB, plus windows of streams) and what the kernel allocates on nobody's
/// account, such as vsock packets: a sixteenth, at least 8 MiB.
const RESERVE_SHARE: u64 = 16;
const MIN_RESERVE: u64 = 8 << 20;

/// A process is frozen when it next returns to user mode, at once or after a system call that cannot be interrupted.
const FREEZE_ROUNDS: u32 = 1000;
const FREEZE_PAUSE: Duration = Duration::from_millis(5);

/// The workload's cgroup.
pub struct Cgroup {
    directory: OwnedFd,
}

impl Cgroup {
    /// Makes it below the root of `hierarchy`.
    pub fn create(hierarchy: impl AsFd) -> Result<Cgroup, SystemError> {
        // The order matters for boot time: while there are no tasks below the root, nothing has to be migrated, and
        // the kernel need not wait for an RCU grace period.
        write(&hierarchy, "cgroup.subtree_control", "+memory +pids")?;
        rustix::fs::mkdirat(&hierarchy, "workload", Mode::from_raw_mode(0o755))
            .context("create cgroup", "workload")?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::openat(&hierarchy, "workload", flags, Mode::empty())
            .context("open cgroup", "workload")?;
        write(&directory, "pids.max", &task_limit(threads_max()).to_string())?;
        let cgroup = Cgroup { directory };
        cgroup.set_memory_limit()?;
        Ok(cgroup)
    }

    /// For `clone3(2)`.
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Bounds the number of processes and threads, below what the machine bears.
    pub fn limit_tasks(&self, limit: u64) -> Result<(), SystemError> {
        write(&self.directory, "pids.max", &limit.min(task_limit(threads_max())).to_string())
    }

    /// Whether any process is in it; if that cannot be found out, one may be.
    pub fn is_populated(&self) -> bool {
        let events = read_text(&self.directory, "cgroup.events");
        events.map_or(true, |text| !text.lines().any(|line| line == "populated 0"))
    }

    /// Stops every process in it, and returns when all have stopped.
    pub fn freeze(&self) -> Result<(), SystemError> {
        write(&self.directory, "cgroup.freeze", "1")?;
        for _ in 0..FREEZE_ROUNDS {
            let events = read_text(&self.directory, "cgroup.events");
            if events
                .context("read cgroup file", "cgroup.events")?
                .lines()
                .any(|line| line == "frozen 1")
            {
                return Ok(());
            }
            std::thread::sleep(FREEZE_PAUSE);
        }
        self.thaw()?;
        Err(Errno::TIMEDOUT).context("freeze", "the workload")
    }

    /// Lets them go on.
    pub fn thaw(&self) -> Result<(), SystemError> {
        write(&self.directory, "cgroup.freeze", "0")
    }

    /// Gives the workload what it has and what is free, but the reserve. To be repeated when the agent itself has
    /// taken memory for long, as files that it copies in do.
    pub fn set_memory_limit(&self) -> Result<(), SystemError> {
        let used = read_number(&self.directory, "memory.current")
            .context("read cgroup file", "memory.current")?;
        let info = rustix::system::sysinfo();
        let unit = u64::from(info.mem_unit);
        let (total, free) = (info.totalram as u64 * unit, info.freeram as u64 * unit);
        write(&self.directory, "memory.max", &memory_limit(total, free, used).to_string())
    }
}

/// A small machine has fewer threads than [`MAX_TASKS`] in all, and at that limit the agent could not start one
/// either: the workload gets half.
fn task_limit(threads_max: u64) -> u64 {
    MAX_TASKS.min(threads_max / 2)
}

fn threads_max() -> u64 {
    let text = std::fs::read_to_string("/proc/sys/kernel/threads-max").unwrap_or_default();
    text.trim().parse().unwrap_or(MAX_TASKS)
}

/// All in bytes. At the limit the kernel kills in this cgroup, and the agent is not in it. A share of the total would
/// not do: the kernel has taken its part of that already, and the machine would be out of memory before the cgroup.
fn memory_limit(total: u64, free: u64, used: u64) -> u64 {
    used.saturating_add(free.saturating_sub(MIN_RESERVE.max(total / RESERVE_SHARE)))
}

fn read_number(directory: impl AsFd, file: &str) -> Result<u64, Errno> {
    read_text(directory, file)?.trim().parse().map_err(|_| Errno::INVAL)
}

/// The content of a small file.
fn read_text(directory: impl AsFd, file: &str) -> Result<String, Errno> {
    let file =
        rustix::fs::openat(directory, file, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let mut text = [0; 128];
    let count = rustix::io::read(&file, &mut text)?;
    std::str::from_utf8(&text[..count]).map(str::to_owned).map_err(|_| Errno::INVAL)
}

fn write(directory: impl AsFd, file: &'static str, value: &str) -> Result<(), SystemError> {
    let open =
        || rustix::fs::openat(&directory, file, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
    match open().and_then(|file| rustix::io::write(file, value.as_bytes())) {
        Ok(count) if count == value.len() => Ok(()),
        Ok(_) => Err(Errno::IO),
        Err(errno) => Err(errno),
    }
    .context("write", format_args!("{value} to cgroup file {file}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agent_keeps_memory_and_threads_on_any_machine() {
        assert_eq!(memory_limit(64 << 20, 50 << 20, 0), 42 << 20);
        assert_eq!(memory_limit(1 << 30, 1000 << 20, 0), 936 << 20);
        assert_eq!(memory_limit(1 << 20, 1 << 20, 0), 0);
        // Never less than what it has: that would kill at once.
        assert_eq!(memory_limit(64 << 20, 1 << 20, 40 << 20), 40 << 20);
        assert_eq!(task_limit(800), 400);
        assert_eq!(task_limit(32_000), MAX_TASKS);
    }
}
