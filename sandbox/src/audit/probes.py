"""Attacks on a sandbox from inside, run there by `chitin audit`.

    python3 - PROPERTY < probes.py        with the context as JSON in CHITIN_AUDIT

Prints one line of JSON: a list of [what was tried, whether it succeeded, what was seen]. Nothing here relies on a tool that the
root image might lack, and no attack that succeeds does lasting harm.
"""

import ctypes
import errno
import hashlib
import json
import os
import re
import resource
import signal
import socket
import sys
import time

CONTEXT = json.loads(os.environ["CHITIN_AUDIT"])
LIBC = ctypes.CDLL(None, use_errno=True)
SECONDS = 2


def syscall(number, *arguments):
    """Returns the result and the name of the error, "" without one."""
    ctypes.set_errno(0)
    LIBC.syscall.restype = ctypes.c_long
    converted = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = LIBC.syscall(ctypes.c_long(number), *converted)
    return result, errno.errorcode.get(ctypes.get_errno(), "") if result < 0 else ""


def attempt(what, attack):
    """An attack that succeeds if it raises no OSError; what it returns is the evidence."""
    try:
        return [what, True, str(attack())]
    except OSError as error:
        return [what, False, errno.errorcode.get(error.errno, str(error)) if error.errno else str(error)]


def refused(what, number, *arguments):
    """A system call that is not to be had at all: an error that only its own code returns means that it ran."""
    result, error = syscall(number, *arguments)
    refusals = ["ENOSYS", "EPERM", "EACCES", "EAFNOSUPPORT"]
    if CONTEXT.get("boundary") == "gvisor":
        # What gVisor says of some of those that it does not have.
        refusals.append("ENOTSUP")
    return [what, error not in refusals, error or f"returned {result}"]


def written(path):
    def attack():
        # Neither created nor truncated: opening it is enough.
        os.close(os.open(path, os.O_WRONLY))
        return "opened for writing"

    return attempt(f"open {path} for writing", attack)


def host_files():
    name = CONTEXT["host_file"]
    places = [name, "/proc/1/root" + name, "/proc/self/root/../../../../.." + name, "/proc/1/cwd/../../../.." + name]
    tried = [attempt(f"read {place}", lambda place=place: open(place).read(64)) for place in places]
    found = []
    for directory, directories, names in os.walk("/"):
        directories[:] = [d for d in directories if os.path.join(directory, d) not in ("/proc", "/sys")]
        found += [os.path.join(directory, n) for n in names if n == os.path.basename(name)]
    return tried + [["look for it everywhere", bool(found), ", ".join(found) or "not found"]]


def processes():
    pids = [pid for pid in os.listdir("/proc") if pid.isdigit()]
    lines = []
    for pid in pids:
        try:
            lines.append(open(f"/proc/{pid}/cmdline", "rb").read().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            pass
    seen = [line for line in lines if CONTEXT["host_process"] in line]
    return [["find the host's processes in /proc", bool(seen), ", ".join(seen) or f"{len(pids)} processes, all inside"]]


def connect(address, port):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as stream:
        stream.settimeout(SECONDS)
        stream.connect((address, port))
        return "connected"


def network():
    tried = []
    for address, port in CONTEXT["host_listeners"]:
        tried.append(attempt(f"connect to {address} port {port}", lambda: connect(address, port)))
    for address in ["1.1.1.1", "2606:4700:4700::1111"]:
        tried.append(attempt(f"connect to {address}", lambda: connect(address, 443)))

    def datagram():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            return f"{sender.sendto(b'x', ('1.1.1.1', 53))} bytes sent"

    tried.append(attempt("send a datagram to 1.1.1.1", datagram))
    for what, family, kind, protocol in [("raw", socket.AF_INET, socket.SOCK_RAW, 1), ("packet", 17, socket.SOCK_RAW, 0x300)]:
        tried.append(attempt(f"open a {what} socket", lambda: socket.socket(family, kind, protocol).fileno()))
    try:
        names = [name for _, name in socket.if_nameindex()]
    except OSError:
        names = ["lo"]
    up = [name for name in names if name != "lo"]
    # Tunnels that a kernel makes by itself in every network namespace lead nowhere: they have no route.
    usable = [name for name in up if not re.fullmatch(r"(sit|tunl|ip6tnl|gre|gretap|erspan|ip_vti|ip6_vti|ip6gre)\d", name)]
    return tried + [["find an interface but the loopback", bool(usable), ", ".join(usable) or "none"]]


def metadata():
    return [attempt(f"connect to {address}", lambda: connect(address, 80)) for address in ["169.254.169.254", "fd00:ec2::254"]]


def neighbours():
    tried = [attempt("connect to its TCP port", lambda: connect("127.0.0.1", CONTEXT["neighbour_port"]))]

    def abstract():
        with socket.socket(socket.AF_UNIX) as stream:
            stream.connect("\0" + CONTEXT["neighbour_name"])
            return "connected"

    tried.append(attempt("connect to its abstract socket", abstract))
    for directory in ["/tmp", "/work", "/dev/shm", "/var/tmp"]:
        path = os.path.join(directory, CONTEXT["neighbour_name"])
        tried.append(attempt(f"read its {path}", lambda: open(path).read(64)))
    LIBC.shmget.restype = ctypes.c_int
    found = LIBC.shmget(CONTEXT["neighbour_key"], 4096, 0)
    tried.append(["attach its shared memory", found >= 0, errno.errorcode.get(ctypes.get_errno(), "") if found < 0 else "found"])
    return tried


def capabilities():
    status = dict(line.split(":\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\t" in line)
    beyond = int(status.get("CapEff", "0"), 16) & ~(1 << 10)
    tried = [["have more than the right to bind low ports", bool(beyond), "CapEff " + status.get("CapEff", "?").strip()]]
    privileges = status.get("NoNewPrivs", "1").strip()
    tried.append(["gain rights by executing a file", privileges == "0", f"NoNewPrivs {privileges}"])
    tried.append(attempt("become root", lambda: os.setuid(0)))
    tried.append(attempt("join the group root", lambda: os.setgid(0)))
    tried.append(attempt("leave the groups", lambda: os.setgroups([0])))
    # capset(2): version 3, this thread, everything.
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    everything = (ctypes.c_uint32 * 6)(*[0xFFFFFFFF] * 6)
    result, error = syscall(126, header, everything)
    return tried + [["take every capability", result == 0, error or "taken"]]


def mounts():
    tmpfs, target = b"tmpfs", b"/tmp"

    def mounted():
        return syscall(165, tmpfs, target, tmpfs, 0, None)

    result, error = mounted()
    tried = [["mount a tmpfs", result == 0, error or "mounted"]]
    for what, number, arguments in [
        ("unmount /work", 166, (b"/work", 2)),
        ("change the root", 161, (b"/tmp",)),
        ("pivot the root", 155, (b"/tmp", b"/tmp")),
        ("detach a mount (open_tree)", 428, (-100, b"/", 1)),
    ]:
        result, error = syscall(number, *arguments)
        tried.append([what, result >= 0, error or "done"])
    child = os.fork()
    if child == 0:
        # New user and mount namespaces, and then as their root.
        result, _ = syscall(272, 0x10000000 | 0x00020000)
        os._exit(0 if result == 0 and mounted()[0] == 0 else 1)
    _, status = os.waitpid(child, 0)
    return tried + [["mount as root of namespaces of its own", status == 0, "mounted" if status == 0 else "refused"]]


def modules():
    tried = [
        refused("load a module (init_module)", 175, b"", 0, b""),
        refused("load a module (finit_module)", 313, 0, b"", 0),
        refused("remove a module", 176, b"x", 0),
        refused("load another kernel", 246, 0, 0, None, 0),
    ]
    for path in ["/dev/mem", "/dev/kmem", "/dev/port"]:
        tried.append(attempt(f"open {path}", lambda: os.open(path, os.O_RDONLY)))
    return tried


def agent():
    tried = []
    for what, number, arguments in [
        ("attach to the agent (PTRACE_ATTACH)", 101, (16, 1, 0, 0)),
        ("attach to the agent (PTRACE_SEIZE)", 101, (0x4206, 1, 0, 0)),
        ("kill the agent", 62, (1, 9)),
    ]:
        result, error = syscall(number, *arguments)
        # A signal that nobody handles is dropped where the target is PID 1, without an error.
        tried.append([what, result == 0 and number != 62, error or "no effect"])
    tried.append(attempt("read /proc/1/mem", lambda: len(open("/proc/1/mem", "rb").read(1) or "x")))
    opened, count = [], 0
    # Its numbers are small, also where they are not listed.
    for path in [f"/proc/1/fd/{number}" for number in range(64)]:
        for flags in [os.O_RDONLY, os.O_WRONLY]:
            try:
                file = os.open(path, flags | os.O_NONBLOCK)
            except OSError:
                count += 1
                continue
            if not os.path.samestat(os.fstat(file), os.stat("/dev/null")):
                opened.append(path)
            os.close(file)
    return tried + [["open a file of the agent", bool(opened), ", ".join(opened) or f"{count} refused"]]


def outlines():
    tried = [
        attempt(f"read {path}", lambda: len(open(path, "rb").read(1) or "x"))
        for path in ["/proc/1/environ", "/proc/1/maps", "/proc/1/auxv"]
    ]
    return tried + [attempt("list the agent's files", lambda: os.listdir("/proc/1/fd"))]


def vsock():
    tried = [attempt(f"open a vsock socket ({name})", lambda: socket.socket(40, kind).fileno()) for name, kind in [("stream", 1), ("datagram", 2)]]
    return tried + [attempt("open /dev/vsock", lambda: os.open("/dev/vsock", os.O_RDWR))]


def root():
    def create(path):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        os.unlink(path)
        return "created"

    tried = [attempt(f"create {path}", lambda: create(path)) for path in ["/chitin-audit", "/usr/bin/chitin-audit", "/etc/chitin-audit"]]
    tried += [written(path) for path in ["/etc/passwd", "/usr/bin/python3.11", "/init", "/etc/resolv.conf"]]
    tried.append(attempt("change the mode of /etc/passwd", lambda: os.chmod("/etc/passwd", 0o666)))
    result, error = syscall(165, None, b"/", None, 32, None)
    return tried + [["mount the root anew for writing", result == 0, error or "done"]]


def memory():
    pieces, mib = [], 0
    # The limit may be met by a signal: say before what is being done.
    print(json.dumps([["take all memory", False, "killed"]]), flush=True)
    try:
        while mib < CONTEXT["memory_mib"] * 4:
            pieces.append(bytearray(os.urandom(1 << 12) * 256 * 8))
            mib += 8
    except MemoryError:
        pieces.clear()
        return [["take all memory", False, f"refused after {mib} MiB"]]
    return [["take all memory", True, f"{mib} MiB taken, of {CONTEXT['memory_mib']}"]]


def pids():
    children, error, most = [], "", 1 << 15
    # The limit may be met by a signal, or by all of the sandbox.
    print(json.dumps([["fork without end", False, "killed"]]), flush=True)
    try:
        while len(children) < most:
            pid = os.fork()
            if pid == 0:
                signal.pause()
                os._exit(0)
            children.append(pid)
    except OSError as failure:
        error = errno.errorcode.get(failure.errno, "?")
    for pid in children:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    return [["fork without end", not error, f"{len(children)} processes, then {error or 'no refusal'}"]]


def disk():
    path, piece, mib, error = "/tmp/chitin-audit", b"x" * (1 << 20), 0, ""
    print(json.dumps([["fill the disk", False, "killed"]]), flush=True)
    try:
        with open(path, "wb", buffering=0) as file:
            while mib < CONTEXT["memory_mib"] * 4:
                file.write(piece)
                mib += 1
    except OSError as failure:
        error = errno.errorcode.get(failure.errno, "?")
    try:
        os.unlink(path)
    except OSError:
        pass
    return [["fill the disk", not error, f"{mib} MiB, then {error or 'no refusal'}"]]


def credentials():
    pattern, wanted, found, looked = re.compile(rb"chitin-canary-[0-9a-f]{32}"), CONTEXT["canary_sha256"], [], 0

    def search(path):
        nonlocal looked
        try:
            with open(path, "rb") as file:
                content = file.read(1 << 22)
        except (OSError, ValueError):
            return
        looked += 1
        if any(hashlib.sha256(match).hexdigest() == wanted for match in pattern.findall(content)):
            found.append(path)

    for pid in [pid for pid in os.listdir("/proc") if pid.isdigit()] + ["self"]:
        for name in ["environ", "cmdline"]:
            search(f"/proc/{pid}/{name}")
        try:
            for number in os.listdir(f"/proc/{pid}/fd"):
                path = f"/proc/{pid}/fd/{number}"
                # A pipe would be waited for.
                if os.path.isfile(path):
                    search(path)
        except OSError:
            pass
    for top in ["/tmp", "/work", "/dev/shm", "/run", "/var", "/home", "/root", "/mnt"]:
        for directory, _, names in os.walk(top):
            for name in names:
                path = os.path.join(directory, name)
                if os.path.isfile(path):
                    search(path)
    return [["find another sandbox's credential", bool(found), ", ".join(found) or f"not in {looked} files"]]


def kernel_files():
    tried = [
        written(path)
        for path in [
            "/proc/sys/kernel/core_pattern",
            "/proc/sys/kernel/modprobe",
            "/proc/sys/kernel/randomize_va_space",
            "/proc/sys/vm/drop_caches",
            "/proc/sysrq-trigger",
            "/sys/kernel/uevent_helper",
            "/sys/kernel/mm/transparent_hugepage/enabled",
            "/proc/1/exe",
            "/proc/1/oom_score_adj",
            "/sys/fs/cgroup/cgroup.procs",
            "/sys/fs/cgroup/release_agent",
            "/sys/fs/cgroup/memory/release_agent",
        ]
    ]
    for path in ["/proc/kcore", "/dev/kmsg", "/proc/kmsg"]:
        tried.append(attempt(f"read {path}", lambda: os.read(os.open(path, os.O_RDONLY | os.O_NONBLOCK), 1)))
    return tried


def syscalls():
    return [
        refused("bpf", 321, 0, None, 0),
        refused("perf_event_open", 298, None, 0, -1, -1, 0),
        refused("userfaultfd", 323, 0x7FFFFFFF),
        refused("io_uring_setup", 425, 0, None),
        refused("add_key", 248, None, None, None, 0, 0),
        refused("request_key", 249, None, None, None, 0),
        refused("keyctl", 250, 99, 0, 0, 0, 0),
        refused("open_by_handle_at", 304, -100, (ctypes.c_uint32 * 4)(8, 1, 0, 0), 0),
        refused("kexec_file_load", 320, -1, -1, 0, None, 0),
        refused("reboot", 169, 0, 0, 0, None),
        refused("swapon", 167, None, 0),
        refused("clock_settime", 227, 0, (ctypes.c_long * 2)(int(time.time()), 0)),
        refused("sethostname", 170, b"x", 1),
        refused("iopl", 172, 3),
        refused("acct", 163, None),
    ]


def host_kernel():
    own, hosts = os.uname(), CONTEXT["host_kernel"]
    seen = [where for where, text in [("uname", own.release), ("/proc/version", open("/proc/version").read())] if hosts in text]
    return [["learn the version of the host's kernel", bool(seen), f"{own.sysname} {own.release}"]]


def neighbour():
    """The other side of `neighbours`: there to be found, until its standard input ends."""
    listener = socket.create_server(("0.0.0.0", CONTEXT["neighbour_port"]))
    hidden = socket.socket(socket.AF_UNIX)
    hidden.bind("\0" + CONTEXT["neighbour_name"])
    hidden.listen()
    with open("/tmp/" + CONTEXT["neighbour_name"], "w") as file:
        file.write("here")
    LIBC.shmget(CONTEXT["neighbour_key"], 4096, 0o1666)
    print("ready", flush=True)
    signal.pause()
    del listener


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tried = globals()[sys.argv[1]]()
    if tried is not None:
        print(json.dumps(tried), flush=True)
