//! The isolation of a workload. `chitin audit` attacks the same boundaries harder.

use chitin_integration::{TierUnderTest, write_file};
use rustix::process::Signal;

on_every_tier!(
    workload_runs_as_unprivileged_user,
    only_loopback_network_exists,
    loopback_works_including_low_ports,
    host_name_and_loopback_names_resolve,
    agent_channel_is_inaccessible_to_workload,
    agent_is_inaccessible_to_workload,
    workload_cannot_gain_privileges,
    only_scratch_directories_are_writable,
    concurrent_runs_are_isolated,
    host_files_are_absent_from_sandbox,
);

fn workload_runs_as_unprivileged_user(tier: TierUnderTest) {
    let script = "id -u; id -g; id -G; \
                  grep -E '^(CapInh|CapPrm|CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/self/status | \
                  tr -d '\\t'";
    let outcome = tier.run_sh(script).outcome();
    let lines: Vec<&str> = outcome.assert_success().lines().collect();
    assert_eq!(lines[..3], ["1000", "1000", "1000"]);
    for line in &lines[3..] {
        let (name, value) = line.split_once(':').expect("NAME:VALUE");
        match name {
            // gVisor enforces it without listing it.
            "NoNewPrivs" => assert_eq!(value, "1"),
            "Seccomp" => assert_eq!(value, "2"),
            // No capability, or CAP_NET_BIND_SERVICE alone.
            _ => assert!(["0000000000000000", "0000000000000400"].contains(&value), "{line}"),
        }
    }
    assert!(lines.len() >= 8, "{lines:?}");
}

fn only_loopback_network_exists(tier: TierUnderTest) {
    let program = "import errno, socket
print([name for _, name in socket.if_nameindex()])
for address in ['192.0.2.1', '169.254.169.254', '10.0.0.1', '172.17.0.1']:
    try: socket.create_connection((address, 80), timeout=5)
    except OSError as e:
        print('none' if e.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH) else e)";
    assert_eq!(
        tier.run_python(program).outcome().assert_success(),
        "['lo']\nnone\nnone\nnone\nnone"
    );
}

fn loopback_works_including_low_ports(tier: TierUnderTest) {
    let program = "import socket
for port in 8080, 80:
    s = socket.create_server(('127.0.0.1', port))
    c = socket.create_connection(('127.0.0.1', port))
    a, _ = s.accept()
    a.sendall(b'heard')
    print(c.recv(5).decode())";
    assert_eq!(tier.run_python(program).outcome().assert_success(), "heard\nheard");
}

fn host_name_and_loopback_names_resolve(tier: TierUnderTest) {
    let program = "import socket
print(socket.gethostbyname(socket.gethostname()))
for name in socket.gethostname(), 'localhost':
    found = socket.getaddrinfo(name, 80, socket.AF_INET, socket.SOCK_STREAM, 0, socket.AI_ADDRCONFIG)
    print(found[0][4])";
    assert_eq!(
        tier.run_python(program).outcome().assert_success(),
        "127.0.0.1\n('127.0.0.1', 80)\n('127.0.0.1', 80)"
    );
}

fn agent_channel_is_inaccessible_to_workload(tier: TierUnderTest) {
    let program = "import os, socket
try: socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
except OSError as e: print('refused')
# The fourth is the directory itself.
print(len(os.listdir('/proc/self/fd')))";
    assert_eq!(tier.run_python(program).outcome().assert_success(), "refused\n4");
}

fn agent_is_inaccessible_to_workload(tier: TierUnderTest) {
    let program = "import os
def tried(what, f, *a):
    try: f(*a); print(what)
    except OSError: pass
tried('killed', os.kill, 1, 9)
tried('memory', open, '/proc/1/mem', 'r+b')
try: fds = os.listdir('/proc/1/fd')
except OSError: fds = []
# gVisor lists them. /dev/null is shared, and the pipes of this process are its own; the channel is a
# socket, which cannot be opened.
own = ['/dev/null'] + [os.readlink('/proc/self/fd/%d' % fd) for fd in (0, 1, 2)]
for fd in ['/proc/1/fd/' + fd for fd in fds]:
    if os.readlink(fd) not in own:
        tried(fd, os.open, fd, os.O_RDONLY | os.O_NONBLOCK)
        tried(fd, os.open, fd, os.O_WRONLY | os.O_NONBLOCK)
# The workload may signal no process, or the idle one that would become its next process.
try: os.kill(-1, 9)
except OSError: pass
print('alive')";
    assert_eq!(tier.run_python(program).outcome().assert_success(), "alive");
}

fn workload_cannot_gain_privileges(tier: TierUnderTest) {
    // gVisor permits the creation of a device node, which has no device behind it.
    let script = "mount -t tmpfs none /mnt 2>/dev/null && echo mounted; \
                  for device in 'c 1 1' 'c 1 2' 'b 254 0' 'b 259 0'; do \
                    mknod /tmp/m $device 2>/dev/null && head -c 1 /tmp/m 2>/dev/null | \
                      grep -qz '' && echo $device; rm -f /tmp/m; done; \
                  chroot / true 2>/dev/null && echo chroot; \
                  unshare --net true 2>/dev/null && echo unshare; \
                  cat /dev/mem /dev/kmsg /dev/vda /dev/pmem0 /proc/kcore 2>/dev/null | head -c 1; \
                  (echo b > /proc/sysrq-trigger) 2>/dev/null && echo sysrq; echo held";
    assert_eq!(tier.run_sh(script).outcome().assert_success(), "held");
}

fn only_scratch_directories_are_writable(tier: TierUnderTest) {
    let script = "for d in / /usr /etc /proc /sys /dev /run /var /root; do \
                    (echo > $d/x) 2>/dev/null && echo $d is writable; done; \
                  for d in /work /tmp /var/tmp /dev/shm; do echo $d > $d/x; cat $d/x; done";
    assert_eq!(tier.run_sh(script).outcome().assert_success(), "/work\n/tmp\n/var/tmp\n/dev/shm");
}

fn concurrent_runs_are_isolated(tier: TierUnderTest) {
    let mut first = tier
        .run_sh(
            "echo mine > /work/f; echo mine > /tmp/f; echo mine > /dev/shm/f; echo up; sleep 600",
        )
        .spawn();
    assert_eq!(first.read_line(), "up");
    let program = "import os
print([os.path.exists(d + '/f') for d in ('/work', '/tmp', '/dev/shm')])
others = [p for p in os.listdir('/proc') if p.isdigit() and int(p) != os.getpid()]
print([p for p in others if b'mine' in open('/proc/' + p + '/cmdline', 'rb').read()])";
    assert_eq!(tier.run_python(program).outcome().assert_success(), "[False, False, False]\n[]");
    first.send_signal(Signal::INT);
    first.wait();
    first.assert_no_process_left();
}

fn host_files_are_absent_from_sandbox(tier: TierUnderTest) {
    let dir = tempfile::tempdir().expect("create a directory");
    let marked = write_file(dir.path(), "marked", "of the host").expect("write a file");
    let program = "import os, sys
paths = '/run/docker.sock', '/var/run/docker.sock', '/run/chitin'
print(os.path.exists(sys.argv[1]), [p for p in paths if os.path.exists(p)])";
    assert_eq!(tier.run_python(program).arg(marked).outcome().assert_success(), "False []");
}
