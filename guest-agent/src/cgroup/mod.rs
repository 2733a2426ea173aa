//! Cgroups that bound the workload as a whole, so that it can exhaust its own resources and not the
//! agent's.

pub mod pids_v1;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use chitin_protocol::Failure;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::error::{Context, SystemError, make_failure};
use pids_v1::PidsCgroup;

/// The most processes and threads of the workload. A build needs fewer, even with as many jobs as
/// eight CPUs take, and a fork bomb is stopped here.
const MAX_TASKS: u32 = 4096;

/// Memory that is reserved for the agent (1 MiB, plus the windows of streams) and for what the
/// kernel charges to no cgroup, such as vsock packets: a sixteenth of the total, and at least 8
/// MiB.
const RESERVE_DIVISOR: u64 = 16;
const MIN_RESERVE: u64 = 8 << 20;

/// A process is frozen when it next returns to user mode: at once, or after a system call that
/// cannot be interrupted.
const FREEZE_ROUNDS: u32 = 1000;
const FREEZE_PAUSE: Duration = Duration::from_millis(5);

/// The cgroups of the workload, as far as the agent has made them. Those of other containers are
/// made by their runtime.
#[derive(Default)]
pub struct Cgroups {
    /// Of a microVM.
    pub v2: Option<WorkloadCgroup>,
    /// Of a container whose kernel serves this sandbox alone.
    pub pids_v1: Option<PidsCgroup>,
}

impl Cgroups {
    /// Limits the number of processes and threads.
    pub fn limit_tasks(&self, limit: u32) -> Result<(), Failure> {
        let limited = match (&self.v2, &self.pids_v1) {
            (Some(cgroup), _) => cgroup.limit_tasks(limit).map_err(|error| error.errno),
            (None, Some(cgroup)) => cgroup.limit_tasks(limit),
            (None, None) => {
                let operation = "limit the number of processes without a cgroup";
                return Err(make_failure(operation, b"", Errno::OPNOTSUPP));
            }
        };
        limited.map_err(|errno| make_failure("limit the number of processes", b"", errno))
    }

    /// Returns whether any process may be in the workload's cgroup.
    pub fn may_be_populated(&self) -> bool {
        self.v2.as_ref().is_some_and(WorkloadCgroup::may_be_populated)
    }
}

/// The cgroup v2 of the workload.
pub struct WorkloadCgroup {
    directory: OwnedFd,
}

impl WorkloadCgroup {
    /// Creates the cgroup below the root of `hierarchy`.
    pub fn create(hierarchy: impl AsFd) -> Result<WorkloadCgroup, SystemError> {
        // The order matters for boot time: while there are no tasks below the root, the kernel has
        // none to migrate, and need not wait for an RCU grace period.
        write_file(&hierarchy, "cgroup.subtree_control", "+memory +pids")?;
        rustix::fs::mkdirat(&hierarchy, "workload", Mode::from_raw_mode(0o755))
            .context("create cgroup", "workload")?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::openat(&hierarchy, "workload", flags, Mode::empty())
            .context("open cgroup", "workload")?;
        let cgroup = WorkloadCgroup { directory };
        cgroup.limit_tasks(MAX_TASKS)?;
        cgroup.update_memory_limit()?;
        Ok(cgroup)
    }

    /// Returns the directory of the cgroup, for `clone3(2)`.
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Limits the number of processes and threads, at most to what the machine can bear.
    pub fn limit_tasks(&self, limit: u32) -> Result<(), SystemError> {
        let limit = u64::from(limit).min(max_tasks(read_threads_max()));
        write_file(&self.directory, "pids.max", &limit.to_string())
    }

    /// Returns whether any process is in the cgroup, or whether that is unknown.
    fn may_be_populated(&self) -> bool {
        let events = read_file(&self.directory, "cgroup.events");
        events.map_or(true, |text| !text.lines().any(|line| line == "populated 0"))
    }

    /// Freezes every process in the cgroup, and returns when all of them have stopped.
    pub fn freeze(&self) -> Result<(), SystemError> {
        write_file(&self.directory, "cgroup.freeze", "1")?;
        for _ in 0..FREEZE_ROUNDS {
            let events = read_file(&self.directory, "cgroup.events")
                .context("read cgroup file", "cgroup.events")?;
            if events.lines().any(|line| line == "frozen 1") {
                return Ok(());
            }
            std::thread::sleep(FREEZE_PAUSE);
        }
        self.thaw()?;
        Err(Errno::TIMEDOUT).context("freeze", "the workload")
    }

    /// Lets frozen processes continue.
    pub fn thaw(&self) -> Result<(), SystemError> {
        write_file(&self.directory, "cgroup.freeze", "0")
    }

    /// Allows the workload the memory that it uses and the free memory, less the reserve. Repeated
    /// when the agent itself has taken memory permanently, as files that it copies in do.
    pub fn update_memory_limit(&self) -> Result<(), SystemError> {
        let used = read_number(&self.directory, "memory.current")
            .context("read cgroup file", "memory.current")?;
        let info = rustix::system::sysinfo();
        let unit = u64::from(info.mem_unit);
        let (total, free) = (info.totalram as u64 * unit, info.freeram as u64 * unit);
        write_file(&self.directory, "memory.max", &memory_limit(total, free, used).to_string())
    }
}

/// Returns the most tasks of the workload. A small machine has fewer threads than [`MAX_TASKS`] in
/// all, and at that limit the agent could not start one either: the workload gets half.
fn max_tasks(threads_max: u64) -> u64 {
    u64::from(MAX_TASKS).min(threads_max / 2)
}

fn read_threads_max() -> u64 {
    let text = std::fs::read_to_string("/proc/sys/kernel/threads-max").unwrap_or_default();
    text.trim().parse().unwrap_or(MAX_TASKS.into())
}

/// Returns the memory limit; all numbers are bytes. At the limit the kernel kills in this cgroup,
/// and the agent is not in it. A share of the total would not do: the kernel has taken its part of
/// that already, and the machine would run out of memory before the cgroup does.
fn memory_limit(total: u64, free: u64, used: u64) -> u64 {
    used.saturating_add(free.saturating_sub(MIN_RESERVE.max(total / RESERVE_DIVISOR)))
}

fn read_number(directory: impl AsFd, file: &str) -> Result<u64, Errno> {
    read_file(directory, file)?.trim().parse().map_err(|_| Errno::INVAL)
}

/// Reads a file of up to 128 bytes.
fn read_file(directory: impl AsFd, file: &str) -> Result<String, Errno> {
    let file =
        rustix::fs::openat(directory, file, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let mut text = [0; 128];
    let count = rustix::io::read(&file, &mut text)?;
    std::str::from_utf8(&text[..count]).map(str::to_owned).map_err(|_| Errno::INVAL)
}

fn write_file(directory: impl AsFd, file: &'static str, value: &str) -> Result<(), SystemError> {
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let opened = rustix::fs::openat(&directory, file, flags, Mode::empty());
    match opened.and_then(|file| rustix::io::write(file, value.as_bytes())) {
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
    fn workload_limits_leave_room_for_the_agent() {
        assert_eq!(memory_limit(64 << 20, 50 << 20, 0), 42 << 20);
        assert_eq!(memory_limit(1 << 30, 1000 << 20, 0), 936 << 20);
        assert_eq!(memory_limit(1 << 20, 1 << 20, 0), 0);
        // Never less than the workload uses, which would kill at once.
        assert_eq!(memory_limit(64 << 20, 1 << 20, 40 << 20), 40 << 20);
        assert_eq!(max_tasks(800), 400);
        assert_eq!(max_tasks(32_000), MAX_TASKS.into());
    }
}
