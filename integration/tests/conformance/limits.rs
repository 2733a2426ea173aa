//! Limits of resources, and workloads that exhaust them for themselves alone.

use chitin::TierKind;
use chitin_integration::{Chitin, Outcome, TierUnderTest};
use serde_json::Value;

on_every_tier!(
    fork_bomb_affects_only_workload,
    memory_exhaustion_affects_only_workload,
    memory_option_sets_memory_limit,
    exhausted_memory_is_the_reported_cause,
    exhausted_tasks_are_the_reported_cause,
    full_disk_is_the_reported_cause,
    limit_survived_by_workload_is_a_note,
    full_disk_affects_only_workload,
    each_scratch_directory_is_limited,
    open_file_limit_is_enforced,
    core_dump_is_not_written,
    out_of_range_sizes_are_rejected,
);

/// Returns true if the sandbox has ended with an explanation: gVisor's kernel shares the limits of
/// its workload.
fn sandbox_ended(tier: TierUnderTest, outcome: &Outcome) -> bool {
    let ended = tier.kind == TierKind::Nanoclaw && [125, 137].contains(&outcome.code);
    assert!(!ended || outcome.stderr.contains("gVisor's kernel "), "{outcome:?}");
    ended
}

fn fork_bomb_affects_only_workload(tier: TierUnderTest) {
    let script = "import os, time
while True:
    if os.fork() == 0: time.sleep(600)";
    let outcome =
        tier.run_sh(&format!("python3 -c \"{script}\" 2>/dev/null; echo $?; echo alive")).outcome();
    // The bomb reaches the limit of processes or of memory first. Either way the shell continues.
    assert!(
        sandbox_ended(tier, &outcome)
            || ["1\nalive", "137\nalive"].contains(&outcome.assert_success()),
        "{outcome:?}"
    );
}

fn memory_exhaustion_affects_only_workload(tier: TierUnderTest) {
    let outcome = tier.run_sh("python3 -c \"x = b'x' * (1 << 30)\"; echo $?").outcome();
    // A MemoryError exits with 1, the OOM killer's signal with 137. Either way the shell, the agent
    // and the run continue.
    let ended = sandbox_ended(tier, &outcome);
    assert!(ended || ["1", "137"].contains(&outcome.assert_success()), "{outcome:?}");
}

fn memory_option_sets_memory_limit(tier: TierUnderTest) {
    let taken = |memory: &str, mib: u32| {
        tier.run_with(&format!("--memory {memory} -- python3 -c"))
            .arg(format!("x = b'x' * ({mib} << 20); print(len(x) >> 20)"))
            .outcome()
    };
    assert_eq!(taken("512", 300).assert_success(), "300");
    assert_eq!(taken("512M", 300).assert_success(), "300");
    assert_ne!(taken("128", 300).code, 0);
}

/// Runs a command with a report. Returns the outcome, the cause and the limits that were reached.
fn run_with_cause(run: Chitin, command: &[&str]) -> (Outcome, String, Value) {
    let (outcome, report) = run.outcome_with_json("--report", &[&["--"], command].concat());
    let cause = report["cause"].as_str().unwrap_or_default().to_owned();
    (outcome, cause, report["usage"]["reached"].clone())
}

fn exhausted_memory_is_the_reported_cause(tier: TierUnderTest) {
    // Small pieces: the kernel refuses a single allocation that cannot succeed.
    let program = "x = []
while True: x.append(b'x' * (1 << 20))";
    let run = tier.run_with("--memory 128");
    let (outcome, cause, _) = run_with_cause(run, &["python3", "-c", program]);
    assert_eq!((outcome.code, cause.as_str()), (137, "out_of_memory"), "{outcome:?}");
    let message = "chitin: out of memory: the sandbox used its 128 MiB; raise it with --memory\n";
    assert!(outcome.stderr.contains(message), "{outcome:?}");
}

fn exhausted_tasks_are_the_reported_cause(tier: TierUnderTest) {
    let policy = tier.write_policy("resources:\n  pids: 32\n");
    let program = "import os, time
while True:
    if os.fork() == 0: time.sleep(600)";
    let (outcome, cause, reached) = run_with_cause(policy.run(), &["python3", "-c", program]);
    assert_eq!((outcome.code, cause.as_str()), (1, "out_of_tasks"), "{outcome:?}");
    assert!(reached["refused_tasks"].as_u64() > Some(0), "{reached}");
    assert!(outcome.stderr.contains("chitin: out of tasks: "), "{outcome:?}");
}

fn full_disk_is_the_reported_cause(tier: TierUnderTest) {
    let command = ["sh", "-c", "head -c 1G /dev/zero > /work/f"];
    let (outcome, cause, reached) = run_with_cause(tier.run_with(""), &command);
    assert_eq!((outcome.code, cause.as_str()), (1, "disk_full"), "{outcome:?}");
    assert_eq!(reached["disk_full"], true);
    assert!(outcome.stderr.contains("chitin: disk full: "), "{outcome:?}");
}

fn limit_survived_by_workload_is_a_note(tier: TierUnderTest) {
    let command = ["sh", "-c", "head -c 1G /dev/zero > /work/f; exit 0"];
    let (outcome, cause, reached) = run_with_cause(tier.run_with(""), &command);
    outcome.assert_success();
    assert_eq!((cause.as_str(), &reached["disk_full"]), ("exit", &true.into()));
    assert!(outcome.stderr.contains("chitin: note: disk full: "), "{outcome:?}");
    // No limit was reached by a failure that has another cause.
    let (outcome, cause, reached) = run_with_cause(tier.run_with(""), &["sh", "-c", "exit 5"]);
    assert_eq!((outcome.code, cause.as_str(), outcome.stderr.as_str()), (5, "exit", ""));
    assert_eq!(reached["oom_kills"], 0);
}

fn full_disk_affects_only_workload(tier: TierUnderTest) {
    let script = "head -c 1G /dev/zero > /work/f 2>/dev/null; echo $?; rm /work/f; \
                  echo ok > /work/g; cat /work/g";
    assert_eq!(tier.run_sh(script).outcome().assert_success(), "1\nok");
}

fn each_scratch_directory_is_limited(tier: TierUnderTest) {
    let script = "for d in /work /tmp /dev/shm; do \
                    head -c 1G /dev/zero > $d/f && echo $d has no limit; rm $d/f; \
                  done 2>/dev/null; echo over";
    assert_eq!(tier.run_sh(script).outcome().assert_success(), "over");
}

fn open_file_limit_is_enforced(tier: TierUnderTest) {
    let program = "import errno, os, resource
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, hard))
held = []
try:
    while True: held.append(os.dup(0))
except OSError as e: print(errno.errorcode[e.errno], len(held) > 4000)
try: resource.setrlimit(resource.RLIMIT_NOFILE, (1 << 20, 1 << 20))
except (OSError, ValueError): print('no more')";
    assert_eq!(tier.run_python(program).outcome().assert_success(), "EMFILE True\nno more");
}

fn core_dump_is_not_written(tier: TierUnderTest) {
    let script = "ulimit -c; sh -c 'kill -SEGV $$'; echo $?; find /work -type f | wc -l";
    assert_eq!(tier.run_sh(script).outcome().assert_success(), "0\n139\n0");
}

fn out_of_range_sizes_are_rejected(tier: TierUnderTest) {
    tier.run_with("--memory 0 -- true").outcome().assert_refused("64 to 16384 MiB");
    tier.run_with("--memory 99999999999999 -- true").outcome().assert_refused("64 to 16384 MiB");
    tier.run_with("--cpus 0 -- true").outcome().assert_refused("1 to 8");
    tier.run_with("--cpus 999 -- true").outcome().assert_refused("1 to 8");
    tier.run_with("--memory 1.5G -- true").outcome().assert_usage_error("1G");
    tier.run_with("--timeout 5 -- true").outcome().assert_usage_error("--timeout");
}
