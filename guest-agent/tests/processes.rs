//! Processes: how they are launched, their streams, signals and exits.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking, and truncates on purpose"
)]

mod support;

use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use chitin_protocol::{Exit, Failure, Start, StartError};
use rustix::io::Errno;
use sha2::{Digest, Sha256};
use support::Agent;

#[test]
fn sixteen_mebibytes_round_trip_through_a_process() {
    let mut agent = Agent::spawn_ready();
    let sent: Vec<u8> =
        (0..16_u32 << 20).map(|index| (index.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let running = agent.run_command(&["cat"]);
    agent.send_all(running.stdin.unwrap(), &sent);
    assert_eq!(agent.wait_for_exit(running), Exit::Code(0));
    let received = agent.output.remove(&running.stdout).unwrap();
    assert_eq!(received.len(), sent.len());
    assert_eq!(Sha256::digest(received), Sha256::digest(sent));
}

#[test]
fn exit_code_and_signal_are_reported() {
    let mut agent = Agent::spawn_ready();
    for (script, exit) in [
        ("exit 0", Exit::Code(0)),
        ("exit 7", Exit::Code(7)),
        ("exit 255", Exit::Code(255)),
        ("kill -9 $$", Exit::Signal(9)),
        ("kill -15 $$", Exit::Signal(15)),
        // An exit code of 127 differs from a program that was not found.
        ("exit 127", Exit::Code(127)),
    ] {
        let running = agent.run_shell(script);
        assert_eq!(agent.wait_for_exit(running), exit, "{script}");
    }
}

fn expect_not_started(exit: Exit) -> (StartError, Failure) {
    match exit {
        Exit::NotStarted { error, failure } => (error, failure),
        other => panic!("{other:?}"),
    }
}

#[test]
fn launch_failure_reports_class_and_reason() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let write = |name: &str, text: &str, mode| {
        std::fs::write(path(name), text).unwrap();
        std::fs::set_permissions(path(name), PermissionsExt::from_mode(mode)).unwrap();
    };
    std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o755)).unwrap();
    write("data", "x", 0o644);
    write("no-interpreter", "#!/no/such/shell\n", 0o755);
    write("no-header", "echo\n", 0o755);

    let mut agent = Agent::spawn_ready();
    for (program, class, errno) in [
        ("nosuch", StartError::NotFound, Errno::NOENT),
        ("/no/such", StartError::NotFound, Errno::NOENT),
        ("", StartError::NotFound, Errno::NOENT),
        ("/dev", StartError::NotExecutable, Errno::ACCESS),
        (&path("data"), StartError::NotExecutable, Errno::ACCESS),
        (&path("no-header"), StartError::NotExecutable, Errno::NOEXEC),
        // The interpreter is missing, and the program is not.
        (&path("no-interpreter"), StartError::NotExecutable, Errno::NOENT),
    ] {
        let running = agent.run_command(&[program, "x"]);
        let (error, failure) = expect_not_started(agent.wait_for_exit(running));
        assert_eq!((error, failure.errno), (class, errno.raw_os_error()), "{program}: {failure}");
        assert!(failure.operation.contains(program), "{program}: {failure}");
    }

    type Change<'a> = &'a dyn Fn(&mut Start);
    let mut start_changed = |change: Change<'_>| {
        let mut start = agent.plain_start(&["true"]);
        change(&mut start);
        let running = agent.start_process(start);
        let (error, failure) = expect_not_started(agent.wait_for_exit(running));
        assert_eq!(error, StartError::Other);
        (Errno::from_raw_os_error(failure.errno), failure.operation)
    };
    let (errno, what) = start_changed(&|start| start.cwd = b"/no/such".to_vec());
    assert!(errno == Errno::NOENT && what.ends_with(" /no/such"), "{what}");
    let changes: [(&str, Change<'_>); 5] = [
        ("/a", &|start| start.cwd = b"/a\0b".to_vec()),
        ("", &|start| start.argv.clear()),
        ("a", &|start| start.argv.push(b"a\0".to_vec())),
        ("A=B", &|start| start.env.push((b"A=B".to_vec(), vec![]))),
        ("A", &|start| start.env.push((b"A".to_vec(), vec![0]))),
    ];
    for (object, change) in changes {
        let (errno, what) = start_changed(change);
        assert!(errno == Errno::INVAL && what.contains(object), "{what}");
    }
    if !support::is_root() {
        let (errno, what) = start_changed(&|start| start.uid = 0);
        assert!(errno == Errno::PERM && what.ends_with(" 0"), "{what}");
    }
}

#[test]
fn program_without_path_variable_is_not_found() {
    let mut agent = Agent::spawn_ready();
    let mut start = agent.plain_start(&["sh"]);
    start.env.clear();
    let running = agent.start_process(start);
    let (error, failure) = expect_not_started(agent.wait_for_exit(running));
    assert_eq!(error, StartError::NotFound);
    assert!(failure.operation.contains("PATH"), "{failure}");
}

#[test]
fn environment_and_directory_are_those_requested() {
    let mut agent = Agent::spawn_ready();
    let mut start = agent.plain_start(&["env"]);
    start.env.push((b"EMPTY".to_vec(), vec![]));
    start.env.push((b"TEXT".to_vec(), b"a = b\nc".to_vec()));
    let running = agent.start_process(start);
    assert_eq!(
        agent.wait_for_output(running),
        "PATH=/usr/local/bin:/usr/bin:/bin\nEMPTY=\nTEXT=a = b\nc\n"
    );

    let mut start = agent.plain_start(&["pwd"]);
    start.cwd = b"/usr/bin".to_vec();
    let running = agent.start_process(start);
    assert_eq!(agent.wait_for_output(running), "/usr/bin\n");
}

#[test]
fn stdout_and_stderr_are_separate() {
    let mut agent = Agent::spawn_ready();
    let running = agent.run_shell("echo out; echo err >&2; exit 3");
    assert_eq!(agent.wait_for_exit(running), Exit::Code(3));
    assert_eq!(
        (agent.take_text(running.stdout), agent.take_text(running.stderr)),
        ("out\n".into(), "err\n".into())
    );
}

#[test]
fn stdin_without_a_stream_is_dev_null() {
    let mut agent = Agent::spawn_ready();
    let mut start = agent.plain_start(&["sh", "-c", "cat; readlink /proc/$$/fd/0"]);
    // The id of its stream stays unused, which is not a violation.
    start.stdin = None;
    let running = agent.start_process(start);
    assert_eq!(agent.wait_for_output(running), "/dev/null\n");
}

#[test]
fn background_child_does_not_delay_the_exit() {
    let mut agent = Agent::spawn_ready();
    let before = Instant::now();
    let running = agent.run_shell("sleep 50 & head -c 50000 /dev/zero; exit 5");
    assert_eq!(agent.wait_for_exit(running), Exit::Code(5));
    assert!(before.elapsed() < Duration::from_secs(20));
    assert_eq!(agent.output[&running.stdout].len(), 50_000);
}

#[test]
fn unread_stream_blocks_its_writer_only() {
    let mut agent = Agent::spawn_ready();
    let running = agent.run_command(&["cat", "/dev/zero"]);
    agent.withhold.push(running.stdout);
    let window = chitin_protocol::WINDOW as usize;
    agent.wait_until(|agent| {
        agent.output.get(&running.stdout).is_some_and(|bytes| bytes.len() == window)
    });
    // Other processes continue.
    let other = agent.run_shell("head -c 1000000 /dev/zero; echo err >&2");
    assert_eq!(agent.wait_for_exit(other), Exit::Code(0));
    assert_eq!(agent.output[&other.stdout].len(), 1_000_000);
    assert_eq!(agent.output[&running.stdout].len(), window);

    // The rest of its output is still in the pipe, so the end of the stream is reported when that
    // has been taken or reset.
    agent.send_signal(running, 9);
    agent.connection.reset_stream(running.stdout);
    agent.wait_until(|agent| agent.exits.contains_key(&running.id));
    assert_eq!(agent.exits[&running.id], Exit::Signal(9));

    let running = agent.run_command(&["cat", "/dev/zero"]);
    agent.withhold.push(running.stdout);
    agent.wait_until(|agent| {
        agent.output.get(&running.stdout).is_some_and(|bytes| bytes.len() == window)
    });
    agent.send_signal(running, 15);
    agent.withhold.clear();
    agent.connection.return_credit(running.stdout, window);
    assert_eq!(agent.wait_for_exit(running), Exit::Signal(15));
}

#[test]
fn reset_output_stream_is_a_broken_pipe() {
    let mut agent = Agent::spawn_ready();
    let running = agent.run_command(&["cat", "/dev/zero"]);
    agent.wait_until(|agent| agent.output.contains_key(&running.stdout));
    agent.connection.reset_stream(running.stdout);
    agent.wait_until(|agent| agent.exits.contains_key(&running.id));
    assert_eq!(agent.exits[&running.id], Exit::Signal(13));
}

#[test]
fn stdin_without_a_reader_is_reset() {
    let mut agent = Agent::spawn_ready();
    let running = agent.run_shell("exec <&-; sleep 50");
    let stdin = running.stdin.unwrap();
    // No data is sent: the closed pipe alone is an event.
    agent.wait_until(|agent| agent.reset.contains(&stdin));
    agent.send_signal(running, 9);
    assert_eq!(agent.wait_for_exit(running), Exit::Signal(9));

    // A process that ends before it has read everything.
    let running = agent.run_shell("head -c 10 >/dev/null");
    let stdin = running.stdin.unwrap();
    while agent.connection.is_sending(stdin) {
        agent.connection.send_data(stdin, &[0; 65536]);
        assert!(agent.exchange_once());
    }
    assert_eq!(agent.wait_for_exit(running), Exit::Code(0));
}

#[test]
fn unread_stdin_is_bounded_by_the_window() {
    let mut agent = Agent::spawn_ready();
    let running = agent.run_command(&["sleep", "50"]);
    let stdin = running.stdin.unwrap();
    let mut sent = 0;
    for _ in 0..8 {
        sent += agent.connection.send_data(stdin, &[0; 65536]);
        assert!(agent.exchange_once());
    }
    // Credit has been returned for what the pipe took, and not for the rest.
    assert!(sent <= chitin_protocol::WINDOW as usize + 65536, "{sent}");
    agent.send_signal(running, 9);
    assert_eq!(agent.wait_for_exit(running), Exit::Signal(9));
}

#[test]
fn signal_reaches_the_process_group() {
    let mut agent = Agent::spawn_ready();
    let running = agent.run_shell("sleep 50 | sleep 50; echo not reached");
    agent.wait_until(|agent| children(agent.child.id()).len() == 1);
    agent.send_signal(running, 15);
    assert_eq!(agent.wait_for_exit(running), Exit::Signal(15));
    assert_eq!(agent.take_text(running.stdout), "");
    agent.wait_until(|agent| children(agent.child.id()).is_empty());
    // Ids of processes that have ended, and numbers that are not signals, have no effect.
    agent.send_signal(running, 9);
    let running = agent.run_command(&["cat"]);
    agent.send_signal(running, 200);
    agent.send_all(running.stdin.unwrap(), b"still here");
    assert_eq!(agent.wait_for_output(running), "still here");
}

#[test]
fn orphans_are_reaped() {
    let mut agent = Agent::spawn_ready();
    let running = agent.run_shell("for i in 1 2 3 4 5 6 7 8; do (sleep 0.0$i &) ; done");
    assert_eq!(agent.wait_for_exit(running), Exit::Code(0));
    agent.wait_until(|agent| children(agent.child.id()).is_empty());
}

#[test]
fn process_that_stops_siblings_cannot_stop_agent() {
    if !support::needs_root("stopping all processes of a user") {
        return;
    }
    let mut agent = Agent::spawn_ready();
    let bully_user = |start: &mut Start| (start.uid, start.gid) = (61_234, 61_234);
    // Processes of one user may stop each other, even between fork and exec.
    let mut start =
        agent.plain_start(&["sh", "-c", "echo up; while :; do kill -STOP -1 2>/dev/null; done"]);
    bully_user(&mut start);
    let bully = agent.start_process(start);
    agent.wait_until(|agent| agent.output.contains_key(&bully.stdout));
    let stopped: Vec<_> = (0..20)
        .map(|_| {
            let mut start = agent.plain_start(&["sleep", "50"]);
            bully_user(&mut start);
            agent.start_process(start)
        })
        .collect();
    let other = agent.run_command(&["true"]);
    assert_eq!(agent.wait_for_exit(other), Exit::Code(0));
    for running in [&[bully][..], &stopped].concat() {
        agent.send_signal(running, 9);
        assert_eq!(agent.wait_for_exit(running), Exit::Signal(9));
    }
}

#[test]
fn process_limit_refuses_until_one_has_exited() {
    let mut agent = Agent::spawn_ready();
    let running: Vec<_> = (0..64).map(|_| agent.run_command(&["cat"])).collect();
    let one_more = agent.run_command(&["cat"]);
    let (error, failure) = expect_not_started(agent.wait_for_exit(one_more));
    assert_eq!(error, StartError::Other);
    assert_eq!(failure.errno, Errno::AGAIN.raw_os_error());
    assert!(failure.operation.contains("64"), "{failure}");
    for running in running {
        agent.connection.end_stream(running.stdin.unwrap());
        assert_eq!(agent.wait_for_exit(running), Exit::Code(0));
    }
    let later = agent.run_command(&["true"]);
    assert_eq!(agent.wait_for_exit(later), Exit::Code(0));
}

#[test]
fn usage_covers_the_process() {
    let mut agent = Agent::spawn_ready();
    let running = agent.run_shell("i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done");
    assert_eq!(agent.wait_for_exit(running), Exit::Code(0));
    let usage = agent.usages[&running.id];
    assert!(usage.user_us > 10_000 && usage.user_us < 60_000_000, "{usage:?}");
    assert!(usage.max_rss_kib > 100, "{usage:?}");
}

#[test]
fn closed_channel_ends_every_process() {
    let mut agent = Agent::spawn_ready();
    let running = agent
        .run_shell("setsid sleep 4321 & (setsid sleep 4322 &); trap '' TERM; echo up; sleep 4323");
    agent.wait_until(|agent| agent.output.contains_key(&running.stdout));
    let sleeping = || {
        std::fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| std::fs::read(entry.ok()?.path().join("cmdline")).ok())
            .filter(|command| command.starts_with(b"sleep\x00432"))
            .count()
    };
    while sleeping() < 3 {
        std::thread::sleep(Duration::from_millis(5));
    }
    agent.socket.shutdown(std::net::Shutdown::Both).unwrap();
    assert_eq!(agent.wait_for_end().0, Some(0));
    assert_eq!(sleeping(), 0);
}

#[test]
fn sigterm_ends_a_container_agent_cleanly() {
    let mut agent = Agent::spawn_ready();
    let _ = agent.run_command(&["sleep", "50"]);
    let pid = rustix::process::Pid::from_child(&agent.child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(agent.wait_for_end().0, Some(0));
}

fn children(pid: u32) -> Vec<String> {
    let text =
        std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_ascii_whitespace().map(str::to_owned).collect()
}
