//! The end of a monitor: its supervisor, its child and its host end together.

use std::fs;
use std::process::{Command, Stdio};
use std::time::Instant;

use chitin_vmm::{EndReason, Event};
use rustix::process::{Pid, Signal, kill_process};

use crate::monitor::{LIMIT, Monitor, proc_file};

fn send_signal(pid: u32, signal: Signal) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).unwrap();
    kill_process(pid, signal).unwrap();
}

/// Waits until a process has ended; it may still be a zombie.
fn await_end(pid: u32) {
    let deadline = Instant::now() + LIMIT;
    loop {
        let stat = fs::read_to_string(proc_file(pid, "stat")).unwrap_or_default();
        let state = stat.rsplit_once(')').map_or("", |(_, rest)| rest.trim_start());
        if state.is_empty() || state.starts_with(['Z', 'X']) {
            return;
        }
        assert!(Instant::now() < deadline, "process {pid} still exists: {stat}");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

#[test]
fn child_ends_with_control_socket_and_supervisor() {
    let mut monitor = Monitor::start();
    let child = monitor.child_pid();
    monitor.control = None;
    assert!(monitor.supervisor.wait().unwrap().success());
    // The supervisor has reaped it.
    assert!(!proc_file(child, "stat").exists());

    let mut monitor = Monitor::start();
    let child = monitor.child_pid();
    monitor.supervisor.kill().unwrap();
    monitor.supervisor.wait().unwrap();
    await_end(child);
}

#[test]
fn killed_child_is_reported_by_its_supervisor() {
    let mut monitor = Monitor::start();
    send_signal(monitor.child_pid(), Signal::KILL);
    match monitor.receive_event() {
        Event::Failed { error, .. } => {
            assert!(error.contains("was killed (signal 9)"), "{error}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(monitor.supervisor.wait().unwrap().code(), Some(1));
}

#[test]
fn sigterm_is_forwarded_and_ends_the_guest() {
    // Every thread ends within its filter, and then the process.
    for vcpus in [1, 3] {
        let mut monitor = Monitor::start_with(|spec| spec.vcpus = vcpus, |_| {});
        send_signal(monitor.supervisor.id(), Signal::TERM);
        let event = monitor.receive_event();
        assert!(matches!(event, Event::Ended { .. }), "{event:?}");
        assert!(monitor.supervisor.wait().unwrap().success());
    }
}

#[test]
fn console_output_reaches_standard_error() {
    // mov dx, 0x3f8; then for each letter: mov al, letter; out dx, al.
    let mut code = vec![0xba, 0xf8, 0x03, 0, 0];
    code.extend(b"hi\npart".iter().flat_map(|letter| [0xb0, *letter, 0xee]));
    // ud2: a guest without interrupt handlers resets.
    code.extend([0x0f, 0x0b]);
    let pipe_stderr = |command: &mut Command| {
        command.stderr(Stdio::piped());
    };
    let mut monitor = Monitor::launch(&code, |spec| spec.console = true, pipe_stderr);
    let entered = monitor.receive_event();
    assert!(matches!(entered, Event::Entered { .. }), "{entered:?}");
    let ended = monitor.receive_event();
    assert!(matches!(ended, Event::Ended { reason: EndReason::Reset, .. }), "{ended:?}");
    assert_eq!(monitor.read_stderr(), "hi\npart");
}
