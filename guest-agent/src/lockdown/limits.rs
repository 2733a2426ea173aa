//! Resource limits of a process.
//!
//! Other limits stay as the kernel sets them. That of processes (half of the machine's threads)
//! counts per user, so it cannot replace the cgroup's, and need not change.

use std::ffi::CStr;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit};

/// Open files. Programs that can handle more than `select(2)` does raise the soft limit themselves.
/// The hard limit bounds the kernel memory of a descriptor table at half a MiB.
const OPEN_FILES: Rlimit = Rlimit { current: Some(1024), maximum: Some(65_536) };

/// A core dump would be a copy of the workload's credentials.
const CORE: Rlimit = Rlimit { current: Some(0), maximum: Some(0) };

/// Sets the limits and the umask of a child, while it may still raise limits.
///
/// Makes system calls only.
pub fn limit_resources() -> Result<(), Errno> {
    rustix::process::umask(Mode::from_raw_mode(0o022));
    rustix::process::setrlimit(Resource::Core, CORE)?;
    match rustix::process::setrlimit(Resource::Nofile, OPEN_FILES) {
        // The child may not raise it: the present maximum has to suffice.
        Err(Errno::PERM) => {
            let maximum = rustix::process::getrlimit(Resource::Nofile).maximum;
            let current = OPEN_FILES.current.min(maximum);
            rustix::process::setrlimit(Resource::Nofile, Rlimit { current, maximum })
        }
        other => other,
    }
}

/// Raises the agent's own limit of open files as far as possible: copies hold a descriptor for each
/// level of a tree.
pub fn raise_open_files() {
    let mut files = rustix::process::getrlimit(Resource::Nofile);
    files.current = files.maximum;
    let _ = rustix::process::setrlimit(Resource::Nofile, files);
}

/// Sets the OOM killer's preference for this process, from -1000 to 1000.
///
/// Makes system calls only.
pub fn set_oom_score(score: &CStr) -> Result<(), Errno> {
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let file = rustix::fs::open(c"/proc/self/oom_score_adj", flags, Mode::empty())?;
    rustix::io::write(&file, score.to_bytes()).map(drop)
}
