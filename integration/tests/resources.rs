//! Workloads that exhaust several resources together, on a slow host with a full disk.
//!
//! The fork bomb, exhausted memory or disk, the protection of the agent, and a busy workload that
//! ignores signals are in `conformance`; a guest panic is in `startup_errors.rs`; each bare guest
//! of `cargo xtask hostile` ends with a triple fault.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use chitin_integration::{Chitin, binary_path, chitin, run};

/// The maximum time for which the host may not schedule the test. The emulated host has a single
/// CPU, a hundred times slower than others.
const MAX_STALL: Duration = Duration::from_secs(15);

fn run_template(dir: &Path, args: &str) -> Chitin {
    chitin(&format!("run --template small {args} -- sh -c")).env("CHITIN_TEMPLATES", dir)
}

fn build_template(dir: &Path) {
    chitin("template build small --memory 64")
        .env("CHITIN_TEMPLATES", dir)
        .outcome()
        .assert_success();
}

/// Scripts that exhaust a resource, with true for those that end.
const SCRIPTS: [(&str, bool); 5] = [
    ("(i=0; while [ $i -lt 100 ]; do sleep 300 & i=$((i+1)); done) >/dev/null 2>&1", true),
    ("cat /dev/zero | tail -c 1G >/dev/null 2>&1", true),
    ("head -c 1G /dev/zero >/work/full 2>/dev/null; rm /work/full", true),
    ("yes", false),
    ("while :; do :; done", false),
];

/// Writes more output than a pipe and all windows can buffer, for a stalled reader, and a file
/// larger than the small disk, to be copied out.
const AFTER: &str = "head -c 4000000 /dev/zero >/work/big; yes | head -c 1M";

/// Mounts a disk of one MiB at the first argument, and runs the others as a command.
const SMALL_DISK: &str = "mount -t tmpfs -o size=1m none \"$1\" && shift && exec \"$@\"";

/// One of the concurrent runs.
#[derive(Debug)]
struct ExhaustingRun {
    script: &'static str,
    ends: bool,
    reader_stalled: bool,
    disk_full: bool,
}

impl ExhaustingRun {
    fn ends_itself(&self) -> bool {
        self.ends && !self.reader_stalled
    }

    fn expected_code(&self) -> i32 {
        match (self.ends_itself(), self.disk_full) {
            (false, _) => 124,
            (true, true) => 125,
            (true, false) => 0,
        }
    }

    /// Starts the run, whose thread returns its exit code and standard error.
    fn start(&self, template: &Path) -> JoinHandle<(i32, String)> {
        let disk = tempfile::tempdir().unwrap();
        let out = format!("big:{}", disk.path().join("big").display());
        let limit = if self.ends_itself() { "" } else { "--timeout 60s" };
        let run = run_template(template, &format!("{limit} --copy-out {out}"));
        let mut run = run.arg(format!("{}; {AFTER}", self.script));
        if self.disk_full {
            let unshare = ["unshare", "--user", "--map-root-user", "--mount"];
            let mount = ["sh", "-c", SMALL_DISK, "sh"];
            let words = unshare.iter().chain(&mount).map(OsStr::new);
            let words: Vec<&OsStr> = words.chain([disk.path().as_os_str()]).collect();
            run = run.run_through(&words);
        }
        let reader_stalled = self.reader_stalled;
        thread::spawn(move || {
            let _disk = disk;
            if reader_stalled {
                let mut running = run.spawn();
                let code = running.wait();
                running.assert_no_process_left();
                (code, String::new())
            } else {
                let outcome = run.outcome();
                (outcome.code, outcome.stderr)
            }
        })
    }
}

/// Runs every script with an active and a stalled reader, and with a free and a full disk of the
/// host, all concurrently. Each must end as it would alone.
#[test]
fn twenty_guests_exhaust_only_their_own_resources() {
    let dir = tempfile::tempdir().unwrap();
    build_template(dir.path());
    let mut runs = Vec::new();
    for (script, ends) in SCRIPTS {
        for (reader_stalled, disk_full) in
            [(false, false), (false, true), (true, false), (true, true)]
        {
            let run = ExhaustingRun { script, ends, reader_stalled, disk_full };
            let thread = run.start(dir.path());
            runs.push((run, thread));
        }
    }
    let mut longest = Duration::ZERO;
    while !runs.iter().all(|(_, thread)| thread.is_finished()) {
        let start = Instant::now();
        thread::sleep(Duration::from_millis(20));
        longest = longest.max(start.elapsed());
    }
    for (run, thread) in runs {
        let (code, stderr) = thread.join().unwrap();
        assert_eq!(code, run.expected_code(), "{run:?}: {stderr}");
        assert_eq!(code == 125, stderr.contains("No space left on device"), "{run:?}: {stderr}");
    }
    assert!(longest < MAX_STALL, "the test was not scheduled for {longest:?}");
}

#[test]
fn run_killed_during_restore_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    build_template(dir.path());
    for ms in [0, 5, 10, 20, 40, 80, 160, 320] {
        let mut running = run_template(dir.path(), "").arg("sleep 60").spawn();
        thread::sleep(Duration::from_millis(ms));
        running.child.kill().unwrap();
        running.wait();
        running.assert_no_process_left();
    }
}

#[test]
fn full_host_disk_is_reported_and_left_clean() {
    let dir = tempfile::tempdir().unwrap();
    let script = "mount -t tmpfs -o size=1m none \"$1\" || exit 99
\"$2\" run --memory 64 --copy-out big:\"$1\"/big -- sh -c 'head -c 4000000 /dev/zero >big'
code=$?
ls -A \"$1\"
exit $code";
    // Fails on a host that cannot run microVMs, like every other test.
    drop(run("true"));
    let output = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"])
        .args([dir.path(), &binary_path("chitin")])
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{stderr}");
    assert!(stderr.contains("No space left on device"), "{stderr}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "", "left on the full disk");
}
