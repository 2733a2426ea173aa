//! The host resources that runs of Chitin hold, and must release when they end.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process;
use std::thread;
use std::time::{Duration, Instant};

use crate::{CLEANUP_LIMIT, TierUnderTest};

/// The mount point of control groups: all of version 2, or both versions.
const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// The resources held at one moment, one line of text each. Compare two of them only if nothing
/// else on the host starts or ends sandboxes.
#[derive(Debug)]
pub struct HostResources {
    tier: TierUnderTest,
    lines: BTreeSet<String>,
}

impl HostResources {
    /// Lists the resources held now. Of this process: open descriptors, mapped memory files and
    /// children. Of the host: processes, control groups, temporary files, mounts, and the traces
    /// of the tier.
    pub fn list(tier: TierUnderTest) -> HostResources {
        HostResources { tier, lines: list_lines(tier) }
    }

    /// Asserts that, within the time for clean-up, no other resource than these is held.
    #[track_caller]
    pub fn assert_no_leak(&self) {
        let deadline = Instant::now() + CLEANUP_LIMIT;
        loop {
            let now = list_lines(self.tier);
            let more: Vec<_> = now.difference(&self.lines).collect();
            if more.is_empty() {
                return;
            }
            assert!(Instant::now() < deadline, "left behind: {more:#?}");
            thread::sleep(Duration::from_millis(50));
        }
    }
}

fn list_lines(tier: TierUnderTest) -> BTreeSet<String> {
    let mut lines = tier.list_traces();
    // The line includes the descriptor's number, so that a second one of the same file counts.
    for entry in list_entries(Path::new("/proc/self/fd")) {
        match fs::read_link(&entry) {
            // The directory that this list is read from.
            Ok(target) if target == Path::new(&format!("/proc/{}/fd", process::id())) => {}
            Ok(target) => {
                lines.insert(format!("descriptor {}: {}", file_name(&entry), target.display()));
            }
            Err(_) => {}
        }
    }
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    lines.extend(
        maps.lines().filter(|line| line.contains("/memfd:")).map(|line| format!("mapped {line}")),
    );
    let processes = list_entries(Path::new("/proc"));
    lines.extend(processes.iter().filter_map(|path| describe_process(path)));
    add_cgroups(Path::new(CGROUP_ROOT), &mut lines);
    for dir in [&std::env::temp_dir(), Path::new("/dev/shm"), Path::new("/run/chitin")] {
        lines.extend(list_entries(dir).iter().map(|path| format!("file {}", path.display())));
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    lines.extend(mounts.lines().map(|line| format!("mount {line}")));
    lines
}

/// Returns the line of a process of Chitin or a child of this process, including ended ones.
fn describe_process(path: &Path) -> Option<String> {
    let stat = fs::read_to_string(path.join("stat")).ok()?;
    let (before, after) = stat.rsplit_once(')')?;
    let (pid, name) = before.split_once(" (")?;
    let mut fields = after.split_whitespace();
    let (state, parent) = (fields.next()?, fields.next()?);
    let ours = pid.parse() != Ok(process::id())
        && (name.starts_with("chitin") || parent.parse() == Ok(process::id()));
    ours.then(|| format!("process {pid} ({name}), {state}"))
}

/// Adds the control groups with a name that Chitin gives.
fn add_cgroups(dir: &Path, lines: &mut BTreeSet<String>) {
    for path in list_entries(dir).into_iter().filter(|path| path.is_dir() && !path.is_symlink()) {
        let has_prefix = |prefix: &str| {
            file_name(&path).strip_prefix(prefix).is_some_and(|rest| !rest.is_empty())
        };
        if has_prefix("vm-") || has_prefix("chitin-") {
            lines.insert(format!("control group {}", path.display()));
        }
        add_cgroups(&path, lines);
    }
}

fn list_entries(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
