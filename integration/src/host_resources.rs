//! Everything that runs of Chitin have on a host while they run, and must not have left there afterwards.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process;
use std::thread;
use std::time::Instant;

use crate::{GONE_LIMIT, On};

/// Where control groups are: all of version 2, or beside version 1.
const GROUPS: &str = "/sys/fs/cgroup";

/// What there is at one moment, each as a line for people. To be looked at where nothing else starts or ends sandboxes.
#[derive(Debug)]
pub struct Belongings {
    on: On,
    lines: BTreeSet<String>,
}

impl Belongings {
    /// What there is now: open descriptors, memory files among them, and children of this process; and, of this host,
    /// processes, control groups, temporary files and mounts, and what a tier has beside that.
    pub fn now(on: On) -> Belongings {
        Belongings { on, lines: lines(on) }
    }

    /// Asserts that soon there is nothing more than this.
    #[track_caller]
    pub fn assert_nothing_more(&self) {
        let deadline = Instant::now() + GONE_LIMIT;
        loop {
            let now = lines(self.on);
            let more: Vec<_> = now.difference(&self.lines).collect();
            if more.is_empty() {
                return;
            }
            assert!(Instant::now() < deadline, "left behind: {more:#?}");
            thread::sleep(std::time::Duration::from_millis(50));
        }
    }
}

fn lines(on: On) -> BTreeSet<String> {
    let mut lines = on.traces();
    // A descriptor's number too: one more of the same is one more.
    for entry in entries(Path::new("/proc/self/fd")) {
        match fs::read_link(&entry) {
            // What this list itself is read from.
            Ok(target) if target == Path::new(&format!("/proc/{}/fd", process::id())) => {}
            Ok(target) => {
                drop(lines.insert(format!("descriptor {}: {}", name(&entry), target.display())))
            }
            Err(_) => {}
        }
    }
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    lines.extend(
        maps.lines().filter(|line| line.contains("/memfd:")).map(|line| format!("mapped {line}")),
    );
    lines.extend(entries(Path::new("/proc")).into_iter().filter_map(|path| a_process(&path)));
    groups(Path::new(GROUPS), &mut lines);
    for dir in [&std::env::temp_dir(), Path::new("/dev/shm"), Path::new("/run/chitin")] {
        lines.extend(entries(dir).iter().map(|path| format!("file {}", path.display())));
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    lines.extend(mounts.lines().map(|line| format!("mount {line}")));
    lines
}

/// Whether this is a process of Chitin's, or a child of ours, ended or not.
fn a_process(path: &Path) -> Option<String> {
    let stat = fs::read_to_string(path.join("stat")).ok()?;
    let (before, behind) = stat.rsplit_once(')')?;
    let (pid, name) = before.split_once(" (")?;
    let mut fields = behind.split_whitespace();
    let (state, parent) = (fields.next()?, fields.next()?);
    let ours = pid.parse() != Ok(process::id())
        && (name.starts_with("chitin") || parent.parse() == Ok(process::id()));
    ours.then(|| format!("process {pid} ({name}), {state}"))
}

/// Control groups that have a name of ours.
fn groups(dir: &Path, lines: &mut BTreeSet<String>) {
    for path in entries(dir).into_iter().filter(|path| path.is_dir() && !path.is_symlink()) {
        let named =
            |prefix: &str| name(&path).strip_prefix(prefix).is_some_and(|rest| !rest.is_empty());
        if named("vm-") || named("chitin-") {
            lines.insert(format!("control group {}", path.display()));
        }
        groups(&path, lines);
    }
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
