//! A tier, for the tests that all tiers pass.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use chitin::TierKind;
use tempfile::TempDir;

use crate::{CLEANUP_LIMIT, Chitin, chitin, docker, write_file};

/// Makes a test for each tier of these cases, which are functions of the tier: `ironclaw::CASE`,
/// `nanoclaw::CASE`, `nemoclaw::CASE`.
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
                    $crate::TierUnderTest::new($crate::TierKind::$tier).run_case(super::$case);
                }
            )+
        }
    };
}

/// Sandboxes of one tier.
#[derive(Debug, Clone, Copy)]
pub struct TierUnderTest {
    /// The tier of every run.
    pub kind: TierKind,
}

impl TierUnderTest {
    /// Returns the tier of this kind.
    pub const fn new(kind: TierKind) -> TierUnderTest {
        TierUnderTest { kind }
    }

    /// Runs a case, and asserts that it leaves nothing new on the host.
    #[track_caller]
    pub fn run_case(self, case: impl FnOnce(TierUnderTest)) {
        let before = self.list_traces();
        case(self);
        let mut left: Vec<String> = self.list_traces().difference(&before).cloned().collect();
        let deadline = Instant::now() + CLEANUP_LIMIT;
        while !left.is_empty() {
            assert!(Instant::now() < deadline, "left behind: {left:?}");
            thread::sleep(Duration::from_millis(50));
            // A trace that appears meanwhile belongs to another run.
            let now = self.list_traces();
            left.retain(|trace| now.contains(trace));
        }
    }

    /// Lists the traces of the tier's sandboxes on the host, except processes. Traces of another
    /// sandbox of the same tier are counted too if they appear during a case and outlive it.
    pub(crate) fn list_traces(self) -> BTreeSet<String> {
        match self.kind {
            // A microVM consists of processes only.
            TierKind::Ironclaw => BTreeSet::new(),
            TierKind::Nanoclaw => list_oci_traces(),
            TierKind::Nemoclaw => {
                docker::list_containers(&docker::host()).expect("list containers")
            }
        }
    }

    /// Returns `chitin` with these arguments, split at spaces.
    pub fn chitin(self, args: &str) -> Chitin {
        match self.kind {
            TierKind::Ironclaw => chitin(args),
            TierKind::Nanoclaw | TierKind::Nemoclaw => Chitin::new(args),
        }
    }

    /// Returns `chitin run` with these options, split at spaces. The caller adds the command.
    pub fn run_with(self, options: &str) -> Chitin {
        self.chitin(&format!("run --tier {} {options}", self.kind))
    }

    /// Returns `chitin run --` with this command, split at spaces.
    pub fn run(self, command: &str) -> Chitin {
        self.run_with(&format!("-- {command}"))
    }

    /// Returns `chitin run -- sh -c SCRIPT`.
    pub fn run_sh(self, script: &str) -> Chitin {
        self.run("sh -c").arg(script)
    }

    /// Returns `chitin run -- python3 -c PROGRAM`.
    pub fn run_python(self, program: &str) -> Chitin {
        self.run("python3 -c").arg(program)
    }

    /// Writes a policy file that accepts this tier.
    pub fn write_policy(self, text: &str) -> Policy {
        let dir = tempfile::tempdir().expect("create a directory");
        let path = dir.path().join("p.yaml").display().to_string();
        let policy = Policy { tier: self, dir, path };
        policy.rewrite(text);
        policy
    }
}

/// Lists bundles, runtime states, roots and cgroups of the OCI tier.
fn list_oci_traces() -> BTreeSet<String> {
    let run = Path::new("/run/chitin");
    let mut traces = BTreeSet::new();
    for engine in ["bundles", "mounts", "runsc", "crun", "runc"] {
        traces.extend(list_paths(&run.join(engine)));
    }
    // The single hierarchy of cgroup v2, or each of the hierarchies of v1.
    let root = Path::new("/sys/fs/cgroup").to_owned();
    let hierarchies = list_paths(&root).map(PathBuf::from).chain([root.clone()]);
    for hierarchy in hierarchies {
        let cgroups = list_paths(&hierarchy.join("chitin"));
        traces.extend(cgroups.filter(|path| path.contains("/chitin-")));
    }
    traces
}

/// Lists the paths in a directory; none if it does not exist.
fn list_paths(dir: &Path) -> impl Iterator<Item = String> + use<> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.path().display().to_string())
}

/// A policy file, in a directory with the same lifetime.
#[derive(Debug)]
pub struct Policy {
    tier: TierUnderTest,
    /// The directory of the file, for the other files of a test.
    pub dir: TempDir,
    /// The path of the file.
    pub path: String,
}

impl Policy {
    /// Replaces the text of the file, except the tier that it accepts.
    pub fn rewrite(&self, text: &str) {
        let text = format!("runtime: {}\n{text}", self.tier.kind);
        write_file(self.dir.path(), "p.yaml", text).expect("write a policy");
    }

    /// Returns `chitin run --policy FILE`, with consent to all that the policy does on the host. The
    /// caller adds the command.
    pub fn run(&self) -> Chitin {
        self.run_without_consent().args(["--policy-may", "all"])
    }

    /// Returns `chitin run --policy FILE`. The caller adds the command.
    pub fn run_without_consent(&self) -> Chitin {
        self.tier.run_with("--policy").arg(&self.path)
    }

    /// Returns `chitin run --policy FILE -- sh -c SCRIPT`.
    pub fn run_sh(&self, script: &str) -> Chitin {
        self.run().args(["--", "sh", "-c", script])
    }

    /// Returns `chitin run --policy FILE -- python3 -c PROGRAM`.
    pub fn run_python(&self, program: &str) -> Chitin {
        self.run().args(["--", "python3", "-c", program])
    }
}
