//! Restrictions of a policy, in a root that the agent makes. Needs root, and util-linux's
//! `unshare`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use chitin_protocol::{Confine, Exit, Failure, FileRule, SystemCalls, ToGuest};
use support::{Agent, spawn_sandbox};

/// Makes the request of a policy that restricts nothing.
fn unrestricted(agent: &mut Agent) -> Confine {
    let system_calls = SystemCalls::DefaultAllow;
    Confine { request: agent.next_id(), system_calls, files: None, max_tasks: None, max_disk: None }
}

fn confine(agent: &mut Agent, confine: Confine) -> Result<(), Failure> {
    let request = confine.request;
    agent.connection.send_message(&ToGuest::Confine(confine)).unwrap();
    agent.wait_until(|agent| agent.done.contains_key(&request));
    agent.done.remove(&request).unwrap()
}

#[test]
fn unlisted_files_cannot_be_opened() {
    let Some(mut agent) = spawn_sandbox() else { return };
    // A part of this machine's root that is not among the system paths, and readable for every
    // user.
    let rules = vec![FileRule { path: b"/var/log".to_vec(), writable: false }];
    let policy = Confine { files: Some(rules), ..unrestricted(&mut agent) };
    confine(&mut agent, policy).unwrap();
    let running = agent.run_shell(
        "ls /var/log >/dev/null && echo listed; \
         ls /var 2>&1; ls / 2>&1; cat /var/lib/dpkg/status 2>&1; \
         echo x >/work/a && cat /work/a; head -c1 /etc/passwd >/dev/null && echo system; \
         echo '#!/bin/sh\necho script' >/tmp/.chitin && chmod +x /tmp/.chitin && /tmp/.chitin; \
         echo >/dev/null && echo null; \
         mv /work/a /tmp/.chitin-b && cat /tmp/.chitin-b; ls /proc/self/fd >/dev/null && echo proc",
    );
    let text = agent.wait_for_output(running);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], "listed");
    assert!(lines[1..4].iter().all(|line| line.ends_with("Permission denied")), "{text}");
    assert_eq!(lines[4..], ["x", "system", "script", "null", "x", "proc"], "{text}");
}

#[test]
fn rule_for_a_missing_path_is_an_error() {
    let Some(mut agent) = spawn_sandbox() else { return };
    let rules = vec![FileRule { path: b"/nowhere".to_vec(), writable: false }];
    let policy = Confine { files: Some(rules), ..unrestricted(&mut agent) };
    let failure = confine(&mut agent, policy).unwrap_err();
    assert!(failure.operation.contains("/nowhere") && failure.errno == 2, "{failure}");
}

#[test]
fn memory_credential_is_readable_when_confined() {
    let Some(mut agent) = spawn_sandbox() else { return };
    agent.deliver_secret("TOKEN", b"s3cret", chitin_protocol::Delivery::Memory).unwrap();
    let policy = Confine {
        files: Some(Vec::new()),
        system_calls: SystemCalls::DefaultDeny,
        ..unrestricted(&mut agent)
    };
    confine(&mut agent, policy).unwrap();
    let running = agent.run_shell("cat $TOKEN_FILE");
    assert_eq!(agent.wait_for_output(running), "s3cret");
}

/// Prints the results of system calls, by errno.
const PROBE: &str = "
import ctypes, errno, socket, subprocess, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
def call(*a):
    ctypes.set_errno(0)
    r = libc.syscall(*[ctypes.c_long(x) for x in a])
    return errno.errorcode.get(ctypes.get_errno(), '?') if r < 0 else 'ok'
print('vsock', call(41, 40, 1, 0), 'packet', call(41, 17, 3, 0),
      'netlink', call(41, 16, 3, 0), call(41, 16, 3, 15))
print('inet', call(41, 2, 1, 0), 'unix', call(41, 1, 1, 0))
print('ptrace', call(101, 0, 0, 0, 0), 'unshare', call(272, 0x10000000),
      'keyctl', call(250, 0, 0, 0, 0, 0))
print('clone', call(56, 0x10000011, 0, 0, 0, 0), 'clone3', call(435, 0, 0),
      'future', call(500), 'mount', call(165, 0, 0, 0, 0, 0))
t = threading.Thread(target=lambda: print('thread')); t.start(); t.join()
print(subprocess.run(['echo', 'process'], capture_output=True, text=True).stdout, end='')
";

#[test]
fn unlisted_system_calls_fail() {
    let Some(mut agent) = spawn_sandbox() else { return };
    let policy = Confine { system_calls: SystemCalls::DefaultDeny, ..unrestricted(&mut agent) };
    confine(&mut agent, policy).unwrap();
    let running = agent.run_command(&["python3", "-c", PROBE]);
    let text = agent.wait_for_output(running);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(
        lines,
        [
            "vsock EAFNOSUPPORT packet EAFNOSUPPORT netlink ok EAFNOSUPPORT",
            "inet ok unix ok",
            // The filter of every sandbox applies as well. Of two filters that fail a call, the
            // later one determines the errno.
            "ptrace EPERM unshare EPERM keyctl EPERM",
            "clone EPERM clone3 ENOSYS future ENOSYS mount EPERM",
            "thread",
            "process",
        ]
    );
    let running = agent.run_shell("grep -E '^(Seccomp|NoNewPrivs|CapEff):' /proc/self/status");
    assert_eq!(
        agent.wait_for_output(running),
        "CapEff:\t0000000000000400\nNoNewPrivs:\t1\nSeccomp:\t2\n"
    );
    // A failed start is reported through the filter.
    let running = agent.run_command(&["/nonexistent"]);
    assert!(matches!(
        agent.wait_for_exit(running),
        Exit::NotStarted { error: chitin_protocol::StartError::NotFound, .. }
    ));
}

#[test]
fn disk_limit_covers_all_directories() {
    let Some(mut agent) = spawn_sandbox() else { return };
    let policy = Confine { max_disk: Some(4 << 20), ..unrestricted(&mut agent) };
    confine(&mut agent, policy).unwrap();
    // All directories share the limit.
    let running = agent.run_shell(
        "head -c 3M /dev/zero >/work/a && echo three; \
         head -c 3M /dev/zero >/tmp/b || echo full; wc -c </tmp/b; rm /work/a; \
         head -c 2M /dev/zero >/tmp/c && echo two",
    );
    let text = agent.wait_for_output(running);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!((lines[0], lines[1], lines[3]), ("three", "full", "two"));
    assert!(lines[2].parse::<u64>().unwrap() <= 1 << 20, "{text}");
}

#[test]
fn confine_is_refused_if_it_changes_anything() {
    let Some(mut agent) = spawn_sandbox() else { return };
    let running = agent.run_shell("read line");
    let policy = unrestricted(&mut agent);
    assert_eq!(confine(&mut agent, policy).unwrap_err().errno, 16);
    agent.send_all(running.stdin.unwrap(), b"go\n");
    agent.wait_for_exit(running);
    let policy = Confine { files: Some(Vec::new()), ..unrestricted(&mut agent) };
    confine(&mut agent, policy).unwrap();
    for another in [None, Some(vec![FileRule { path: b"/var/log".to_vec(), writable: false }])] {
        let policy = Confine { files: another, ..unrestricted(&mut agent) };
        assert_eq!(confine(&mut agent, policy).unwrap_err().errno, 114);
    }
    // The same restrictions again, also while processes run: a copy is asked whether it has them.
    let running = agent.run_shell("ls /var 2>&1; read line");
    let policy = Confine { files: Some(Vec::new()), ..unrestricted(&mut agent) };
    confine(&mut agent, policy).unwrap();
    agent.send_all(running.stdin.unwrap(), b"go\n");
    assert!(agent.wait_for_output(running).contains("Permission denied"));
}

#[test]
fn limits_outside_the_agent_are_refused() {
    let mut agent = Agent::spawn_ready();
    let policy = Confine { max_disk: Some(1 << 20), ..unrestricted(&mut agent) };
    assert_eq!(confine(&mut agent, policy).unwrap_err().errno, 95);
    let policy = Confine { max_tasks: Some(10), ..unrestricted(&mut agent) };
    assert_eq!(confine(&mut agent, policy).unwrap_err().errno, 95);
}
