"""Attacks on a sandbox from inside, run there by `chitin audit`.

    python3 - PROPERTY < probes.py        with the context as JSON in CHITIN_AUDIT

Prints one line of JSON: a list of [operation, success, observation]. No attack relies on a tool
that the root image might lack, and none does lasting harm if it succeeds.
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
CONNECT_SECONDS = 2

# System call numbers of x86_64.
SYS = {
    "clone": 56,
    "kill": 62,
    "ptrace": 101,
    "capset": 126,
    "pivot_root": 155,
    "chroot": 161,
    "acct": 163,
    "mount": 165,
    "umount2": 166,
    "swapon": 167,
    "reboot": 169,
    "sethostname": 170,
    "iopl": 172,
    "init_module": 175,
    "delete_module": 176,
    "clock_settime": 227,
    "kexec_load": 246,
    "add_key": 248,
    "request_key": 249,
    "keyctl": 250,
    "unshare": 272,
    "perf_event_open": 298,
    "open_by_handle_at": 304,
    "setns": 308,
    "finit_module": 313,
    "kexec_file_load": 320,
    "bpf": 321,
    "userfaultfd": 323,
    "io_uring_setup": 425,
    "open_tree": 428,
    "clone3": 435,
}

# Tunnels that a kernel creates in every network namespace. They have no route.
KERNEL_TUNNEL = re.compile(r"(sit|tunl|ip6tnl|gre|gretap|erspan|ip_vti|ip6_vti|ip6gre)\d")


def syscall(name, *arguments):
    """Returns the result and the name of the error, which is empty on success."""
    ctypes.set_errno(0)
    LIBC.syscall.restype = ctypes.c_long
    converted = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = LIBC.syscall(ctypes.c_long(SYS[name]), *converted)
    return result, errno.errorcode.get(ctypes.get_errno(), "") if result < 0 else ""


def attempt(operation, attack):
    """Runs an attack that succeeds if it raises no OSError. Its result is the observation."""
    try:
        return [operation, True, str(attack())]
    except OSError as error:
        name = errno.errorcode.get(error.errno, str(error)) if error.errno else str(error)
        return [operation, False, name]


def attempt_syscall(name, *arguments, operation=None):
    """Makes a system call that must be unavailable.

    An error that only the call's own code returns means that the call was executed.
    """
    result, error = syscall(name, *arguments)
    refusals = ["ENOSYS", "EPERM", "EACCES", "EAFNOSUPPORT"]
    if CONTEXT.get("boundary") == "gvisor":
        # gVisor's error for some of the calls that it does not implement.
        refusals.append("ENOTSUP")
    return [operation or name, error not in refusals, error or f"returned {result}"]


def attempt_write(path):
    def attack():
        # Neither creates nor truncates the file: opening it is sufficient.
        os.close(os.open(path, os.O_WRONLY))
        return "opened for writing"

    return attempt(f"open {path} for writing", attack)


def attempt_connect(operation, address, port):
    def attack():
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as stream:
            stream.settimeout(CONNECT_SECONDS)
            stream.connect((address, port))
            return "connected"

    return attempt(operation, attack)


def announce(operation):
    """Reports an attack that a signal may end, in which case it has failed."""
    print(json.dumps([[operation, False, "killed"]]), flush=True)


def list_pids():
    return [pid for pid in os.listdir("/proc") if pid.isdigit()]


def host_files():
    name = CONTEXT["host_file"]
    paths = [
        name,
        "/proc/1/root" + name,
        "/proc/self/root/../../../../.." + name,
        "/proc/1/cwd/../../../.." + name,
    ]
    tried = [attempt(f"read {path}", lambda path=path: open(path).read(64)) for path in paths]
    found = []
    for directory, directories, names in os.walk("/"):
        if directory == "/":
            directories[:] = [name for name in directories if name not in ("proc", "sys")]
        found += [os.path.join(directory, n) for n in names if n == os.path.basename(name)]
    return tried + [["search the whole tree for it", bool(found), ", ".join(found) or "not found"]]


def host_processes():
    pids = list_pids()
    lines = []
    for pid in pids:
        try:
            line = open(f"/proc/{pid}/cmdline", "rb").read().replace(b"\0", b" ")
            lines.append(line.decode(errors="replace"))
        except OSError:
            pass
    seen = [line for line in lines if CONTEXT["host_process"] in line]
    observation = ", ".join(seen) or f"{len(pids)} processes, all inside"
    return [["find the host's processes in /proc", bool(seen), observation]]


def network():
    tried = []
    for address, port in CONTEXT["host_listeners"]:
        tried.append(attempt_connect(f"connect to {address} port {port}", address, port))
    for address in ["1.1.1.1", "2606:4700:4700::1111"]:
        tried.append(attempt_connect(f"connect to {address}", address, 443))

    def send_datagram():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            return f"{sender.sendto(b'x', ('1.1.1.1', 53))} bytes sent"

    tried.append(attempt("send a datagram to 1.1.1.1", send_datagram))
    for kind, arguments in [
        ("raw", (socket.AF_INET, socket.SOCK_RAW, 1)),
        ("packet", (17, socket.SOCK_RAW, 0x300)),
    ]:
        tried.append(attempt(f"open a {kind} socket", lambda: socket.socket(*arguments).fileno()))
    try:
        names = [name for _, name in socket.if_nameindex()]
    except OSError:
        names = ["lo"]
    usable = [name for name in names if name != "lo" and not KERNEL_TUNNEL.fullmatch(name)]
    observation = ", ".join(usable) or "none"
    return tried + [["find an interface other than the loopback", bool(usable), observation]]


def metadata_service():
    addresses = ["169.254.169.254", "fd00:ec2::254"]
    return [attempt_connect(f"connect to {address}", address, 80) for address in addresses]


def other_sandboxes():
    port, name = CONTEXT["neighbour_port"], CONTEXT["neighbour_name"]
    tried = [attempt_connect("connect to its TCP port", "127.0.0.1", port)]

    def connect_abstract():
        with socket.socket(socket.AF_UNIX) as stream:
            stream.connect("\0" + name)
            return "connected"

    tried.append(attempt("connect to its abstract socket", connect_abstract))
    for directory in ["/tmp", "/work", "/dev/shm", "/var/tmp"]:
        path = os.path.join(directory, name)
        tried.append(attempt(f"read its {path}", lambda: open(path).read(64)))
    LIBC.shmget.restype = ctypes.c_int
    found = LIBC.shmget(CONTEXT["neighbour_key"], 4096, 0)
    observation = "found" if found >= 0 else errno.errorcode.get(ctypes.get_errno(), "")
    return tried + [["attach its shared memory", found >= 0, observation]]


def capabilities():
    lines = open("/proc/self/status").read().splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    # CAP_NET_BIND_SERVICE is bit 10.
    excess = int(status.get("CapEff", "0"), 16) & ~(1 << 10)
    effective = "CapEff " + status.get("CapEff", "?").strip()
    tried = [["have a capability other than to bind low ports", bool(excess), effective]]
    no_new = status.get("NoNewPrivs", "1").strip()
    tried.append(["gain rights by executing a file", no_new == "0", f"NoNewPrivs {no_new}"])
    tried.append(attempt("become root", lambda: os.setuid(0)))
    tried.append(attempt("join the group root", lambda: os.setgid(0)))
    tried.append(attempt("leave the groups", lambda: os.setgroups([0])))
    # capset(2): version 3, this thread, all capabilities.
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    everything = (ctypes.c_uint32 * 6)(*[0xFFFFFFFF] * 6)
    result, error = syscall("capset", header, everything)
    return tried + [["take every capability", result == 0, error or "taken"]]


def mounts():
    def mount_tmpfs():
        return syscall("mount", b"tmpfs", b"/tmp", b"tmpfs", 0, None)

    result, error = mount_tmpfs()
    tried = [["mount a tmpfs", result == 0, error or "mounted"]]
    for operation, name, arguments in [
        ("unmount /work", "umount2", (b"/work", 2)),
        ("change the root", "chroot", (b"/tmp",)),
        ("pivot the root", "pivot_root", (b"/tmp", b"/tmp")),
        ("detach a mount (open_tree)", "open_tree", (-100, b"/", 1)),
    ]:
        result, error = syscall(name, *arguments)
        tried.append([operation, result >= 0, error or "done"])
    child = os.fork()
    if child == 0:
        # New user and mount namespaces, and a mount as their root.
        result, _ = syscall("unshare", 0x10000000 | 0x00020000)
        os._exit(0 if result == 0 and mount_tmpfs()[0] == 0 else 1)
    _, status = os.waitpid(child, 0)
    observation = "mounted" if status == 0 else "refused"
    return tried + [["mount as root of new namespaces", status == 0, observation]]


NEW_NAMESPACES = {
    "time": 0x80,
    "mount": 0x20000,
    "cgroup": 0x2000000,
    "uts": 0x4000000,
    "ipc": 0x8000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "network": 0x40000000,
}


def list_gains():
    """Returns what this process can do that a workload must not."""
    lines = open("/proc/self/status").read().splitlines()
    effective = [line.split()[1] for line in lines if line.startswith("CapEff:")]
    gains = [f"CapEff {caps}" for caps in effective if int(caps, 16) & ~(1 << 10)]
    for name, arguments in [("chroot", (b"/tmp",)), ("sethostname", (b"x", 1))]:
        if syscall(name, *arguments)[0] == 0:
            gains.append(name)
    for name, kind in [("raw", (socket.AF_INET, socket.SOCK_RAW, 1)), ("packet", (17, 3, 0))]:
        try:
            socket.socket(*kind).close()
            gains.append(f"a {name} socket")
        except OSError:
            pass
    return gains


def enter_namespaces(operation, enter):
    """Runs `enter` in a child, which reports what it can do afterwards."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            result, error = enter()
            if result == 0:
                error = ", ".join(["entered"] + list_gains())
            os.write(writer, error.encode())
        except OSError as error:
            os.write(writer, errno.errorcode.get(error.errno, "E?").encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as report:
        seen = report.read()
    os.waitpid(child, 0)
    return [operation, bool(seen) and not seen.startswith("E"), seen or "killed"]


def namespaces():
    tried = []
    user = NEW_NAMESPACES["user"]
    for name, flag in NEW_NAMESPACES.items():
        enter = lambda flag=flag: syscall("unshare", flag)
        tried.append(enter_namespaces(f"create a {name} namespace (unshare)", enter))
    for name in ["mount", "uts", "network", "pid"]:
        enter = lambda flag=NEW_NAMESPACES[name]: syscall("unshare", user | flag)
        tried.append(enter_namespaces(f"create a user and a {name} namespace", enter))
    for name, flag in NEW_NAMESPACES.items():
        if name == "time":
            continue

        def enter(flag=flag):
            result, error = syscall("clone", flag | signal.SIGCHLD, 0, 0, 0, 0)
            # The grandchild reports in place of the child.
            if result > 0:
                os.waitpid(result, 0)
                os._exit(0)
            return result, error

        tried.append(enter_namespaces(f"create a {name} namespace (clone)", enter))

    def enter_with_clone3():
        arguments = (ctypes.c_uint64 * 8)(user, 0, 0, 0, signal.SIGCHLD)
        result, error = syscall("clone3", arguments, 64)
        if result > 0:
            os.waitpid(result, 0)
            os._exit(0)
        return result, error

    tried.append(enter_namespaces("create a user namespace (clone3)", enter_with_clone3))

    def enter_own():
        descriptor = os.open("/proc/self/ns/uts", os.O_RDONLY)
        return syscall("setns", descriptor, 0)

    tried.append(enter_namespaces("enter a namespace (setns)", enter_own))
    gains = list_gains()
    return tried + [["use rights without any of them", bool(gains), ", ".join(gains) or "none"]]


def kernel_modules():
    tried = [
        attempt_syscall("init_module", b"", 0, b"", operation="load a module (init_module)"),
        attempt_syscall("finit_module", 0, b"", 0, operation="load a module (finit_module)"),
        attempt_syscall("delete_module", b"x", 0, operation="remove a module"),
        attempt_syscall("kexec_load", 0, 0, None, 0, operation="load another kernel"),
    ]
    for path in ["/dev/mem", "/dev/kmem", "/dev/port"]:
        tried.append(attempt(f"open {path}", lambda: os.open(path, os.O_RDONLY)))
    return tried


def agent():
    tried = []
    for operation, name, arguments in [
        ("attach to the agent (PTRACE_ATTACH)", "ptrace", (16, 1, 0, 0)),
        ("attach to the agent (PTRACE_SEIZE)", "ptrace", (0x4206, 1, 0, 0)),
        ("kill the agent", "kill", (1, 9)),
    ]:
        result, error = syscall(name, *arguments)
        # kill(2) reports success for PID 1 even if the kernel drops the signal.
        tried.append([operation, result == 0 and name != "kill", error or "no effect"])
    tried.append(attempt("read /proc/1/mem", lambda: len(open("/proc/1/mem", "rb").read(1) or "x")))
    opened, refused = [], 0
    # The pipes of this process are its own, whichever way it opens them.
    own = [os.stat("/dev/null")] + [os.fstat(number) for number in range(3)]
    # The numbers are small, so that they can be tried even if they are not listed.
    for path in [f"/proc/1/fd/{number}" for number in range(64)]:
        for flags in [os.O_RDONLY, os.O_WRONLY]:
            try:
                file = os.open(path, flags | os.O_NONBLOCK)
            except OSError:
                refused += 1
                continue
            if not any(os.path.samestat(os.fstat(file), other) for other in own):
                opened.append(path)
            os.close(file)
    observation = ", ".join(opened) or f"{refused} refused"
    return tried + [["open a file of the agent", bool(opened), observation]]


def agent_mappings():
    tried = [
        attempt(f"read {path}", lambda: len(open(path, "rb").read(1) or "x"))
        for path in ["/proc/1/environ", "/proc/1/maps", "/proc/1/auxv"]
    ]
    return tried + [attempt("list the agent's files", lambda: os.listdir("/proc/1/fd"))]


def vsock():
    tried = [
        attempt(f"open a vsock socket ({name})", lambda: socket.socket(40, kind).fileno())
        for name, kind in [("stream", 1), ("datagram", 2)]
    ]
    return tried + [attempt("open /dev/vsock", lambda: os.open("/dev/vsock", os.O_RDWR))]


def root_file_system():
    def create(path):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        os.unlink(path)
        return "created"

    new = ["/chitin-audit", "/usr/bin/chitin-audit", "/etc/chitin-audit"]
    tried = [attempt(f"create {path}", lambda: create(path)) for path in new]
    existing = ["/etc/passwd", "/usr/bin/python3.11", "/init", "/etc/resolv.conf"]
    tried += [attempt_write(path) for path in existing]
    change_mode = lambda: os.chmod("/etc/passwd", 0o666)
    tried.append(attempt("change the mode of /etc/passwd", change_mode))
    result, error = syscall("mount", None, b"/", None, 32, None)
    return tried + [["remount the root for writing", result == 0, error or "done"]]


def memory():
    pieces, mib = [], 0
    announce("take all memory")
    try:
        while mib < CONTEXT["memory_mib"] * 4:
            pieces.append(bytearray(os.urandom(1 << 12) * 256 * 8))
            mib += 8
    except MemoryError:
        pieces.clear()
        return [["take all memory", False, f"refused after {mib} MiB"]]
    return [["take all memory", True, f"{mib} MiB taken, of {CONTEXT['memory_mib']}"]]


def tasks():
    children, error, most = [], "", CONTEXT["tasks"] * 4
    announce("fork without end")
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
    observation = f"{len(children)} processes, then {error or 'no refusal'}"
    return [["fork without end", not error, observation]]


def disk():
    path, piece, mib, error = "/tmp/chitin-audit", b"x" * (1 << 20), 0, ""
    announce("fill the disk")
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
    pattern = re.compile(rb"chitin-canary-[0-9a-f]{32}")
    found, searched = [], 0

    def is_canary(match):
        return hashlib.sha256(match).hexdigest() == CONTEXT["canary_sha256"]

    def search(path):
        nonlocal searched
        try:
            with open(path, "rb") as file:
                content = file.read(1 << 22)
        except (OSError, ValueError):
            return
        searched += 1
        if any(is_canary(match) for match in pattern.findall(content)):
            found.append(path)

    for pid in list_pids() + ["self"]:
        for name in ["environ", "cmdline"]:
            search(f"/proc/{pid}/{name}")
        try:
            for number in os.listdir(f"/proc/{pid}/fd"):
                path = f"/proc/{pid}/fd/{number}"
                # Reading a pipe would block.
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
    observation = ", ".join(found) or f"not in {searched} files"
    return [["find another sandbox's credential", bool(found), observation]]


def kernel_interfaces():
    tried = [
        attempt_write(path)
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
    flags = os.O_RDONLY | os.O_NONBLOCK
    for path in ["/proc/kcore", "/dev/kmsg", "/proc/kmsg"]:
        tried.append(attempt(f"read {path}", lambda: os.read(os.open(path, flags), 1)))
    return tried


def system_calls():
    return [
        attempt_syscall("bpf", 0, None, 0),
        attempt_syscall("perf_event_open", None, 0, -1, -1, 0),
        attempt_syscall("userfaultfd", 0x7FFFFFFF),
        attempt_syscall("io_uring_setup", 0, None),
        attempt_syscall("add_key", None, None, None, 0, 0),
        attempt_syscall("request_key", None, None, None, 0),
        attempt_syscall("keyctl", 99, 0, 0, 0, 0),
        attempt_syscall("open_by_handle_at", -100, (ctypes.c_uint32 * 4)(8, 1, 0, 0), 0),
        attempt_syscall("kexec_file_load", -1, -1, 0, None, 0),
        attempt_syscall("reboot", 0, 0, 0, None),
        attempt_syscall("swapon", None, 0),
        attempt_syscall("clock_settime", 0, (ctypes.c_long * 2)(int(time.time()), 0)),
        attempt_syscall("sethostname", b"x", 1),
        attempt_syscall("iopl", 3),
        attempt_syscall("acct", None),
    ]


def host_kernel():
    own, host = os.uname(), CONTEXT["host_kernel"]
    texts = [own.release, open("/proc/version").read()]
    is_known = any(host in text for text in texts)
    return [["learn the version of the host's kernel", is_known, f"{own.sysname} {own.release}"]]


def serve_as_neighbour():
    """Offers the targets of `other_sandboxes` until the sandbox ends."""
    name = CONTEXT["neighbour_name"]
    listener = socket.create_server(("0.0.0.0", CONTEXT["neighbour_port"]))
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind("\0" + name)
    abstract.listen()
    with open("/tmp/" + name, "w") as file:
        file.write("here")
    LIBC.shmget(CONTEXT["neighbour_key"], 4096, 0o1666)
    print("ready", flush=True)
    signal.pause()
    del listener


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    attacks = globals()[sys.argv[1]]()
    if attacks is not None:
        print(json.dumps(attacks), flush=True)
