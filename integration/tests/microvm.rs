//! The parts of `chitin run` that only microVMs have. Those of all tiers are in `conformance`.

use chitin_integration::{chitin, run};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

#[test]
fn guest_runs_a_separate_kernel() {
    let release = run("python3 -c").arg("import os; print(os.uname().release)").outcome();
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert!(release.assert_success().starts_with("6.12."), "{release:?}");
    assert_ne!(release.stdout_text(), host.trim());
    let boot = || run("cat /proc/sys/kernel/random/boot_id").outcome().assert_success().to_owned();
    assert_ne!(boot(), boot());
}

#[test]
fn cpus_and_memory_match_the_options() {
    for cpus in [1, 2, 8] {
        assert_eq!(
            chitin(&format!("run --cpus {cpus} -- nproc")).outcome().assert_success(),
            cpus.to_string()
        );
    }
    let least = read_total_kib(64);
    assert!((32 << 10..=64 << 10).contains(&least), "{least} KiB");
    let most = read_total_kib(16_384);
    assert!((15 << 20..=16 << 20).contains(&most), "{most} KiB");
}

fn read_total_kib(memory_mib: u32) -> u32 {
    let script = "sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo";
    chitin(&format!("run --memory {memory_mib} -- sh -c"))
        .arg(script)
        .outcome()
        .assert_success()
        .parse()
        .expect("a number")
}

#[test]
fn killed_monitor_is_the_exit_cause() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("report.json");
    let run = chitin("run --report").arg(&path).args(["--", "sh", "-c", "echo up; sleep 600"]);
    let mut running = run.spawn();
    assert_eq!(running.read_line(), "up");
    // The last one is the monitor itself, in its jail.
    let processes = running.list_processes();
    let pids = processes.iter().filter_map(|path| path.file_name()?.to_str()?.parse().ok());
    let monitor = pids.max().and_then(Pid::from_raw).expect("a monitor");
    kill_process(monitor, Signal::KILL).unwrap();
    assert_eq!(running.wait(), 125);
    let report: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert_eq!(report["cause"], "monitor_fault", "{report}");
    assert!(running.read_stderr().contains("the monitor was killed (signal 9)"));
    running.assert_no_process_left();
}

#[test]
fn console_option_prints_kernel_log() {
    let outcome = chitin("run --console -- echo hello").outcome();
    assert_eq!(outcome.assert_success(), "hello");
    assert!(outcome.stderr.contains("Linux version 6.12."), "{}", outcome.stderr);
}

#[test]
fn report_contains_boot_phases() {
    let (outcome, report) = chitin("run").outcome_with_json("--report", &["--", "true"]);
    outcome.assert_success();
    assert_eq!(report["tier"], "ironclaw");
    let phases = &report["phases"];
    let phase =
        |name: &str| phases[name].as_u64().unwrap_or_else(|| panic!("no {name} in {phases}"));
    assert!(phase("entered_ns") < phase("kernel_ns"));
    assert!(phase("kernel_ns") <= phase("agent_ns"));
    assert!(phase("agent_ns") < phase("exit_ns"));
}
