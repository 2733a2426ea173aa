//! The counters of a container's cgroup, read on the host: processes that were killed for lack of
//! memory, and tasks that were refused.

use std::fs;
use std::path::Path;

use chitin_spec::ReachedLimits;

use super::engine::container_cgroups;

/// Counters of kills, of cgroup version 2 and 1.
const MEMORY_FILES: [&str; 2] = ["memory.events", "memory.oom_control"];

/// The counters of a container as they were read last. They only grow.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Counters {
    oom_kills: u64,
    refused_tasks: u64,
}

impl Counters {
    /// Reads the counters again, and returns the limits that were reached since the last time. A
    /// cgroup that is gone has none.
    pub fn update(&mut self, container: &str) -> ReachedLimits {
        let mut now = Counters::default();
        for cgroup in container_cgroups(container) {
            now.add(&cgroup);
        }
        let since =
            |now: u64, then: u64| u32::try_from(now.saturating_sub(then)).unwrap_or(u32::MAX);
        let reached = ReachedLimits {
            oom_kills: since(now.oom_kills, self.oom_kills),
            refused_tasks: since(now.refused_tasks, self.refused_tasks),
            disk_full: false,
        };
        self.oom_kills = self.oom_kills.max(now.oom_kills);
        self.refused_tasks = self.refused_tasks.max(now.refused_tasks);
        reached
    }

    fn add(&mut self, cgroup: &Path) {
        for file in MEMORY_FILES {
            self.oom_kills += read_counter(&cgroup.join(file), "oom_kill");
        }
        self.refused_tasks += read_counter(&cgroup.join("pids.events"), "max");
    }
}

/// Reads the number after a name in a file of lines; 0 if there is none.
pub(super) fn read_counter(file: &Path, name: &str) -> u64 {
    let text = fs::read_to_string(file).unwrap_or_default();
    let mut lines = text.lines().filter_map(|line| line.split_once(' '));
    let value = lines.find(|(key, _)| *key == name).and_then(|(_, value)| value.parse().ok());
    value.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_both_cgroup_versions_are_read() {
        let dir = tempfile::tempdir().unwrap();
        for (file, text) in [
            ("memory.events", "max 8\noom 5\noom_kill 2\noom_group_kill 1\n"),
            ("pids.events", "max 7\n"),
        ] {
            fs::write(dir.path().join(file), text).unwrap();
        }
        let mut counters = Counters::default();
        counters.add(dir.path());
        assert_eq!((counters.oom_kills, counters.refused_tasks), (2, 7));

        let dir = tempfile::tempdir().unwrap();
        let control = "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n";
        fs::write(dir.path().join("memory.oom_control"), control).unwrap();
        let mut counters = Counters::default();
        counters.add(dir.path());
        assert_eq!((counters.oom_kills, counters.refused_tasks), (3, 0));
    }

    #[test]
    fn missing_cgroup_has_reached_no_limit() {
        assert!(!Counters::default().update("chitin-no-such-container").any());
    }
}
