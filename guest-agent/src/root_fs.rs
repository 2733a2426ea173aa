//! The root file system of a microVM, as the workload sees it.
//!
//! ```text
//!   /            overlay: the read-only image below, one tmpfs above      read-only
//!   ├ work  tmp  var/tmp  dev/shm     the same overlay, bound here        writable
//!   ├ dev        in the tmpfs: nodes null zero full random urandom tty, links fd stdin … ptmx
//!   │ └ pts      devpts
//!   ├ run/credentials  tmpfs, from the first credential in memory on
//!   ├ proc       proc
//!   └ sys        sysfs, read-only
//!     └ fs/cgroup  cgroup2, read-only
//! ```
//!
//! There is one mount namespace. The agent's writable view of the root is a detached clone of the
//! overlay's mount that has no path at all: copy jobs make it the root of their threads, and no
//! workload can name it. The workload's view is read-only because its *mount* is. The workload has
//! no capability to change that, and a new user namespace only gets locked copies.
//!
//! One tmpfs takes everything that is written, so one limit holds for all of it, whatever path is
//! used. Because everything goes through the overlay, files that an image has in these directories
//! stay visible. Mounts that would add nothing are left out, because each costs boot time: `/dev`
//! needs no file system for six nodes, and `nodev` and `nosuid` deny no more than the workload's
//! missing capabilities and its `no_new_privs` do.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{CWD, FileType, Gid, Mode, OFlags, Uid, XattrFlags, makedev};
use rustix::io::Errno;
use rustix::mount::{FsPickFlags, MountFlags, OpenTreeFlags, UnmountFlags};

use crate::descriptors::replace_standard_fd;
use crate::error::{Context, SystemError};

/// Empty directories of the image in which the root is assembled. Neither is visible afterwards.
const SCRATCH: &str = "/mnt";
const NEW_ROOT: &str = "/run";

/// Half of the memory, the kernel's default for a tmpfs: a workload that fills it gets ENOSPC while
/// there is memory left to handle that. The default also bounds inodes, at one for two pages.
const TMPFS_OPTIONS: &str = "mode=0755,size=50%";

/// Directories that the workload can write: path, and the mode and owner that they get, whatever
/// the image has.
const WRITABLE: [(&str, u32, u32); 4] =
    [("/work", 0o755, 1000), ("/tmp", 0o1777, 0), ("/var/tmp", 0o1777, 0), ("/dev/shm", 0o1777, 0)];

/// Character devices: name, major, minor. devtmpfs would also bring kmsg (the host reads it, and a
/// workload could forge it), console, mem, vsock and the disks.
const NODES: [(&str, u32, u32); 6] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];

/// Symbolic links in `/dev`: name and target.
const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// Mount flags of file systems in which nothing is executed.
const RESTRICTED: MountFlags =
    MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

/// File systems that only the agent can reach. They have no path.
pub struct AgentView {
    /// The root file system, writable, without the mounts on it.
    pub root: OwnedFd,
    /// The root of the cgroup hierarchy, writable.
    pub cgroup: OwnedFd,
    /// The tmpfs that takes everything that is written.
    pub scratch: OwnedFd,
}

/// Gives the working directory to the workload's user, where the container's engine has mounted it
/// and could not: Podman knows no owner of a tmpfs.
pub fn own_work_directory() -> Result<(), SystemError> {
    let (path, _, owner) = WRITABLE[0];
    let found = rustix::fs::stat(path).context("examine", path)?;
    if found.st_uid == owner {
        return Ok(());
    }
    let (user, group) = (Uid::from_raw(owner), Gid::from_raw(owner));
    rustix::fs::chown(path, Some(user), Some(group)).context("give away", path)
}

/// Makes the sandbox's file systems and changes into them. With `kernel_log`, standard error
/// becomes the kernel log.
pub fn build_root(kernel_log: bool) -> Result<AgentView, SystemError> {
    rustix::process::umask(Mode::empty());
    let scratch = mount_scratch()?;
    if kernel_log {
        redirect_stderr_to_kernel_log()?;
    }
    populate_dev()?;
    mount_overlay()?;
    let writable = make_directories()?;
    // Cloned before the mounts that follow, so that the agent's view has none of them.
    let root = clone_mount("/")?;
    for path in writable {
        rustix::mount::mount_bind(path, path).context("bind", path)?;
    }
    make_read_only("/", MountFlags::empty())?;
    let cgroup = mount_kernel_file_systems()?;
    replace_with_null(if kernel_log { 0..2 } else { 0..0 })?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    Ok(AgentView { root, cgroup, scratch })
}

/// Mounts the tmpfs of everything that is written.
fn mount_scratch() -> Result<OwnedFd, SystemError> {
    mount("tmpfs", SCRATCH, MountFlags::NOSUID, TMPFS_OPTIONS)?;
    rustix::fs::open(SCRATCH, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .context("open", SCRATCH)
}

fn redirect_stderr_to_kernel_log() -> Result<(), SystemError> {
    let path = "/mnt/kmsg";
    make_node(path, 1, 11, 0o600)?;
    let log = rustix::fs::open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
        .context("open", path)?;
    replace_standard_fd(&log, 2).context("replace descriptor", 2)
}

/// Makes `/dev` in the upper layer of the overlay.
fn populate_dev() -> Result<(), SystemError> {
    for directory in ["upper", "work", "upper/dev", "upper/dev/pts"] {
        make_directory(&format!("{SCRATCH}/{directory}"), 0o755)?;
    }
    // Hides the nodes that an image has in /dev.
    let dev = "/mnt/upper/dev";
    rustix::fs::setxattr(dev, "trusted.overlay.opaque", b"y", XattrFlags::empty())
        .context("mark opaque", dev)?;
    for (name, major, minor) in NODES {
        make_node(&format!("{SCRATCH}/upper/dev/{name}"), major, minor, 0o666)?;
    }
    for (name, target) in LINKS {
        let path = format!("{SCRATCH}/upper/dev/{name}");
        rustix::fs::symlink(target, &path).context("create", path)?;
    }
    Ok(())
}

/// Mounts the overlay and changes the root to it.
fn mount_overlay() -> Result<(), SystemError> {
    mount(
        "overlay",
        NEW_ROOT,
        MountFlags::empty(),
        "lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work",
    )?;
    // The old root ends up on top of the new one, where "." leads to it, and is detached from there
    // (pivot_root(2)).
    rustix::process::chdir(NEW_ROOT).context("enter", NEW_ROOT)?;
    rustix::process::pivot_root(".", ".").context("change the root to", NEW_ROOT)?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).context("unmount", "the old root")?;
    rustix::process::chdir("/").context("enter", "/")
}

/// Makes the directories that mounts need. Returns those that become writable.
fn make_directories() -> Result<Vec<&'static str>, SystemError> {
    let mut writable = Vec::with_capacity(WRITABLE.len());
    for (path, mode, owner) in WRITABLE {
        make_directory(path, mode)?;
        // A symbolic link, as `/var/tmp` may be one to `/tmp`, is as writable as its target.
        if set_attributes(path, mode, owner)? == FileType::Directory {
            writable.push(path);
        }
    }
    for path in ["/proc", "/sys", "/run/credentials"] {
        make_directory(path, 0o755)?;
    }
    Ok(writable)
}

/// Mounts proc, sysfs, cgroup2 and devpts. Returns the agent's view of the cgroup hierarchy.
fn mount_kernel_file_systems() -> Result<OwnedFd, SystemError> {
    mount("proc", "/proc", RESTRICTED, "")?;
    mount("sysfs", "/sys", RESTRICTED | MountFlags::RDONLY, "")?;
    mount("cgroup2", "/sys/fs/cgroup", RESTRICTED, "")?;
    let cgroup = clone_mount("/sys/fs/cgroup")?;
    make_read_only("/sys/fs/cgroup", RESTRICTED)?;
    // Group 5 is tty by convention: a terminal is for its owner, and the group may write to it.
    mount(
        "devpts",
        "/dev/pts",
        MountFlags::NOSUID | MountFlags::NOEXEC,
        "newinstance,ptmxmode=0666,mode=0620,gid=5",
    )?;
    Ok(cgroup)
}

/// Replaces standard descriptors with `/dev/null`.
fn replace_with_null(numbers: std::ops::Range<i32>) -> Result<(), SystemError> {
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .context("open", "/dev/null")?;
    for number in numbers {
        replace_standard_fd(&null, number).context("replace descriptor", number)?;
    }
    Ok(())
}

/// Limits the bytes that can be written. Fails with EINVAL if there are more already.
pub fn limit_disk(scratch: impl AsFd, bytes: u64) -> Result<(), Errno> {
    let context = rustix::mount::fspick(
        scratch,
        "",
        FsPickFlags::FSPICK_EMPTY_PATH | FsPickFlags::FSPICK_CLOEXEC,
    )?;
    rustix::mount::fsconfig_set_string(&context, "size", bytes.to_string())?;
    rustix::mount::fsconfig_reconfigure(&context)
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

/// Makes a mount of the file system at `path` that is attached nowhere.
fn clone_mount(path: &'static str) -> Result<OwnedFd, SystemError> {
    rustix::mount::open_tree(
        CWD,
        path,
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
    )
    .context("clone the mount of", path)
}

/// Makes one mount read-only; others of the same file system stay as they are. `flags` are its
/// other flags.
fn make_read_only(path: &'static str, flags: MountFlags) -> Result<(), SystemError> {
    rustix::mount::mount_remount(path, MountFlags::BIND | MountFlags::RDONLY | flags, "")
        .context("make read-only", path)
}

fn make_node(path: &str, major: u32, minor: u32, mode: u32) -> Result<(), SystemError> {
    let mode = Mode::from_raw_mode(mode);
    rustix::fs::mknodat(CWD, path, FileType::CharacterDevice, mode, makedev(major, minor))
        .context("create", path)
}

/// Creates a directory unless it exists.
fn make_directory(path: &str, mode: u32) -> Result<(), SystemError> {
    match rustix::fs::mkdir(path, Mode::from_raw_mode(mode)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno).context("create", path),
    }
}

/// Sets mode and owner of a path unless it is a symbolic link, and returns its type. Attributes
/// that are right already are not written, because that would copy the directory up.
fn set_attributes(path: &str, mode: u32, owner: u32) -> Result<FileType, SystemError> {
    let stat = rustix::fs::lstat(path).context("look at", path)?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    if kind == FileType::Symlink {
        return Ok(kind);
    }
    if (stat.st_uid, stat.st_gid) != (owner, owner) {
        rustix::fs::chown(path, Some(Uid::from_raw(owner)), Some(Gid::from_raw(owner)))
            .context("change the owner of", path)?;
    }
    if stat.st_mode & 0o7777 != mode {
        rustix::fs::chmod(path, Mode::from_raw_mode(mode)).context("change the mode of", path)?;
    }
    Ok(kind)
}
