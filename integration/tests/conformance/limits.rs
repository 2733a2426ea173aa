//! What a workload can use up, and that it uses it up for itself alone.

use chitin::TierKind;
use chitin_integration::{On, Outcome};

on_every_tier!(
    a_fork_bomb_is_the_workload_s_own_problem,
    memory_runs_out_for_the_workload_alone,
    memory_is_as_much_as_was_asked_for,
    the_disk_is_memory_and_it_ends,
    each_scratch_directory_ends,
    open_files_end,
    core_dumps_are_not_written,
    sizes_out_of_range_are_refused,
);

/// Whether all of the sandbox has ended, and said why: gVisor's kernel has the same limits as what runs on it.
fn the_sandbox_ended(on: On, outcome: &Outcome) -> bool {
    let ended = on.tier == TierKind::Nanoclaw && outcome.code == 125;
    assert!(!ended || outcome.stderr.contains("gVisor's kernel "), "{outcome:?}");
    ended
}

fn a_fork_bomb_is_the_workload_s_own_problem(on: On) {
    let script = "import os, time
while True:
    if os.fork() == 0: time.sleep(600)";
    let outcome =
        on.sh(&format!("python3 -c \"{script}\" 2>/dev/null; echo $?; echo alive")).outcome();
    // Whichever limit it meets first, processes or memory, the shell beside it goes on.
    assert!(
        the_sandbox_ended(on, &outcome) || ["1\nalive", "137\nalive"].contains(&outcome.ok()),
        "{outcome:?}"
    );
}

fn memory_runs_out_for_the_workload_alone(on: On) {
    let outcome = on.sh("python3 -c \"x = b'x' * (1 << 30)\"; echo $?").outcome();
    // MemoryError is 1, the OOM killer's signal 137; either way the shell, the agent and the run go on.
    assert!(the_sandbox_ended(on, &outcome) || ["1", "137"].contains(&outcome.ok()), "{outcome:?}");
}

fn memory_is_as_much_as_was_asked_for(on: On) {
    let taken = |memory: &str, mib: u32| {
        on.with(&format!("--memory {memory} -- python3 -c"))
            .arg(format!("x = b'x' * ({mib} << 20); print(len(x) >> 20)"))
            .outcome()
    };
    assert_eq!(taken("512", 300).ok(), "300");
    assert_ne!(taken("128", 300).code, 0);
}

fn the_disk_is_memory_and_it_ends(on: On) {
    let script = "head -c 1G /dev/zero > /work/f 2>/dev/null; echo $?; rm /work/f; echo ok > /work/g; cat /work/g";
    assert_eq!(on.sh(script).outcome().ok(), "1\nok");
}

fn each_scratch_directory_ends(on: On) {
    let script = "for d in /work /tmp /dev/shm; do head -c 1G /dev/zero > $d/f && echo $d has no end; rm $d/f; done 2>/dev/null; \
                  echo over";
    assert_eq!(on.sh(script).outcome().ok(), "over");
}

fn open_files_end(on: On) {
    let program = "import errno, os, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
held = []
try:
    while True: held.append(os.dup(0))
except OSError as e: print(errno.errorcode[e.errno], len(held) > 4000)
try: resource.setrlimit(resource.RLIMIT_NOFILE, (1 << 20, 1 << 20))
except (OSError, ValueError): print('no more')";
    assert_eq!(on.python(program).outcome().ok(), "EMFILE True\nno more");
}

fn core_dumps_are_not_written(on: On) {
    let script = "ulimit -c; sh -c 'kill -SEGV $$'; echo $?; find /work -type f | wc -l";
    assert_eq!(on.sh(script).outcome().ok(), "0\n139\n0");
}

fn sizes_out_of_range_are_refused(on: On) {
    on.with("--memory 0 -- true").outcome().refused("64 to 16384 MiB");
    on.with("--memory 99999999999999 -- true").outcome().refused("64 to 16384 MiB");
    on.with("--cpus 0 -- true").outcome().refused("1 to 8");
    on.with("--cpus 999 -- true").outcome().refused("1 to 8");
    on.with("--timeout 5 -- true").outcome().refused("--timeout");
}
