//! Processes: their streams, their ends, and what they are started with.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking, and truncates on purpose"
)]

mod support;

use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use chitin_protocol::{Exit, Start, StartError};
use sha2::{Digest, Sha256};
use support::Agent;

#[test]
fn sixteen_mebibytes_come_back_as_they_went() {
    let mut agent = Agent::up();
    let sent: Vec<u8> =
        (0..16_u32 << 20).map(|index| (index.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let running = agent.run(&["cat"]);
    agent.feed(running.stdin.unwrap(), &sent);
    assert_eq!(agent.exit(running), Exit::Code(0));
    let received = agent.output.remove(&running.stdout).unwrap();
    assert_eq!(received.len(), sent.len());
    assert_eq!(Sha256::digest(received), Sha256::digest(sent));
}

#[test]
fn exits_are_told_as_they_are() {
    let mut agent = Agent::up();
    for (script, exit) in [
        ("exit 0", Exit::Code(0)),
        ("exit 7", Exit::Code(7)),
        ("exit 255", Exit::Code(255)),
        ("kill -9 $$", Exit::Signal(9)),
        ("kill -15 $$", Exit::Signal(15)),
        // Code 127 of a program is not the 127 of a program that is not there.
        ("exit 127", Exit::Code(127)),
    ] {
        let running = agent.shell(script);
        assert_eq!(agent.exit(running), exit, "{script}");
    }
}

fn not_started(exit: Exit) -> (StartError, String) {
    match exit {
        Exit::NotStarted { error, failure } => (error, failure.to_string()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_cannot_be_started_says_why() {
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

    let mut agent = Agent::up();
    for (program, expected, words) in [
        ("nosuch", StartError::NotFound, "nosuch"),
        ("/no/such", StartError::NotFound, "/no/such"),
        ("", StartError::NotFound, "without a name"),
        ("/dev", StartError::NotExecutable, "Permission denied"),
        (&path("data"), StartError::NotExecutable, "Permission denied"),
        (&path("no-header"), StartError::NotExecutable, "Exec format error"),
        (&path("no-interpreter"), StartError::NotExecutable, "interpreter"),
    ] {
        let running = agent.run(&[program, "x"]);
        let (error, text) = not_started(agent.exit(running));
        assert_eq!(error, expected, "{program}: {text}");
        assert!(text.contains(words), "{program}: {text}");
    }

    let mut changed = |change: &dyn Fn(&mut Start)| {
        let mut start = agent.plain(&["true"]);
        change(&mut start);
        let running = agent.start(start);
        let (error, text) = not_started(agent.exit(running));
        assert_eq!(error, StartError::Other);
        text
    };
    assert!(
        changed(&|start| start.cwd = b"/no/such".to_vec()).contains("enter /no/such: No such file")
    );
    assert!(changed(&|start| start.cwd = b"/a\0b".to_vec()).contains("enter /a"));
    assert!(changed(&|start| start.argv.clear()).contains("without a name"));
    assert!(changed(&|start| start.argv.push(b"a\0".to_vec())).contains("NUL"));
    assert!(changed(&|start| start.env.push((b"A=B".to_vec(), vec![]))).contains("A=B"));
    assert!(changed(&|start| start.env.push((b"A".to_vec(), vec![0]))).contains("variable A"));
    if !support::is_root() {
        assert!(changed(&|start| start.uid = 0).contains("become user 0"));
    }
}

#[test]
fn without_a_path_nothing_is_found() {
    let mut agent = Agent::up();
    let mut start = agent.plain(&["sh"]);
    start.env.clear();
    let running = agent.start(start);
    let (error, text) = not_started(agent.exit(running));
    assert_eq!(error, StartError::NotFound);
    assert!(text.contains("without a PATH"), "{text}");
}

#[test]
fn the_environment_and_the_directory_are_exactly_those_given() {
    let mut agent = Agent::up();
    let mut start = agent.plain(&["env"]);
    start.env.push((b"EMPTY".to_vec(), vec![]));
    start.env.push((b"TEXT".to_vec(), b"a = b\nc".to_vec()));
    let running = agent.start(start);
    assert_eq!(agent.output(running), "PATH=/usr/local/bin:/usr/bin:/bin\nEMPTY=\nTEXT=a = b\nc\n");

    let mut start = agent.plain(&["pwd"]);
    start.cwd = b"/usr/bin".to_vec();
    let running = agent.start(start);
    assert_eq!(agent.output(running), "/usr/bin\n");
}

#[test]
fn both_outputs_are_kept_apart() {
    let mut agent = Agent::up();
    let running = agent.shell("echo out; echo err >&2; exit 3");
    assert_eq!(agent.exit(running), Exit::Code(3));
    assert_eq!(
        (agent.text(running.stdout), agent.text(running.stderr)),
        ("out\n".into(), "err\n".into())
    );
}

#[test]
fn without_a_stream_standard_input_is_empty() {
    let mut agent = Agent::up();
    let mut start = agent.plain(&["sh", "-c", "cat; readlink /proc/$$/fd/0"]);
    // Its id stays unused, which is no breach.
    start.stdin = None;
    let running = agent.start(start);
    assert_eq!(agent.output(running), "/dev/null\n");
}

#[test]
fn a_background_child_that_holds_the_output_holds_nothing_up() {
    let mut agent = Agent::up();
    let before = Instant::now();
    let running = agent.shell("sleep 50 & head -c 50000 /dev/zero; exit 5");
    assert_eq!(agent.exit(running), Exit::Code(5));
    assert!(before.elapsed() < Duration::from_secs(20));
    assert_eq!(agent.output[&running.stdout].len(), 50_000);
}

#[test]
fn a_host_that_stops_reading_stops_the_writer_and_nothing_else() {
    let mut agent = Agent::up();
    let running = agent.run(&["cat", "/dev/zero"]);
    agent.withhold.push(running.stdout);
    let window = chitin_protocol::WINDOW as usize;
    agent.until(|agent| {
        agent.output.get(&running.stdout).is_some_and(|bytes| bytes.len() == window)
    });
    // Other processes go on.
    let other = agent.shell("head -c 1000000 /dev/zero; echo err >&2");
    assert_eq!(agent.exit(other), Exit::Code(0));
    assert_eq!(agent.output[&other.stdout].len(), 1_000_000);
    assert_eq!(agent.output[&running.stdout].len(), window);

    // The last of its output is still in the pipe, so its end is told when that has been taken, or refused.
    agent.signal(running, 9);
    agent.connection.reset_stream(running.stdout);
    agent.until(|agent| agent.exits.contains_key(&running.name));
    assert_eq!(agent.exits[&running.name], Exit::Signal(9));

    let running = agent.run(&["cat", "/dev/zero"]);
    agent.withhold.push(running.stdout);
    agent.until(|agent| {
        agent.output.get(&running.stdout).is_some_and(|bytes| bytes.len() == window)
    });
    agent.signal(running, 15);
    agent.withhold.clear();
    agent.connection.return_credit(running.stdout, window);
    assert_eq!(agent.exit(running), Exit::Signal(15));
}

#[test]
fn refused_output_is_a_broken_pipe() {
    let mut agent = Agent::up();
    let running = agent.run(&["cat", "/dev/zero"]);
    agent.until(|agent| agent.output.contains_key(&running.stdout));
    agent.connection.reset_stream(running.stdout);
    agent.until(|agent| agent.exits.contains_key(&running.name));
    assert_eq!(agent.exits[&running.name], Exit::Signal(13));
}

#[test]
fn input_that_nobody_reads_is_refused() {
    let mut agent = Agent::up();
    let running = agent.shell("exec <&-; sleep 50");
    let stdin = running.stdin.unwrap();
    // Without any data: the end of the pipe alone tells.
    agent.until(|agent| agent.reset.contains(&stdin));
    agent.signal(running, 9);
    assert_eq!(agent.exit(running), Exit::Signal(9));

    // And a process that ends without having read all.
    let running = agent.shell("head -c 10 >/dev/null");
    let stdin = running.stdin.unwrap();
    while agent.connection.is_sending(stdin) {
        agent.connection.send_data(stdin, &[0; 65536]);
        assert!(agent.turn());
    }
    assert_eq!(agent.exit(running), Exit::Code(0));
}

#[test]
fn input_that_waits_is_bounded_by_the_window() {
    let mut agent = Agent::up();
    let running = agent.run(&["sleep", "50"]);
    let stdin = running.stdin.unwrap();
    let mut sent = 0;
    for _ in 0..8 {
        sent += agent.connection.send_data(stdin, &[0; 65536]);
        assert!(agent.turn());
    }
    // What the pipe took has been granted again; the rest has not.
    assert!(sent <= chitin_protocol::WINDOW as usize + 65536, "{sent}");
    agent.signal(running, 9);
    assert_eq!(agent.exit(running), Exit::Signal(9));
}

#[test]
fn signals_reach_the_whole_group() {
    let mut agent = Agent::up();
    let running = agent.shell("sleep 50 | sleep 50; echo not reached");
    agent.until(|agent| children(agent.child.id()).len() == 1);
    agent.signal(running, 15);
    assert_eq!(agent.exit(running), Exit::Signal(15));
    assert_eq!(agent.text(running.stdout), "");
    agent.until(|agent| children(agent.child.id()).is_empty());
    // Names of those that are gone, and numbers that are no signals, are nobody's.
    agent.signal(running, 9);
    let running = agent.run(&["cat"]);
    agent.signal(running, 200);
    agent.feed(running.stdin.unwrap(), b"still here");
    assert_eq!(agent.output(running), "still here");
}

#[test]
fn orphans_are_reaped() {
    let mut agent = Agent::up();
    let running = agent.shell("for i in 1 2 3 4 5 6 7 8; do (sleep 0.0$i &) ; done");
    assert_eq!(agent.exit(running), Exit::Code(0));
    agent.until(|agent| children(agent.child.id()).is_empty());
}

#[test]
fn a_process_that_stops_its_siblings_stops_not_the_agent() {
    if !support::needs_root("a user that can be stopped as a whole") {
        return;
    }
    let mut agent = Agent::up();
    let bully_user = |start: &mut Start| (start.uid, start.gid) = (61_234, 61_234);
    // As one user they may stop each other, also between fork and exec.
    let mut start =
        agent.plain(&["sh", "-c", "echo up; while :; do kill -STOP -1 2>/dev/null; done"]);
    bully_user(&mut start);
    let bully = agent.start(start);
    agent.until(|agent| agent.output.contains_key(&bully.stdout));
    let stopped: Vec<_> = (0..20)
        .map(|_| {
            let mut start = agent.plain(&["sleep", "50"]);
            bully_user(&mut start);
            agent.start(start)
        })
        .collect();
    let other = agent.run(&["true"]);
    assert_eq!(agent.exit(other), Exit::Code(0));
    for running in [&[bully][..], &stopped].concat() {
        agent.signal(running, 9);
        assert_eq!(agent.exit(running), Exit::Signal(9));
    }
}

#[test]
fn more_processes_than_the_limit_are_refused_and_later_ones_are_not() {
    let mut agent = Agent::up();
    let running: Vec<_> = (0..64).map(|_| agent.run(&["cat"])).collect();
    let one_more = agent.run(&["cat"]);
    let (error, text) = not_started(agent.exit(one_more));
    assert_eq!(error, StartError::Other);
    assert!(text.contains("64"), "{text}");
    for running in running {
        agent.connection.end_stream(running.stdin.unwrap());
        assert_eq!(agent.exit(running), Exit::Code(0));
    }
    let later = agent.run(&["true"]);
    assert_eq!(agent.exit(later), Exit::Code(0));
}

#[test]
fn usage_is_that_of_the_process() {
    let mut agent = Agent::up();
    let running = agent.shell("i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done");
    assert_eq!(agent.exit(running), Exit::Code(0));
    let usage = agent.usages[&running.name];
    assert!(usage.user_us > 10_000 && usage.user_us < 60_000_000, "{usage:?}");
    assert!(usage.max_rss_kib > 100, "{usage:?}");
}

#[test]
fn nothing_is_left_when_the_channel_closes() {
    let mut agent = Agent::up();
    let running =
        agent.shell("setsid sleep 4321 & (setsid sleep 4322 &); trap '' TERM; echo up; sleep 4323");
    agent.until(|agent| agent.output.contains_key(&running.stdout));
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
    assert_eq!(agent.until_ended().0, Some(0));
    assert_eq!(sleeping(), 0);
}

#[test]
fn a_stopped_container_ends_in_order() {
    let mut agent = Agent::up();
    let _ = agent.run(&["sleep", "50"]);
    let pid = rustix::process::Pid::from_child(&agent.child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(agent.until_ended().0, Some(0));
}

fn children(pid: u32) -> Vec<String> {
    let text =
        std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_ascii_whitespace().map(str::to_owned).collect()
}
