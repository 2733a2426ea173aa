//! The start of a run: signals, the time limit, and targets of copies.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

/// The exit code if Chitin itself failed.
const CHITIN_FAILED: i32 = 125;

/// A run waits this long for its credential, longer than a test lasts.
const WAITING: &str = "exec sleep 20";

fn chitin() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_chitin"));
    command.stdin(Stdio::null());
    command
}

/// Makes a command find artifacts, which its run does not get to use.
fn add_artifacts(command: &mut Command, dir: &Path) {
    for file in ["vmlinux", "root.img", "chitin-vmm"] {
        fs::write(dir.join(file), "").unwrap();
    }
    command.env("CHITIN_ARTIFACTS", dir).env("CHITIN_VMM", dir.join("chitin-vmm"));
}

fn stderr_of(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Starts a run with these signals ignored, and waits until it listens for signals.
fn start_run(dir: &Path, ignored: &str) -> Child {
    let ready = dir.join("ready");
    let script = format!(
        "{ignored} exec {} run --secret 'T=exec:touch {}; {WAITING}' -- true",
        env!("CARGO_BIN_EXE_chitin"),
        ready.display()
    );
    let mut shell = Command::new("sh");
    add_artifacts(&mut shell, dir);
    shell.args(["-c", &script]).stdin(Stdio::null()).stderr(Stdio::null());
    let child = shell.spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while !ready.exists() {
        assert!(Instant::now() < deadline, "the run has not started");
        std::thread::sleep(Duration::from_millis(10));
    }
    child
}

fn send_signal(child: &Child, signal: &str) {
    let status = Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
    assert!(status.success());
}

/// Waits for at most this time.
fn wait_for(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + limit;
    loop {
        let status = child.try_wait().unwrap();
        if status.is_some() || Instant::now() >= deadline {
            return status;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn signal_ignored_at_start_stays_ignored() {
    let dir = tempfile::tempdir().unwrap();
    let mut run = start_run(dir.path(), "trap '' HUP INT;");
    for signal in ["-HUP", "-INT"] {
        send_signal(&run, signal);
    }
    let ended = wait_for(&mut run, Duration::from_secs(1));
    assert_eq!(ended, None);
    send_signal(&run, "-TERM");
    let ended = wait_for(&mut run, Duration::from_secs(10));
    assert_eq!(ended.unwrap().code(), Some(128 + 15));
}

#[test]
fn signal_ends_the_start_of_a_run() {
    for (signal, number) in [("-HUP", 1), ("-INT", 2), ("-TERM", 15)] {
        let dir = tempfile::tempdir().unwrap();
        let mut run = start_run(dir.path(), "");
        send_signal(&run, signal);
        let ended = wait_for(&mut run, Duration::from_secs(10));
        assert_eq!(ended.unwrap().code(), Some(128 + number), "{signal}");
    }
}

#[test]
fn copy_target_is_checked_before_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let marker = dir.path().join("started");
    let run = |target: &Path| {
        let mut command = chitin();
        add_artifacts(&mut command, dir.path());
        let secret = format!("T=exec:touch {}", marker.display());
        let copy = format!("--copy-out=/work/f:{}", target.display());
        command.args(["run", "--secret", &secret, &copy, "--", "true"]).output().unwrap()
    };
    for bad in [dir.path().join("no/such/dir"), dir.path().join("vmlinux/x"), "/dev/null".into()] {
        let output = run(&bad);
        assert_eq!(output.status.code(), Some(CHITIN_FAILED), "{output:?}");
        let target = format!("copy out to {}", bad.display());
        assert!(stderr_of(&output).contains(&target), "{output:?}");
        assert!(!marker.exists(), "the run has started: {output:?}");
    }
    // The start fails too, but only after the check.
    run(&dir.path().join("good"));
    assert!(marker.exists());
}

#[test]
fn time_limit_covers_the_fetch_of_credentials() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = chitin();
    add_artifacts(&mut command, dir.path());
    let start = Instant::now();
    let secret = format!("T=exec:{WAITING}");
    let args = ["run", "--timeout", "1s", "--secret", &secret, "--", "true"];
    // Not a pipe, which the command of the secret would keep open.
    let status = command.args(args).stderr(Stdio::null()).status().unwrap();
    assert_eq!(status.code(), Some(124));
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[test]
fn endless_time_limit_is_accepted() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = chitin();
    add_artifacts(&mut command, dir.path());
    let args = ["run", "--timeout", "18446744073709551615s", "--", "true"];
    let output = command.args(args).output().unwrap();
    // The monitor is none.
    assert_eq!(output.status.code(), Some(CHITIN_FAILED), "{output:?}");
}
