//! What `chitin run` has of a microVM; what it has of all tiers is in `conformance`.

use chitin_integration::{chitin, run};

#[test]
fn the_guest_has_a_kernel_of_its_own() {
    let release = run("python3 -c").arg("import os; print(os.uname().release)").outcome();
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert!(release.ok().starts_with("6.12."), "{release:?}");
    assert_ne!(release.text(), host.trim());
    let boot = || run("cat /proc/sys/kernel/random/boot_id").outcome().ok().to_owned();
    assert_ne!(boot(), boot());
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
fn the_console_shows_the_kernel() {
    let outcome = chitin("run --console -- echo hello").outcome();
    assert_eq!(outcome.ok(), "hello");
    assert!(outcome.stderr.contains("Linux version 6.12."), "{}", outcome.stderr);
}

#[test]
fn the_report_tells_the_phases_of_a_boot() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("report.json");
    chitin("run --report").arg(&path).args(["--", "true"]).outcome().ok();
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert_eq!(report["tier"], "ironclaw");
    let phases = &report["phases"];
    let phase =
        |name: &str| phases[name].as_u64().unwrap_or_else(|| panic!("no {name} in {phases}"));
    assert!(phase("entered_ns") < phase("kernel_ns"));
    assert!(phase("kernel_ns") <= phase("agent_ns"));
    assert!(phase("agent_ns") < phase("exit_ns"));
}
