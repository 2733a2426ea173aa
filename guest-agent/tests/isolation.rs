//! The isolation of the workload, and how it gets its credentials.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use chitin_protocol::{Delivery, Exit, MAX_SECRET};
use support::{Agent, spawn_sandbox};

fn status_of(agent: &mut Agent, argv: &[&str]) -> String {
    let running = agent.run_command(argv);
    agent.wait_for_output(running)
}

/// Returns the value of a line `NAME:\tvalue` of /proc/self/status.
fn field<'a>(status: &'a str, name: &str) -> &'a str {
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":"));
    line.unwrap_or_else(|| panic!("no {name} in {status}")).trim()
}

#[test]
fn workload_has_no_privileges() {
    let mut agent = Agent::spawn_ready();
    let status = status_of(&mut agent, &["cat", "/proc/self/status"]);
    assert_eq!(field(&status, "NoNewPrivs"), "1");
    assert_eq!(field(&status, "Seccomp"), "2");
    assert_eq!(field(&status, "SigBlk"), "0000000000000000");
    assert_eq!(field(&status, "SigIgn"), "0000000000000000");
    if support::needs_root("dropping capabilities and groups") {
        // CAP_NET_BIND_SERVICE, number 10, is the only one left.
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(field(&status, set), "0000000000000400", "{set}");
        }
        assert_eq!(field(&status, "Uid"), "1000\t1000\t1000\t1000");
        assert_eq!(field(&status, "Gid"), "1000\t1000\t1000\t1000");
        assert_eq!(field(&status, "Groups"), "");
    } else {
        for set in ["CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(field(&status, set), "0000000000000000", "{set}");
        }
    }
}

#[test]
fn root_workload_has_no_capabilities() {
    if !support::needs_root("a workload with user id 0") {
        return;
    }
    let mut agent = Agent::spawn_ready();
    let mut start = agent.plain_start(&["cat", "/proc/self/status"]);
    (start.uid, start.gid) = (0, 0);
    let running = agent.start_process(start);
    let status = agent.wait_for_output(running);
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(field(&status, set), "0000000000000400", "{set}");
    }
}

#[test]
fn workload_binds_low_ports_but_cannot_reach_agent() {
    if !support::needs_root("keeping the capability to bind low ports") {
        return;
    }
    let mut agent = Agent::spawn_ready();
    let pid = agent.child.id();
    // A dedicated address, at which no server of this machine listens.
    let bind = "import socket; s = socket.socket(); s.bind(('127.99.1.2', 81)); print('bound')";
    assert_eq!(status_of(&mut agent, &["python3", "-c", bind]), "bound\n");
    let attacks = format!(
        "kill -9 {pid} 2>/dev/null && echo killed; \
         cat /proc/{pid}/environ 2>/dev/null && echo read; \
         ls /proc/{pid}/fd 2>/dev/null && echo listed; \
         ls -l /proc/{pid}/root 2>/dev/null | grep '>' ; \
         dd if=/proc/{pid}/mem count=1 2>/dev/null && echo dumped; true"
    );
    let running = agent.run_shell(&attacks);
    assert_eq!(agent.wait_for_output(running), "");
}

#[test]
fn workload_inherits_three_descriptors_only() {
    let mut agent = Agent::spawn_ready();
    // A child lists them, without a pipe: the descriptors of both would be in the list.
    let running = agent.run_shell("ls /proc/$$/fd; ulimit -c; ulimit -Sn; umask");
    assert_eq!(agent.wait_for_output(running), "0\n1\n2\n0\n1024\n0022\n");
}

#[test]
fn process_leads_its_own_session() {
    let mut agent = Agent::spawn_ready();
    let running = agent.run_shell("cut -d' ' -f5,6 /proc/$$/stat; echo $$ $$");
    let text = agent.wait_for_output(running);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], lines[1], "process group and session are the process");
}

/// Prints the results of system calls: an errno or `ok`.
const PROBE: &str = "
import ctypes, socket, errno, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(*a):
    ctypes.set_errno(0)
    r = libc.syscall(*[ctypes.c_long(x) for x in a])
    return errno.errorcode.get(ctypes.get_errno(), '?') if r < 0 else 'ok'
X32 = 0x40000000
print('vsock', call(41, 40, 1, 0), call(41, 40, 5, 0), call(41, 40, 2, 0))
print('vsock, upper half set', call(41, 40 | 1 << 32, 1, 0))
print('vsock, x32', call(41 | X32, 40, 1, 0))
print('unix', call(41, 1, 1, 0), 'inet', call(41, 2, 1, 0))
print('absent', *[call(n, 0, 0, 0, 0, 0) for n in (425, 426, 427, 321, 323, 298, 248, 249, 250)])
print('absent, x32', *[call(n | X32, 0, 0, 0, 0, 0) for n in (425, 321, 250)])
";

#[test]
fn workload_cannot_open_vsock() {
    let mut agent = Agent::spawn_ready();
    let text = status_of(&mut agent, &["python3", "-c", PROBE]);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(
        lines,
        [
            "vsock EAFNOSUPPORT EAFNOSUPPORT EAFNOSUPPORT",
            "vsock, upper half set EAFNOSUPPORT",
            "vsock, x32 EAFNOSUPPORT",
            "unix ok inet ok",
            "absent ENOSYS ENOSYS ENOSYS ENOSYS ENOSYS ENOSYS ENOSYS ENOSYS ENOSYS",
            "absent, x32 ENOSYS ENOSYS ENOSYS",
        ]
    );
}

#[test]
fn i386_system_call_ends_the_process() {
    let mut agent = Agent::spawn_ready();
    // mov eax, 20 (getpid of i386); int 0x80; ret
    let probe = "
import ctypes, mmap
m = mmap.mmap(-1, 4096, prot=7)
m.write(bytes([0xb8, 20, 0, 0, 0, 0xcd, 0x80, 0xc3]))
f = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))
print(f())
";
    let running = agent.run_command(&["python3", "-c", probe]);
    // SIGSYS from the filter; SIGSEGV if the kernel has no 32-bit interface.
    assert!(matches!(agent.wait_for_exit(running), Exit::Signal(31 | 11)));
}

#[test]
fn memory_credential_is_not_in_the_environment() {
    let Some(mut agent) = spawn_sandbox() else { return };
    let value = b"s3cret\0with any bytes\xff\n";
    agent.deliver_secret("API_TOKEN", value, Delivery::Memory).unwrap();
    let running = agent.run_shell("cat \"$API_TOKEN_FILE\"");
    assert_eq!(agent.wait_for_exit(running), Exit::Code(0));
    assert_eq!(agent.output.remove(&running.stdout).unwrap(), value);

    // A child that inherits no descriptor reads it, and none can change it.
    let probe = "
import os, errno, subprocess
path = os.environ['API_TOKEN_FILE']
def refused(f, *a):
    try: f(*a)
    except OSError as e: return errno.errorcode[e.errno]
    return 'allowed'
print(path, len(subprocess.run('cat $API_TOKEN_FILE', shell=True, capture_output=True).stdout))
print(refused(os.open, path, os.O_RDWR), refused(os.truncate, path, 0),
      refused(os.chmod, path, 0o777), refused(os.unlink, path), refused(os.rename, path, path + '2'),
      refused(open, os.path.dirname(path) + '/x', 'w'))
print(sorted(os.environ), b's3cret' in open('/proc/self/environ', 'rb').read())
print(*[line.split()[2:4] for line in open('/proc/mounts') if 'credentials' in line])
";
    for _ in 0..2 {
        let text = status_of(&mut agent, &["python3", "-c", probe]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], format!("/run/credentials/API_TOKEN {}", value.len()));
        assert_eq!(lines[1], "EACCES EACCES EPERM EACCES EACCES EACCES");
        assert!(
            lines[2].contains("'API_TOKEN_FILE'") && lines[2].ends_with("False"),
            "{}",
            lines[2]
        );
        assert!(lines[3].starts_with("['tmpfs', 'rw,nosuid,nodev,noexec,"), "{}", lines[3]);
        assert_eq!(lines.len(), 4);
    }
    // A workload of any user can read it.
    let mut start = agent.plain_start(&["sh", "-c", "cat \"$API_TOKEN_FILE\" | wc -c"]);
    (start.uid, start.gid) = (4242, 4242);
    let running = agent.start_process(start);
    assert_eq!(agent.wait_for_output(running).trim(), value.len().to_string());
}

#[test]
fn credential_enters_environment_on_request_only() {
    let Some(mut agent) = spawn_sandbox() else { return };
    agent.deliver_secret("TOKEN", b"s3cret", Delivery::Env).unwrap();
    agent.deliver_secret("OTHER", b"hidden", Delivery::Memory).unwrap();
    let running = agent.run_shell("tr '\\0' '\\n' </proc/self/environ; ls /proc/$$/fd");
    let text = agent.wait_for_output(running);
    assert_eq!(
        text,
        "PATH=/usr/local/bin:/usr/bin:/bin\nTOKEN=s3cret\n\
         OTHER_FILE=/run/credentials/OTHER\n0\n1\n2\n"
    );
    // A later credential replaces it, even with another delivery, and a variable that the host sets
    // does not hide it.
    agent.deliver_secret("OTHER", b"changed", Delivery::Memory).unwrap();
    agent.deliver_secret("TOKEN", b"changed too", Delivery::Memory).unwrap();
    let mut start =
        agent.plain_start(&["sh", "-c", "cat $OTHER_FILE; echo; cat $TOKEN_FILE; echo $TOKEN"]);
    start.env.push((b"OTHER_FILE".to_vec(), b"/etc/passwd".to_vec()));
    let running = agent.start_process(start);
    assert_eq!(agent.wait_for_output(running), "changed\nchanged too\n");
}

#[test]
fn open_credential_is_rotated_and_revoked() {
    let Some(mut agent) = spawn_sandbox() else { return };
    agent.deliver_secret("A", b"the first", Delivery::Memory).unwrap();
    agent.deliver_secret("B", b"1", Delivery::Env).unwrap();
    // Reads the credential again for each line of input, by path and by an open descriptor.
    let script = "import os, sys
opened = open(os.environ['A_FILE'])
for line in sys.stdin:
    opened.seek(0)
    by_path = open(os.environ['A_FILE']).read()
    print(by_path if by_path == opened.read() else 'they differ', os.environ['B'], sep='|', flush=True)
";
    let running = agent.run_command(&["python3", "-c", script]);
    let next = |agent: &mut Agent| {
        let stdin = running.stdin.unwrap();
        assert_eq!(agent.connection.send_data(stdin, b"\n"), 1);
        agent.wait_until(|agent| {
            agent.output.get(&running.stdout).is_some_and(|text| text.ends_with(b"\n"))
        });
        agent.take_text(running.stdout)
    };
    assert_eq!(next(&mut agent), "the first|1\n");
    agent.deliver_secret("A", b"another", Delivery::Memory).unwrap();
    agent.deliver_secret("B", b"2", Delivery::Env).unwrap();
    // The environment of a running process does not change.
    assert_eq!(next(&mut agent), "another|1\n");
    for name in ["A", "B", "NEVER_THERE"] {
        agent.revoke_secret(name).unwrap();
    }
    assert_eq!(next(&mut agent), "|1\n");
    let later = agent.run_shell("env | grep -c -e '^A_FILE' -e '^B='; ls /proc/$$/fd");
    assert_eq!(agent.wait_for_output(later), "0\n0\n1\n2\n");
    agent.deliver_secret("A", b"again", Delivery::Memory).unwrap();
    assert_eq!(next(&mut agent), "again|1\n");
}

#[test]
fn credential_names_and_sizes_are_validated() {
    let Some(mut agent) = spawn_sandbox() else { return };
    for name in ["", "1A", "A=B", "A-B", &"A".repeat(129)] {
        let failure = agent.deliver_secret(name, b"x", Delivery::Memory).unwrap_err();
        assert!(!failure.to_string().contains('\n'), "{failure}");
    }
    agent.deliver_secret("BIG", &[b'x'; MAX_SECRET], Delivery::Memory).unwrap();
    assert!(agent.deliver_secret("BIGGER", &[b'x'; MAX_SECRET + 1], Delivery::Memory).is_err());
    assert!(agent.deliver_secret("NUL", b"a\0b", Delivery::Env).is_err());
    for number in 1..64 {
        agent.deliver_secret(&format!("N{number}"), b"x", Delivery::Memory).unwrap();
    }
    assert!(agent.deliver_secret("ONE_MORE", b"x", Delivery::Memory).is_err());
    let running = agent.run_shell("wc -c <$BIG_FILE; ls /run/credentials | wc -l");
    assert_eq!(agent.wait_for_output(running), "65536\n64\n");
}

#[test]
fn standard_streams_can_be_opened_by_path() {
    let Some(mut agent) = spawn_sandbox() else { return };
    let script = "cat /dev/stdin; echo out > /dev/stdout; echo err > /dev/stderr; \
                  stat -Lc %u:%g:%a /dev/stdin /dev/stdout /dev/stderr";
    let running = agent.run_shell(script);
    let stdin = running.stdin.unwrap();
    assert_eq!(agent.connection.send_data(stdin, b"in\n"), 3);
    agent.connection.end_stream(stdin);
    let owned = "1000:1000:600\n".repeat(3);
    assert_eq!(agent.wait_for_exit(running), Exit::Code(0));
    let has_ended = |agent: &Agent, stream| agent.ended.contains(&stream);
    agent.wait_until(|agent| has_ended(agent, running.stdout) && has_ended(agent, running.stderr));
    assert_eq!(agent.take_text(running.stdout), format!("in\nout\n{owned}"));
    assert_eq!(agent.take_text(running.stderr), "err\n");
}

#[test]
fn names_resolve_with_address_configuration() {
    let Some(mut agent) = spawn_sandbox() else { return };
    let probe = "
import socket
found = socket.getaddrinfo('localhost', 1, socket.AF_INET, socket.SOCK_STREAM, 0,
                           socket.AI_ADDRCONFIG)
print(found[0][4], [name for _, name in socket.if_nameindex()])
";
    let text = status_of(&mut agent, &["python3", "-c", probe]);
    assert_eq!(text, "('127.0.0.1', 1) ['lo']\n");
}

#[test]
fn agent_proc_files_hold_no_credential() {
    let mut agent = Agent::spawn_ready();
    agent.deliver_secret("TOKEN", b"canary-4711", Delivery::Env).unwrap();
    let pid = agent.child.id();
    for file in ["environ", "cmdline", "maps"] {
        // An unreadable file passes as well: the agent is not dumpable.
        let text = std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
        assert!(!text.windows(11).any(|window| window == b"canary-4711"), "{file}");
    }
}

/// Prints the error of each way to create or enter a namespace, and what must still work.
const NAMESPACES: &str = r#"
import ctypes, errno, os, subprocess, threading
libc = ctypes.CDLL(None, use_errno=True)
def name(result):
    return 'succeeded' if result >= 0 else errno.errorcode[ctypes.get_errno()]
UNSHARE, CLONE, SETNS, CLONE3 = 272, 56, 308, 435
SIGCHLD = 17
for flag in [0x80, 0x20000] + [1 << bit for bit in range(25, 31)]:
    print('unshare', hex(flag), name(libc.syscall(UNSHARE, flag)))
for flag in [0x20000] + [1 << bit for bit in range(25, 31)]:
    result = libc.syscall(CLONE, flag | SIGCHLD, 0, 0, 0, 0)
    if result == 0:
        os._exit(0)
    print('clone', hex(flag), name(result))
print('setns', name(libc.syscall(SETNS, os.open('/proc/self/ns/user', os.O_RDONLY), 0)))
print('clone3', name(libc.syscall(CLONE3, 0, 0)))
print('unshare files', name(libc.syscall(UNSHARE, 0x400)))
thread = threading.Thread(target=lambda: print('thread ran'))
thread.start()
thread.join()
subprocess.run(['echo', 'program ran'])
"#;

#[test]
fn namespaces_are_refused() {
    let mut agent = Agent::spawn_ready();
    let output = status_of(&mut agent, &["python3", "-uc", NAMESPACES]);
    let mut lines = output.lines();
    let refused: Vec<&str> = lines.by_ref().take(16).collect();
    assert_eq!(refused.len(), 16, "{output}");
    assert!(refused.iter().all(|line| line.ends_with(" EPERM")), "{output}");
    let rest: Vec<&str> = lines.collect();
    let expected = ["clone3 ENOSYS", "unshare files succeeded", "thread ran", "program ran"];
    assert_eq!(rest, expected);
}
