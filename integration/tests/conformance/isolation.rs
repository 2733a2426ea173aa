//! What a workload finds inside, and what it does not. `chitin audit` attacks the same walls harder.

use chitin_integration::On;
use rustix::process::Signal;

on_every_tier!(
    the_workload_is_nobody_in_particular,
    there_is_no_network_but_loopback,
    loopback_works_and_low_ports_can_be_had,
    the_channel_is_out_of_reach,
    the_agent_cannot_be_touched,
    privileges_cannot_be_gained,
    only_scratch_is_writable,
    runs_do_not_see_each_other,
    the_host_is_not_in_it,
);

fn the_workload_is_nobody_in_particular(on: On) {
    let script = "id -u; id -g; id -G; \
                  grep -E '^(CapInh|CapPrm|CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/self/status | tr -d '\\t'";
    let outcome = on.sh(script).outcome();
    let lines: Vec<&str> = outcome.ok().lines().collect();
    assert_eq!(lines[..3], ["1000", "1000", "1000"]);
    for line in &lines[3..] {
        let (name, value) = line.split_once(':').expect("NAME:VALUE");
        match name {
            // gVisor keeps it and does not list it.
            "NoNewPrivs" => assert_eq!(value, "1"),
            "Seccomp" => assert_eq!(value, "2"),
            // Nothing, or the right to bind ports below 1024.
            _ => assert!(["0000000000000000", "0000000000000400"].contains(&value), "{line}"),
        }
    }
    assert!(lines.len() >= 8, "{lines:?}");
}

fn there_is_no_network_but_loopback(on: On) {
    let program = "import errno, socket
print([name for _, name in socket.if_nameindex()])
for address in ['192.0.2.1', '169.254.169.254', '10.0.0.1', '172.17.0.1']:
    try: socket.create_connection((address, 80), timeout=5)
    except OSError as e: print('none' if e.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH) else e)";
    assert_eq!(on.python(program).outcome().ok(), "['lo']\nnone\nnone\nnone\nnone");
}

fn loopback_works_and_low_ports_can_be_had(on: On) {
    let program = "import socket
for port in 8080, 80:
    s = socket.create_server(('127.0.0.1', port))
    c = socket.create_connection(('127.0.0.1', port))
    a, _ = s.accept()
    a.sendall(b'heard')
    print(c.recv(5).decode())";
    assert_eq!(on.python(program).outcome().ok(), "heard\nheard");
}

fn the_channel_is_out_of_reach(on: On) {
    let program = "import os, socket
try: socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
except OSError as e: print('refused')
# The fourth is the directory itself.
print(len(os.listdir('/proc/self/fd')))";
    assert_eq!(on.python(program).outcome().ok(), "refused\n4");
}

fn the_agent_cannot_be_touched(on: On) {
    let program = "import os
def tried(what, f, *a):
    try: f(*a); print(what)
    except OSError: pass
tried('killed', os.kill, 1, 9)
tried('memory', open, '/proc/1/mem', 'r+b')
try: fds = os.listdir('/proc/1/fd')
except OSError: fds = []
for fd in ['/proc/1/fd/' + fd for fd in fds]:
    # gVisor lists them. The device is the same for everybody; the channel is a socket, and no socket can be opened.
    if os.readlink(fd) != '/dev/null':
        tried(fd, os.open, fd, os.O_RDONLY | os.O_NONBLOCK)
        tried(fd, os.open, fd, os.O_WRONLY | os.O_NONBLOCK)
# All that it may kill, which is nothing, or what waits to become its next process.
try: os.kill(-1, 9)
except OSError: pass
print('alive')";
    assert_eq!(on.python(program).outcome().ok(), "alive");
}

fn privileges_cannot_be_gained(on: On) {
    // gVisor lets a node of a device be made, which leads nowhere.
    let script = "mount -t tmpfs none /mnt 2>/dev/null && echo mounted; \
                  for device in 'c 1 1' 'c 1 2' 'b 254 0' 'b 259 0'; do \
                    mknod /tmp/m $device 2>/dev/null && head -c 1 /tmp/m 2>/dev/null | grep -qz '' && echo $device; rm -f /tmp/m; done; \
                  chroot / true 2>/dev/null && echo chroot; \
                  unshare --net true 2>/dev/null && echo unshare; \
                  cat /dev/mem /dev/kmsg /dev/vda /dev/pmem0 /proc/kcore 2>/dev/null | head -c 1; \
                  (echo b > /proc/sysrq-trigger) 2>/dev/null && echo sysrq; echo held";
    assert_eq!(on.sh(script).outcome().ok(), "held");
}

fn only_scratch_is_writable(on: On) {
    let script = "for d in / /usr /etc /proc /sys /dev /run /var /root; do \
                    (echo > $d/x) 2>/dev/null && echo $d is writable; done; \
                  for d in /work /tmp /var/tmp /dev/shm; do echo $d > $d/x; cat $d/x; done";
    assert_eq!(on.sh(script).outcome().ok(), "/work\n/tmp\n/var/tmp\n/dev/shm");
}

fn runs_do_not_see_each_other(on: On) {
    let mut first = on
        .sh("echo mine > /work/f; echo mine > /tmp/f; echo mine > /dev/shm/f; echo up; sleep 600")
        .spawn();
    assert_eq!(first.line(), "up");
    let program = "import os
print([os.path.exists(d + '/f') for d in ('/work', '/tmp', '/dev/shm')])
others = [p for p in os.listdir('/proc') if p.isdigit() and int(p) != os.getpid()]
print([p for p in others if b'mine' in open('/proc/' + p + '/cmdline', 'rb').read()])";
    assert_eq!(on.python(program).outcome().ok(), "[False, False, False]\n[]");
    first.signal(Signal::INT);
    first.wait();
    first.assert_nothing_left();
}

fn the_host_is_not_in_it(on: On) {
    let dir = tempfile::tempdir().expect("create a directory");
    let marked =
        chitin_integration::file(dir.path(), "marked", "of the host").expect("write a file");
    let program = "import os, sys
print(os.path.exists(sys.argv[1]), [p for p in ('/run/docker.sock', '/var/run/docker.sock', '/run/chitin') if os.path.exists(p)])";
    assert_eq!(on.python(program).arg(marked).outcome().ok(), "False []");
}
