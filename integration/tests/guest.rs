//! What a workload finds inside, and what it does not.

use chitin_integration::sh;

#[test]
fn the_workload_is_nobody_in_particular() {
    let script = "id -u; id -g; id -G; \
                  grep -E '^(CapInh|CapPrm|CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/self/status | tr -d '\\t'";
    let outcome = sh(script).outcome();
    let lines: Vec<&str> = outcome.ok().lines().collect();
    assert_eq!(lines[..3], ["1000", "1000", "1000"]);
    for line in &lines[3..] {
        let (name, value) = line.split_once(':').unwrap();
        match name {
            "NoNewPrivs" => assert_eq!(value, "1"),
            "Seccomp" => assert_eq!(value, "2"),
            // Nothing, or the right to bind ports below 1024.
            _ => assert!(["0000000000000000", "0000000000000400"].contains(&value), "{line}"),
        }
    }
}

#[test]
fn there_is_no_network_but_loopback() {
    assert_eq!(sh("ls /sys/class/net").outcome().ok(), "lo");
    let script = "import socket
s = socket.create_server(('127.0.0.1', 80))
socket.create_connection(('127.0.0.1', 80))
try: socket.create_connection(('192.0.2.1', 80), timeout=5)
except OSError as e: print(e.strerror)";
    assert_eq!(sh(&format!("python3 -c \"{script}\"")).outcome().ok(), "Network is unreachable");
}

#[test]
fn the_channel_is_out_of_reach() {
    let script = "import socket
try: socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
except OSError as e: print('refused')";
    assert_eq!(sh(&format!("python3 -c \"{script}\"")).outcome().ok(), "refused");
    assert_eq!(sh("ls /proc/self/fd | wc -l").outcome().ok(), "4", "0, 1, 2 and the directory itself");
}

#[test]
fn the_agent_cannot_be_touched() {
    let script = "kill -9 1 2>/dev/null || echo kill; cat /proc/1/environ 2>/dev/null || echo environ; \
                  ls /proc/1/fd >/dev/null 2>&1 || echo fd; kill -9 -1; echo alive";
    let outcome = sh(script).outcome();
    assert_eq!(outcome.ok(), "kill\nenviron\nfd\nalive");
}

#[test]
fn privileges_cannot_be_gained() {
    let script = "mount -t tmpfs none /mnt 2>/dev/null && echo mounted; \
                  mknod /tmp/m c 1 1 2>/dev/null && echo device; \
                  cat /dev/mem /dev/kmsg /dev/vda /dev/pmem0 /proc/kcore 2>/dev/null | head -c 1; \
                  echo b 2>/dev/null > /proc/sysrq-trigger; echo held";
    assert_eq!(sh(script).outcome().ok(), "held");
}

#[test]
fn a_fork_bomb_is_the_workload_s_own_problem() {
    let script = "import os, time
while True:
    if os.fork() == 0: time.sleep(600)";
    // Whichever limit it meets first, processes or memory, the shell beside it goes on.
    let outcome = sh(&format!("python3 -c \"{script}\" 2>/dev/null; echo $?; echo alive")).outcome();
    assert!(["1\nalive", "137\nalive"].contains(&outcome.ok()), "{outcome:?}");
}

#[test]
fn memory_runs_out_for_the_workload_alone() {
    let outcome = sh("python3 -c \"x = b'x' * (1 << 30)\"; echo $?").outcome();
    // MemoryError is 1, the OOM killer's signal 137; either way the shell, the agent and the run go on.
    assert!(["1", "137"].contains(&outcome.ok()), "{outcome:?}");
}

#[test]
fn the_disk_is_memory_and_it_ends() {
    let outcome =
        sh("head -c 1G /dev/zero > /work/f 2>/dev/null; echo $?; rm /work/f; echo ok > /work/g; cat /work/g")
            .outcome();
    assert_eq!(outcome.ok(), "1\nok");
}

#[test]
fn the_clock_is_right_and_entropy_is_there() {
    let before = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let guest: u64 = sh("date +%s").outcome().ok().parse().unwrap();
    let after = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    assert!((before - 1..=after + 1).contains(&guest), "{before} {guest} {after}");
    let random = || {
        sh("head -c 16 /dev/urandom | od -An -tx1; cat /proc/sys/kernel/random/boot_id")
            .outcome()
            .ok()
            .to_owned()
    };
    assert_ne!(random(), random());
}

#[test]
fn python_comes_with_its_batteries() {
    let script = "import json, os, ssl, sqlite3, ctypes, hashlib, zoneinfo, subprocess, multiprocessing, uuid; \
                  print(len(os.listdir(ssl.get_default_verify_paths().capath)) > 100, \
                  subprocess.check_output(['sh', '-c', 'echo sub'], text=True).strip())";
    assert_eq!(sh(&format!("python3 -c \"{script}\"")).outcome().ok(), "True sub");
}
