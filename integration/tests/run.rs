//! `chitin run` is a command like any other.

use std::io::Write;

use chitin_integration::{chitin, run, sh};
use rustix::process::{Pid, Signal, kill_process};
use sha2::{Digest, Sha256};

#[test]
fn the_guest_has_a_kernel_of_its_own() {
    let release = run("python3 -c").arg("import os; print(os.uname().release)").outcome();
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert!(release.ok().starts_with("6.12."), "{release:?}");
    assert_ne!(release.text(), host.trim());
    assert_eq!(run("uname -n").outcome().ok(), "chitin");
}

#[test]
fn sixteen_mebibytes_go_in_unharmed() {
    let data: Vec<u8> = (0..16u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let expected = format!("{:x}  -", Sha256::digest(&data));
    assert_eq!(run("sha256sum").stdin(data).outcome().ok(), expected);
}

#[test]
fn binary_data_comes_back_as_it_went() {
    let data: Vec<u8> = (0..=255u8).cycle().take(1 << 20).collect();
    let outcome = run("cat").stdin(data.clone()).outcome();
    assert!(outcome.code == 0 && outcome.stdout == data, "{} bytes", outcome.stdout.len());
}

#[test]
fn output_and_errors_are_told_apart() {
    let outcome = sh("echo out; echo err >&2").outcome();
    assert_eq!((outcome.ok(), outcome.stderr.as_str()), ("out", "err\n"));
}

#[test]
fn an_empty_input_is_an_end_of_file() {
    assert_eq!(run("wc -c").outcome().ok(), "0");
}

#[test]
fn exit_codes_and_signals_are_kept() {
    assert_eq!(sh("exit 7").outcome().code, 7);
    assert_eq!(sh("kill -9 $$").outcome().code, 137);
    assert_eq!(sh("kill -TERM $$").outcome().code, 143);
    let missing = run("nosuch").outcome();
    assert_eq!(missing.code, 127, "{missing:?}");
    assert!(missing.stderr.starts_with("chitin: start nosuch in the sandbox: "), "{missing:?}");
    assert_eq!(run("/etc/passwd").outcome().code, 126);
}

#[test]
fn the_time_limit_ends_what_does_not_end() {
    let outcome = chitin("run --timeout 1s -- sleep 600").outcome();
    assert_eq!(outcome.code, 124);
    assert_eq!(outcome.stderr, "chitin: the time limit of 1 s was reached\n");
    // Also one that ignores whatever it is told, and never sleeps.
    let outcome =
        chitin("run --timeout 20s -- sh -c").arg("trap '' TERM INT HUP; while :; do :; done").outcome();
    assert_eq!(outcome.code, 124);
}

#[test]
fn the_environment_is_what_was_asked_for() {
    let mut environment: Vec<String> = chitin("run --env A=1 --env B=x=y --env FROM_HOST -- env")
        .env("FROM_HOST", "h")
        .env("NOT_ASKED_FOR", "n")
        .outcome()
        .ok()
        .lines()
        .map(str::to_owned)
        .collect();
    environment.sort();
    let expected = [
        "A=1",
        "B=x=y",
        "FROM_HOST=h",
        "HOME=/work",
        "LANG=C.UTF-8",
        "PATH=/usr/local/bin:/usr/bin:/bin",
        "TMPDIR=/tmp",
        "USER=agent",
    ];
    assert_eq!(environment, expected);
}

#[test]
fn the_workload_starts_where_it_is_told() {
    assert_eq!(run("pwd").outcome().ok(), "/work");
    assert_eq!(chitin("run --workdir /tmp -- pwd").outcome().ok(), "/tmp");
    let nowhere = chitin("run --workdir /nowhere -- pwd").outcome();
    assert_eq!(nowhere.code, 125);
    assert!(nowhere.stderr.contains("/nowhere"), "{nowhere:?}");
}

#[test]
fn cpus_and_memory_are_what_was_asked_for() {
    for cpus in [1, 2, 8] {
        assert_eq!(chitin(&format!("run --cpus {cpus} -- nproc")).outcome().ok(), cpus.to_string());
    }
    let least = total_kib(64);
    assert!((32 << 10..=64 << 10).contains(&least), "{least} KiB");
    let most = total_kib(16_384);
    assert!((15 << 20..=16 << 20).contains(&most), "{most} KiB");
}

fn total_kib(memory_mib: u32) -> u32 {
    let script = "sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo";
    chitin(&format!("run --memory {memory_mib} -- sh -c"))
        .arg(script)
        .outcome()
        .ok()
        .parse()
        .expect("a number")
}

#[test]
fn a_workload_hears_the_signal_first() {
    let mut running = sh("trap 'echo bye; exit 9' TERM; echo up; while :; do sleep 0.1; done").spawn();
    assert_eq!(running.line(), "up");
    signal(&running, Signal::TERM);
    assert_eq!(running.line(), "bye");
    assert_eq!(running.wait(), 9);
    running.assert_nothing_left();
}

#[test]
fn a_workload_that_will_not_hear_is_ended() {
    let mut running = sh("trap '' INT TERM; echo up; while :; do sleep 1; done").spawn();
    assert_eq!(running.line(), "up");
    signal(&running, Signal::INT);
    assert_eq!(running.wait(), 130);
    running.assert_nothing_left();
}

#[test]
fn nothing_survives_a_killed_cli() {
    let mut running = sh("echo up; sleep 600").spawn();
    assert_eq!(running.line(), "up");
    assert_eq!(running.processes().len(), 3, "chitin, its monitor, and the keeper of that");
    signal(&running, Signal::KILL);
    assert_eq!(running.wait(), 137);
    running.assert_nothing_left();
}

fn signal(running: &chitin_integration::Running, signal: Signal) {
    kill_process(Pid::from_child(&running.child), signal).expect("send a signal");
}

#[test]
fn a_reader_that_leaves_stops_the_workload() {
    let mut running = run("yes").spawn();
    assert_eq!(running.line(), "y");
    drop(running.child.stdout.take());
    assert_eq!(running.wait(), 141);
    running.assert_nothing_left();
}

#[test]
fn input_is_streamed_not_collected() {
    let mut running = run("cat").spawn();
    for word in ["one", "two"] {
        let stdin = running.child.stdin.as_mut().unwrap();
        writeln!(stdin, "{word}").unwrap();
        assert_eq!(running.line(), word);
    }
    drop(running.child.stdin.take());
    assert_eq!(running.wait(), 0);
}

#[test]
fn a_background_process_does_not_hold_the_run() {
    let outcome = sh("sleep 600 & echo done").outcome();
    assert_eq!(outcome.ok(), "done");
}

#[test]
fn the_console_shows_the_kernel() {
    let outcome = chitin("run --console -- echo hello").outcome();
    assert_eq!(outcome.ok(), "hello");
    assert!(outcome.stderr.contains("Linux version 6.12."), "{}", outcome.stderr);
}

#[test]
fn the_report_says_what_happened() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("report.json");
    let outcome = chitin("run --report").arg(&path).arg("--").arg("sh").arg("-c").arg("exit 3").outcome();
    assert_eq!(outcome.code, 3);
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert_eq!(report["tier"], "ironclaw");
    assert_eq!(report["exit_code"], 3);
    assert_eq!(report["exit"]["code"], 3);
    assert_eq!(report["error"], serde_json::Value::Null);
    let phases = &report["phases"];
    let phase = |name: &str| phases[name].as_u64().unwrap_or_else(|| panic!("no {name} in {phases}"));
    assert!(phase("entered_ns") < phase("kernel_ns"));
    assert!(phase("kernel_ns") <= phase("agent_ns"));
    assert!(phase("agent_ns") < phase("exit_ns"));

    let outcome = chitin("run --timeout 1s --report").arg(&path).args(["--", "sleep", "600"]).outcome();
    assert_eq!(outcome.code, 124);
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert_eq!(report["exit_code"], 124);
    assert_eq!(report["error"], "the time limit of 1 s was reached");
}

#[test]
fn runs_do_not_see_each_other() {
    let mut first = sh("echo mine > /work/f; echo mine > /tmp/f; echo up; sleep 600").spawn();
    assert_eq!(first.line(), "up");
    assert_eq!(sh("cat /work/f /tmp/f 2>/dev/null; ls /work | wc -l").outcome().ok(), "0");
    drop(first.child.stdin.take());
    signal(&first, Signal::INT);
    first.wait();
}
