//! What a workload can use up, and what it cannot: all of it together, on a host that does not help.
//!
//! The fork bomb, memory and the disk alone, the agent's safety, and a workload that never sleeps and ignores the time limit are
//! in `conformance`; a panic in `startup_errors.rs`; a triple fault is how each bare guest of `cargo xtask hostile` ends.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use chitin_integration::{Chitin, binary, chitin, run};

/// How long the host may be out of breath. The emulated one has a single CPU that is a hundred times slower than others.
const BREATH: Duration = Duration::from_secs(15);

fn copy_of(template: &Path, args: &str) -> Chitin {
    chitin(&format!("run --template small {args} -- sh -c")).env("CHITIN_TEMPLATES", template)
}

fn small_template(dir: &Path) {
    chitin("template build small --memory 64").env("CHITIN_TEMPLATES", dir).outcome().ok();
}

/// What a workload does to use something up, and whether it comes to an end.
const USES: [(&str, bool); 5] = [
    ("(i=0; while [ $i -lt 100 ]; do sleep 300 & i=$((i+1)); done) >/dev/null 2>&1", true),
    ("cat /dev/zero | tail -c 1G >/dev/null 2>&1", true),
    ("head -c 1G /dev/zero >/work/full 2>/dev/null; rm /work/full", true),
    ("yes", false),
    ("while :; do :; done", false),
];

/// More than a pipe and all windows hold, for a reader that may have stopped, and more than the disk has, to be copied out.
const AFTER: &str = "head -c 4000000 /dev/zero >/work/big; yes | head -c 1M";

/// Runs its words with a disk of one MiB at the first of them.
const SMALL_DISK: &str = "mount -t tmpfs -o size=1m none \"$1\" && shift && exec \"$@\"";

/// Every way to use something up, with a reader and with one that has stopped, with a disk of the host that is full and without:
/// all of it at once, and each ends as it would alone.
#[test]
fn twenty_at_once_use_up_only_what_is_theirs() {
    let dir = tempfile::tempdir().unwrap();
    small_template(dir.path());
    let mut runs = Vec::new();
    for (script, ends) in USES {
        for (reader_stopped, disk_full) in
            [(false, false), (false, true), (true, false), (true, true)]
        {
            let disk = tempfile::tempdir().unwrap();
            let out = format!("big:{}", disk.path().join("big").display());
            let by_itself = ends && !reader_stopped;
            let limit = if by_itself { "" } else { "--timeout 60s" };
            let run = copy_of(dir.path(), &format!("{limit} --copy-out {out}"));
            let mut run = run.arg(format!("{script}; {AFTER}"));
            if disk_full {
                let unshare = [
                    "unshare",
                    "--user",
                    "--map-root-user",
                    "--mount",
                    "sh",
                    "-c",
                    SMALL_DISK,
                    "sh",
                ];
                let words: Vec<&OsStr> =
                    unshare.iter().map(OsStr::new).chain([disk.path().as_os_str()]).collect();
                run = run.by(&words);
            }
            let expected = match (by_itself, disk_full) {
                (false, _) => 124,
                (true, true) => 125,
                (true, false) => 0,
            };
            let what =
                format!("{script}, reader stopped: {reader_stopped}, disk full: {disk_full}");
            let running = thread::spawn(move || {
                let _disk = disk;
                if reader_stopped {
                    let mut running = run.spawn();
                    let code = running.wait();
                    running.assert_nothing_left();
                    (code, String::new())
                } else {
                    let outcome = run.outcome();
                    (outcome.code, outcome.stderr)
                }
            });
            runs.push((what, expected, running));
        }
    }
    let mut longest = Duration::ZERO;
    while !runs.iter().all(|(_, _, running)| running.is_finished()) {
        let start = Instant::now();
        thread::sleep(Duration::from_millis(20));
        longest = longest.max(start.elapsed());
    }
    for (what, expected, running) in runs {
        let (code, stderr) = running.join().unwrap();
        assert_eq!(code, expected, "{what}: {stderr}");
        assert_eq!(code == 125, stderr.contains("No space left on device"), "{what}: {stderr}");
    }
    assert!(longest < BREATH, "the host did not get its turn for {longest:?}");
}

#[test]
fn a_run_that_is_killed_while_it_is_restored_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    small_template(dir.path());
    for ms in [0, 5, 10, 20, 40, 80, 160, 320] {
        let mut running = copy_of(dir.path(), "").arg("sleep 60").spawn();
        thread::sleep(Duration::from_millis(ms));
        running.child.kill().unwrap();
        running.wait();
        running.assert_nothing_left();
    }
}

#[test]
fn a_full_disk_of_the_host_is_named_and_nothing_is_left_on_it() {
    let dir = tempfile::tempdir().unwrap();
    let script = "mount -t tmpfs -o size=1m none \"$1\" || exit 99
\"$2\" run --memory 64 --copy-out big:\"$1\"/big -- sh -c 'head -c 4000000 /dev/zero >big'
code=$?
ls -A \"$1\"
exit $code";
    // Fails where microVMs cannot run, as every other test does.
    drop(run("true"));
    let output = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"])
        .args([dir.path(), &binary("chitin")])
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{stderr}");
    assert!(stderr.contains("No space left on device"), "{stderr}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "", "left on the full disk");
}
