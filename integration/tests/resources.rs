//! What a workload can use up, and what it cannot: all of it together, on a host that does not help.
//!
//! The fork bomb, memory and the disk alone, the agent's safety, and a workload that never sleeps and ignores the time limit are
//! in `conformance`; a panic in `refusals.rs`; a triple fault is how each bare guest of `cargo xtask hostile` ends.

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

#[test]
fn twenty_at_once_use_up_only_what_is_theirs() {
    let dir = tempfile::tempdir().unwrap();
    small_template(dir.path());
    let scripts = [
        "(i=0; while [ $i -lt 100 ]; do sleep 30 & i=$((i+1)); done) 2>/dev/null; echo 0",
        "cat /dev/zero | tail -c 1G >/dev/null 2>&1 || echo 1",
        "head -c 1G /dev/zero >/work/full 2>/dev/null || echo 2",
        "yes | head -c 300000 | tail -c 2; echo 3",
    ];
    let runs: Vec<_> = (0..20)
        .map(|number| {
            let run = copy_of(dir.path(), "").arg(scripts[number % scripts.len()]);
            thread::spawn(move || run.outcome())
        })
        .collect();
    let mut longest = Duration::ZERO;
    while !runs.iter().all(|run| run.is_finished()) {
        let start = Instant::now();
        thread::sleep(Duration::from_millis(20));
        longest = longest.max(start.elapsed());
    }
    for (number, run) in runs.into_iter().enumerate() {
        let outcome = run.join().unwrap();
        assert!(outcome.text().ends_with(&(number % scripts.len()).to_string()), "{number}: {outcome:?}");
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
