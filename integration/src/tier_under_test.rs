//! A tier, for the tests that all tiers pass.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use chitin::TierKind;
use tempfile::TempDir;

use crate::{Chitin, GONE_LIMIT, chitin, docker, file};

/// Tests of these cases, functions of the tier: `ironclaw::CASE`, `nanoclaw::CASE`, `nemoclaw::CASE`.
#[macro_export]
macro_rules! on_every_tier {
    ($($case:ident),+ $(,)?) => {
        $crate::on_every_tier!(@ironclaw, Ironclaw, $($case),+);
        $crate::on_every_tier!(@nanoclaw, Nanoclaw, $($case),+);
        $crate::on_every_tier!(@nemoclaw, Nemoclaw, $($case),+);
    };
    (@$name:ident, $tier:ident, $($case:ident),+) => {
        mod $name {
            $(
                #[test]
                fn $case() {
                    $crate::On { tier: $crate::TierKind::$tier }.check(super::$case);
                }
            )+
        }
    };
}

/// Sandboxes of one tier.
#[derive(Debug, Clone, Copy)]
pub struct On {
    /// Which.
    pub tier: TierKind,
}

impl On {
    /// Runs a case, and asserts that it has left nothing on the host that was not there.
    #[track_caller]
    pub fn check(self, case: impl FnOnce(On)) {
        let before = self.traces();
        case(self);
        let mut left: Vec<String> = self.traces().difference(&before).cloned().collect();
        let deadline = Instant::now() + GONE_LIMIT;
        while !left.is_empty() {
            assert!(Instant::now() < deadline, "left behind: {left:?}");
            thread::sleep(Duration::from_millis(50));
            // What comes anew meanwhile is somebody else's.
            let now = self.traces();
            left.retain(|trace| now.contains(trace));
        }
    }

    /// What there is on the host because of its sandboxes, but for processes. Those of others, of the same tier, are taken
    /// for its own if they come while a case runs and stay behind it.
    pub(crate) fn traces(self) -> BTreeSet<String> {
        match self.tier {
            // All that a microVM is, is processes.
            TierKind::Ironclaw => BTreeSet::new(),
            TierKind::Nanoclaw => {
                let run = Path::new("/run/chitin");
                let mut traces = BTreeSet::new();
                for engine in ["bundles", "runsc", "crun", "runc"] {
                    traces.extend(names(&run.join(engine)));
                }
                traces.extend(names(Path::new("/var/cache/chitin/trees")));
                // The one hierarchy of cgroups, or each of the several that older hosts have.
                let root = Path::new("/sys/fs/cgroup").to_owned();
                let hierarchies = names(&root).map(PathBuf::from).chain([root.clone()]);
                for hierarchy in hierarchies {
                    traces.extend(
                        names(&hierarchy.join("chitin")).filter(|name| name.contains("/chitin-")),
                    );
                }
                traces
            }
            TierKind::Nemoclaw => docker::containers(&docker::host()).expect("list containers"),
        }
    }

    /// `chitin` with these arguments, split at spaces.
    pub fn bare(self, args: &str) -> Chitin {
        match self.tier {
            TierKind::Ironclaw => chitin(args),
            TierKind::Nanoclaw | TierKind::Nemoclaw => Chitin::new(args),
        }
    }

    /// `chitin run` with these options, split at spaces; the command is to be added.
    pub fn with(self, options: &str) -> Chitin {
        self.bare(&format!("run --tier {} {options}", self.tier))
    }

    /// `chitin run --` with this command, split at spaces.
    pub fn run(self, command: &str) -> Chitin {
        self.with(&format!("-- {command}"))
    }

    /// `chitin run -- sh -c SCRIPT`.
    pub fn sh(self, script: &str) -> Chitin {
        self.run("sh -c").arg(script)
    }

    /// `chitin run -- python3 -c PROGRAM`.
    pub fn python(self, program: &str) -> Chitin {
        self.run("python3 -c").arg(program)
    }

    /// A policy file that accepts this tier.
    pub fn policy(self, text: &str) -> Policy {
        let dir = tempfile::tempdir().expect("create a directory");
        let text = format!("runtime: {}\n{text}", self.tier);
        let path = file(dir.path(), "p.yaml", text).expect("write a policy");
        Policy { on: self, dir, path }
    }
}

/// What is in a directory, if it is there.
fn names(dir: &Path) -> impl Iterator<Item = String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.path().display().to_string())
}

/// A policy file, in a directory that lives as long as it.
#[derive(Debug)]
pub struct Policy {
    on: On,
    /// Where it lies, and what belongs to it may.
    pub dir: TempDir,
    /// Its path.
    pub path: String,
}

impl Policy {
    /// `chitin run --policy FILE`; the command is to be added.
    pub fn run(&self) -> Chitin {
        self.on.with("--policy").arg(&self.path)
    }

    /// `chitin run --policy FILE -- sh -c SCRIPT`.
    pub fn sh(&self, script: &str) -> Chitin {
        self.run().args(["--", "sh", "-c", script])
    }

    /// `chitin run --policy FILE -- python3 -c PROGRAM`.
    pub fn python(&self, program: &str) -> Chitin {
        self.run().args(["--", "python3", "-c", program])
    }
}
