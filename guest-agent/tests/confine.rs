//! What a policy leaves of a process's rights, in a root of the agent's own making. Needs root, and util-linux's `unshare`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use chitin_protocol::{Confine, Exit, Failure, FileRule, SystemCalls, ToGuest};
use support::{Agent, sandbox};

/// Nothing but the answer to it.
fn nothing(agent: &mut Agent) -> Confine {
    let system_calls = SystemCalls::DefaultAllow;
    Confine { request: agent.request(), system_calls, files: None, max_tasks: None, max_disk: None }
}

fn confine(agent: &mut Agent, confine: Confine) -> Result<(), Failure> {
    let request = confine.request;
    agent.connection.send_message(&ToGuest::Confine(confine)).unwrap();
    agent.until(|agent| agent.done.contains_key(&request));
    agent.done.remove(&request).unwrap()
}

#[test]
fn files_that_are_not_listed_cannot_be_opened() {
    let Some(mut agent) = sandbox() else { return };
    // Part of this machine's root that is not the system, and readable for everybody.
    let rules = vec![FileRule { path: b"/var/log".to_vec(), writable: false }];
    let plan = Confine { files: Some(rules), ..nothing(&mut agent) };
    confine(&mut agent, plan).unwrap();
    let running = agent.shell(
        "ls /var/log >/dev/null && echo listed; ls /var 2>&1; ls / 2>&1; cat /var/lib/dpkg/status 2>&1; \
         echo x >/work/a && cat /work/a; head -c1 /etc/passwd >/dev/null && echo system; \
         echo '#!/bin/sh\necho script' >/tmp/.chitin && chmod +x /tmp/.chitin && /tmp/.chitin; echo >/dev/null && echo null; \
         mv /work/a /tmp/.chitin-b && cat /tmp/.chitin-b; ls /proc/self/fd >/dev/null && echo proc",
    );
    let text = agent.output(running);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], "listed");
    assert!(lines[1..4].iter().all(|line| line.ends_with("Permission denied")), "{text}");
    assert_eq!(lines[4..], ["x", "system", "script", "null", "x", "proc"], "{text}");
}

#[test]
fn a_rule_for_what_is_not_there_is_an_error() {
    let Some(mut agent) = sandbox() else { return };
    let rules = vec![FileRule { path: b"/nowhere".to_vec(), writable: false }];
    let plan = Confine { files: Some(rules), ..nothing(&mut agent) };
    let failure = confine(&mut agent, plan).unwrap_err();
    assert_eq!((failure.operation.as_str(), failure.errno), ("allow files in /nowhere", 2));
}

#[test]
fn a_credential_in_memory_is_within_the_rules() {
    let Some(mut agent) = sandbox() else { return };
    agent.secret("TOKEN", b"s3cret", chitin_protocol::Delivery::Memory).unwrap();
    let plan = Confine {
        files: Some(Vec::new()),
        system_calls: SystemCalls::DefaultDeny,
        ..nothing(&mut agent)
    };
    confine(&mut agent, plan).unwrap();
    let running = agent.shell("cat $TOKEN_FILE");
    assert_eq!(agent.output(running), "s3cret");
}

/// What system calls say, by errno.
const PROBE: &str = "
import ctypes, errno, socket, subprocess, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
def call(*a):
    ctypes.set_errno(0)
    r = libc.syscall(*[ctypes.c_long(x) for x in a])
    return errno.errorcode.get(ctypes.get_errno(), '?') if r < 0 else 'ok'
print('vsock', call(41, 40, 1, 0), 'packet', call(41, 17, 3, 0), 'netlink', call(41, 16, 3, 0), call(41, 16, 3, 15))
print('inet', call(41, 2, 1, 0), 'unix', call(41, 1, 1, 0))
print('ptrace', call(101, 0, 0, 0, 0), 'unshare', call(272, 0x10000000), 'keyctl', call(250, 0, 0, 0, 0, 0))
print('clone', call(56, 0x10000011, 0, 0, 0, 0), 'clone3', call(435, 0, 0), 'future', call(500), 'mount', call(165, 0, 0, 0, 0, 0))
t = threading.Thread(target=lambda: print('thread')); t.start(); t.join()
print(subprocess.run(['echo', 'process'], capture_output=True, text=True).stdout, end='')
";

#[test]
fn system_calls_that_are_not_listed_fail() {
    let Some(mut agent) = sandbox() else { return };
    let plan = Confine { system_calls: SystemCalls::DefaultDeny, ..nothing(&mut agent) };
    confine(&mut agent, plan).unwrap();
    let running = agent.run(&["python3", "-c", PROBE]);
    let text = agent.output(running);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(
        lines,
        [
            "vsock EAFNOSUPPORT packet EAFNOSUPPORT netlink ok EAFNOSUPPORT",
            "inet ok unix ok",
            // The filter of every sandbox also stands; of two that fail a call, the later one gives the reason.
            "ptrace EPERM unshare EPERM keyctl EPERM",
            "clone EPERM clone3 ENOSYS future ENOSYS mount EPERM",
            "thread",
            "process",
        ]
    );
    let running = agent.shell("grep -E '^(Seccomp|NoNewPrivs|CapEff):' /proc/self/status");
    assert_eq!(agent.output(running), "CapEff:\t0000000000000400\nNoNewPrivs:\t1\nSeccomp:\t2\n");
    // And a process that cannot be started says why, through the filter.
    let running = agent.run(&["/nonexistent"]);
    assert!(matches!(
        agent.exit(running),
        Exit::NotStarted { error: chitin_protocol::StartError::NotFound, .. }
    ));
}

#[test]
fn the_disk_has_an_end() {
    let Some(mut agent) = sandbox() else { return };
    let plan = Confine { max_disk: Some(4 << 20), ..nothing(&mut agent) };
    confine(&mut agent, plan).unwrap();
    // All directories share it.
    let running = agent.shell(
        "head -c 3M /dev/zero >/work/a && echo three; head -c 3M /dev/zero >/tmp/b || echo full; wc -c </tmp/b; rm /work/a; \
         head -c 2M /dev/zero >/tmp/c && echo two",
    );
    let text = agent.output(running);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!((lines[0], lines[1], lines[3]), ("three", "full", "two"));
    assert!(lines[2].parse::<u64>().unwrap() <= 1 << 20, "{text}");
}

#[test]
fn a_sandbox_is_confined_once_and_before_it_runs_anything() {
    let Some(mut agent) = sandbox() else { return };
    let running = agent.shell("read line");
    let plan = nothing(&mut agent);
    assert_eq!(confine(&mut agent, plan).unwrap_err().errno, 16);
    agent.feed(running.stdin.unwrap(), b"go\n");
    agent.exit(running);
    let plan = nothing(&mut agent);
    confine(&mut agent, plan).unwrap();
    let plan = nothing(&mut agent);
    assert_eq!(confine(&mut agent, plan).unwrap_err().errno, 114);
}

#[test]
fn what_another_has_made_is_not_bounded_by_the_agent() {
    let mut agent = Agent::up();
    let plan = Confine { max_disk: Some(1 << 20), ..nothing(&mut agent) };
    assert_eq!(confine(&mut agent, plan).unwrap_err().errno, 95);
    let plan = Confine { max_tasks: Some(10), ..nothing(&mut agent) };
    assert_eq!(confine(&mut agent, plan).unwrap_err().errno, 95);
}
