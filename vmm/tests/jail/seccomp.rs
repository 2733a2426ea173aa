//! System call filters of the threads of a jailed monitor.

use std::fs;
use std::time::{Duration, Instant};

use chitin_vmm::Event;

use crate::monitor::{LIMIT, Monitor, SLEEP, proc_file};

/// Lets a guest request a forbidden call from the test port of the monitor
/// (`vmm/src/vm/seccomp_test_port.rs`). Returns the error that the monitor reports, if it fails.
///
/// An upper-case letter is executed by the vCPU's thread, a lower-case letter by the VMM thread.
fn request_call(letter: u8, jail: bool) -> Option<String> {
    // mov edx, 0x7e0; mov al, letter; out dx, al; and sleep.
    let code = [&[0xba, 0xe0, 0x07, 0, 0, 0xb0, letter, 0xee], &SLEEP[..]].concat();
    let mut monitor = Monitor::launch(&code, |spec| spec.jail = jail, |_| {});
    let deadline = Instant::now() + if jail { LIMIT } else { Duration::from_secs(1) };
    while Instant::now() < deadline {
        if monitor.has_event_within(Duration::from_millis(100)) {
            match monitor.receive_event() {
                Event::Entered { .. } => {}
                Event::Failed { error, .. } => {
                    assert_eq!(monitor.supervisor.wait().unwrap().code(), Some(1));
                    return Some(error);
                }
                other => panic!("{other:?}"),
            }
        }
    }
    None
}

#[test]
fn forbidden_call_kills_the_monitor_and_is_named() {
    for (letter, call) in [
        (b'S', "socket, number 41"),
        (b'O', "openat, number 257"),
        (b'E', "execve, number 59"),
        (b'X', "mmap, number 9"),
        (b'G', "mmap, number 9"),
        (b'N', "mmap, number 9"),
        (b'A', "madvise, number 28"),
        (b'P', "mprotect, number 10"),
        (b'K', "ioctl, number 16"),
        (b'T', "ioctl, number 16"),
        (b'R', "kill, number 62"),
    ] {
        for (letter, thread) in
            [(letter, "vCPU thread"), (letter.to_ascii_lowercase(), "VMM thread")]
        {
            let error = request_call(letter, true)
                .unwrap_or_else(|| panic!("{call} of the {thread} was executed"));
            let report = format!(
                "its filter forbids, and was killed (signal 31); \
                 its last output: {thread}: forbidden system call {call}"
            );
            assert!(error.contains(&report), "{error}");
        }
    }
}

#[test]
fn fault_of_the_monitor_is_reported_by_its_signal() {
    // A handler of SIGSEGV would make a forbidden call, and hide the fault.
    for letter in [b'F', b'f'] {
        let error = request_call(letter, true).expect("a fault ends the monitor");
        assert!(error.contains("the monitor was killed (signal 11)"), "{error}");
    }
}

#[test]
fn forbidden_call_succeeds_without_a_jail() {
    // The test above therefore observes the filters, and not calls that fail anyway.
    for letter in *b"SsGgNnAa" {
        assert_eq!(request_call(letter, false), None);
    }
}

#[test]
fn every_thread_of_a_monitor_is_filtered() {
    let monitor = Monitor::start_with(|spec| spec.vcpus = 3, |_| {});
    let tasks = fs::read_dir(proc_file(monitor.child_pid(), "task")).unwrap();
    let filtered: Vec<_> = tasks
        .map(|task| {
            fs::read_to_string(task.unwrap().path().join("status")).unwrap().contains("Seccomp:\t2")
        })
        .collect();
    assert!(filtered.len() >= 4 && filtered.iter().all(|filtered| *filtered), "{filtered:?}");
}
