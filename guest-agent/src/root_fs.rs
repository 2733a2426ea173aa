//! What the sandbox looks like from inside.
//!
//! ```text
//!   /            overlay: the read-only image below, one tmpfs above      read-only
//!   ├ work  tmp  var/tmp  dev/shm     the same overlay, bound here        writable
//!   ├ dev        nodes that lie in the tmpfs: null zero full random urandom tty, links fd stdin … ptmx
//!   │ └ pts      devpts
//!   ├ proc       proc
//!   └ sys        sysfs, read-only
//!     └ fs/cgroup  cgroup2, read-only
//! ```
//!
//! There is one mount namespace. The agent's own, writable view of the root is a detached clone of the overlay's
//! mount that has no path at all: copy jobs make it the root of their thread, and no workload can name it.
//! The workload's view is read-only because its *mount* is; it has no capability to change that, and a user
//! namespace of its own only gets locked copies.
//!
//! One tmpfs takes everything that is written, so one limit holds for all of it, whatever path is used. That
//! everything goes through the overlay keeps what an image has in these directories visible. Mounts that would
//! add nothing are left out, because each costs boot time: `/dev` needs no file system for six nodes, and `nodev` and
//! `nosuid` say no more than the workload's missing capabilities and its `no_new_privs` do.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{CWD, FileType, Gid, Mode, OFlags, Uid, XattrFlags, makedev};
use rustix::io::Errno;
use rustix::mount::{FsPickFlags, MountFlags, OpenTreeFlags, UnmountFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::io::channel;
use crate::syscall::check_result;
use crate::{Context, SystemError};

/// The image's empty directories that the root is assembled in; neither is visible afterwards.
const SCRATCH: &str = "/mnt";
const NEW_ROOT: &str = "/run";

/// Half of the memory, the kernel's default for a tmpfs: a workload that fills it is told ENOSPC while there is
/// memory left to handle that. The number of inodes is bounded likewise by default, one for two pages.
const TMPFS_OPTIONS: &str = "mode=0755,size=50%";

/// Writable for the workload: path, and the mode and owner it has, whatever the image says.
const WRITABLE: [(&str, u32, u32); 4] =
    [("/work", 0o755, 1000), ("/tmp", 0o1777, 0), ("/var/tmp", 0o1777, 0), ("/dev/shm", 0o1777, 0)];

/// Character devices: name, major, minor. Not among them: kmsg (the host reads it, a workload could forge it),
/// console, mem, vsock and the disks, which devtmpfs would have brought along.
const NODES: [(&str, u32, u32); 6] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];

const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// What only the agent can reach.
pub struct View {
    /// The root file system, writable, without what is mounted on it.
    pub root: OwnedFd,
    /// The root of the cgroup hierarchy, writable.
    pub cgroup: OwnedFd,
    /// The tmpfs that takes all that is written. It has no path any more.
    pub scratch: OwnedFd,
}

/// Fills descriptors 0 to 2, which the kernel leaves closed if the image has no `/dev/console`, so that nothing
/// opened later becomes somebody's standard output.
pub fn fill_standard_descriptors() -> Result<(), SystemError> {
    loop {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let fd = rustix::fs::open("/", flags, Mode::empty()).context("open", "/")?;
        if std::os::fd::AsRawFd::as_raw_fd(&fd) > 2 {
            return Ok(());
        }
        std::mem::forget(fd);
    }
}

/// Makes the sandbox's file systems and changes into them. With `own_log`, standard error becomes the kernel log.
pub fn build(own_log: bool) -> Result<View, SystemError> {
    rustix::process::umask(Mode::empty());
    mount("tmpfs", SCRATCH, MountFlags::NOSUID, TMPFS_OPTIONS)?;
    let scratch = rustix::fs::open(SCRATCH, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .context("open", SCRATCH)?;
    if own_log {
        let path = "/mnt/kmsg";
        node(path, 1, 11, 0o600)?;
        let log = rustix::fs::open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
            .context("open", path)?;
        channel::replace(&log, 2).context("replace descriptor", 2)?;
    }
    for directory in ["upper", "work", "upper/dev", "upper/dev/pts"] {
        make_directory(&format!("{SCRATCH}/{directory}"), 0o755)?;
    }
    // Whatever nodes an image has in /dev are not shown.
    let dev = "/mnt/upper/dev";
    rustix::fs::setxattr(dev, "trusted.overlay.opaque", b"y", XattrFlags::empty())
        .context("mark opaque", dev)?;
    for (name, major, minor) in NODES {
        node(&format!("{SCRATCH}/upper/dev/{name}"), major, minor, 0o666)?;
    }
    for (name, target) in LINKS {
        let path = format!("{SCRATCH}/upper/dev/{name}");
        rustix::fs::symlink(target, &path).context("create", path)?;
    }
    mount(
        "overlay",
        NEW_ROOT,
        MountFlags::empty(),
        "lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work",
    )?;

    // The old root ends up on top of the new one, where "." is it, and is detached from there (pivot_root(2)).
    rustix::process::chdir(NEW_ROOT).context("enter", NEW_ROOT)?;
    rustix::process::pivot_root(".", ".").context("change the root to", NEW_ROOT)?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).context("unmount", "the old root")?;
    rustix::process::chdir("/").context("enter", "/")?;

    let mut writable = Vec::with_capacity(WRITABLE.len());
    for (path, mode, owner) in WRITABLE {
        make_directory(path, mode)?;
        // A link, as `/var/tmp` may be one to `/tmp`, is as writable as what it leads to.
        if give(path, mode, owner)? == FileType::Directory {
            writable.push(path);
        }
    }
    for path in ["/proc", "/sys"] {
        make_directory(path, 0o755)?;
    }
    let root = clone_mount("/")?;
    for path in writable {
        rustix::mount::mount_bind(path, path).context("bind", path)?;
    }
    make_read_only("/", MountFlags::empty())?;

    let closed = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("proc", "/proc", closed, "")?;
    mount("sysfs", "/sys", closed | MountFlags::RDONLY, "")?;
    mount("cgroup2", "/sys/fs/cgroup", closed, "")?;
    let cgroup = clone_mount("/sys/fs/cgroup")?;
    make_read_only("/sys/fs/cgroup", closed)?;
    // Group 5 is tty by convention: terminals are for their owner and those who may write to it.
    mount(
        "devpts",
        "/dev/pts",
        MountFlags::NOSUID | MountFlags::NOEXEC,
        "newinstance,ptmxmode=0666,mode=0620,gid=5",
    )?;

    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .context("open", "/dev/null")?;
    for number in 0..if own_log { 2 } else { 0 } {
        channel::replace(&null, number).context("replace descriptor", number)?;
    }
    rustix::process::umask(Mode::from_raw_mode(0o022));
    Ok(View { root, cgroup, scratch })
}

/// Bounds what can be written. Fails with EINVAL if more than that is there already.
pub fn limit_disk(scratch: impl AsFd, bytes: u64) -> Result<(), Errno> {
    let context = rustix::mount::fspick(
        scratch,
        "",
        FsPickFlags::FSPICK_EMPTY_PATH | FsPickFlags::FSPICK_CLOEXEC,
    )?;
    rustix::mount::fsconfig_set_string(&context, "size", bytes.to_string())?;
    rustix::mount::fsconfig_reconfigure(&context)
}

/// What may be done after the host has been told that the sandbox is up, and before it is asked for anything.
pub fn complete() -> Result<(), SystemError> {
    rustix::system::sethostname(b"chitin").context("set", "the host name")?;
    raise_loopback().context("raise", "the loopback interface")
}

#[expect(clippy::cast_possible_truncation, reason = "the flags are 16 bits wide")]
const INTERFACE_UP: libc::c_short = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;

/// Parameters of a kernel that is the sandbox's own.
pub fn set_kernel_parameters() -> Result<(), SystemError> {
    // The compiler takes 2 MiB of fresh memory for its first program, which costs more than ten milliseconds in a
    // microVM. A filter hardly ever runs: the kernel remembers what it always allows (seccomp's bitmap).
    clear_parameter("/proc/sys/net/core/bpf_jit_enable")?;
    // Otherwise a thread looks twice a second whether memory is in pieces, and an idle sandbox is never at rest.
    clear_parameter("/proc/sys/vm/compaction_proactiveness")?;
    // In a user namespace of its own every user has all capabilities, and with them the parts of the kernel that are
    // attacked most.
    clear_parameter("/proc/sys/user/max_user_namespaces")
}

/// Makes a kernel parameter 0, where the kernel has it.
fn clear_parameter(path: &'static str) -> Result<(), SystemError> {
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    match rustix::fs::open(path, flags, Mode::empty())
        .and_then(|file| rustix::io::write(&file, b"0"))
    {
        Ok(_) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(errno).context("write", path),
    }
}

/// Sets the loopback interface up, which is all a sandbox has.
pub fn raise_loopback() -> Result<(), Errno> {
    let socket = rustix::net::socket_with(
        AddressFamily::INET,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    // SAFETY: all-zero is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l'.cast_signed();
    request.ifr_name[1] = b'o'.cast_signed();
    request.ifr_ifru.ifru_flags = INTERFACE_UP;
    // SAFETY: SIOCSIFFLAGS reads an `ifreq`, which outlives the call.
    check_result(unsafe {
        libc::ioctl(
            std::os::fd::AsRawFd::as_raw_fd(&socket),
            libc::SIOCSIFFLAGS as _,
            &raw const request,
        )
    })
}

fn mount(
    kind: &'static str,
    target: &'static str,
    flags: MountFlags,
    options: &str,
) -> Result<(), SystemError> {
    let options = std::ffi::CString::new(options).unwrap_or_default();
    rustix::mount::mount(kind, target, kind, flags, Some(options.as_c_str()))
        .context("mount", format_args!("{kind} on {target}"))
}

/// A mount of the same file system as at `path`, attached nowhere.
fn clone_mount(path: &'static str) -> Result<OwnedFd, SystemError> {
    rustix::mount::open_tree(
        CWD,
        path,
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
    )
    .context("clone the mount of", path)
}

/// For this mount only: others of the same file system stay as they are. `flags` are those it has otherwise.
fn make_read_only(path: &'static str, flags: MountFlags) -> Result<(), SystemError> {
    rustix::mount::mount_remount(path, MountFlags::BIND | MountFlags::RDONLY | flags, "")
        .context("make read-only", path)
}

fn node(path: &str, major: u32, minor: u32, mode: u32) -> Result<(), SystemError> {
    let mode = Mode::from_raw_mode(mode);
    rustix::fs::mknodat(CWD, path, FileType::CharacterDevice, mode, makedev(major, minor))
        .context("create", path)
}

/// Creates a directory unless it is there.
fn make_directory(path: &str, mode: u32) -> Result<(), SystemError> {
    match rustix::fs::mkdir(path, Mode::from_raw_mode(mode)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno).context("create", path),
    }
}

/// Sees to mode and owner, unless it is a link, and says what it is. What is right already is not written: that
/// would copy the directory up.
fn give(path: &str, mode: u32, owner: u32) -> Result<FileType, SystemError> {
    let is = rustix::fs::lstat(path).context("look at", path)?;
    let kind = FileType::from_raw_mode(is.st_mode);
    if kind == FileType::Symlink {
        return Ok(kind);
    }
    if (is.st_uid, is.st_gid) != (owner, owner) {
        rustix::fs::chown(path, Some(Uid::from_raw(owner)), Some(Gid::from_raw(owner)))
            .context("change the owner of", path)?;
    }
    if is.st_mode & 0o7777 != mode {
        rustix::fs::chmod(path, Mode::from_raw_mode(mode)).context("change the mode of", path)?;
    }
    Ok(kind)
}
