//! The jail: what is left to a monitor once its guest runs.
//!
//! ```text
//!  host ──spawns──▶ keeper ──clone3(user, mount, pid, net, ipc, uts)──▶ inmate
//!    │                │ opens kernel, image and /dev/kvm                  │ closes the jail behind itself: empty root,
//!    │                │ gives the inmate an identity (root only)          │ no capabilities, limits
//!    │                │ forgets all that, and waits                       │ makes the VM, starts threads, filters each
//!    │                │                                                   ▼ enters the guest
//!    ├─ closes the control socket ─▶ SIGKILL ────────────────────────────▶ end
//!    └─ kills the keeper ──────────── PR_SET_PDEATHSIG ──────────────────▶ end
//! ```
//!
//! A jail can only be closed around a process of its own, so it belongs to the program `chitin-vmm` and not to
//! [`Monitor`](crate::Monitor), which may be embedded in one that has other things to do. Everything that has a path is opened
//! before; nothing is created, so there is no name that somebody could put something else under.

mod cgroup;
mod child;
mod probe;
mod supervisor;

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use libc::c_int;
use serde::{Deserialize, Serialize};

use self::cgroup::Group;
use crate::spec::VmSpec;
pub use child::{Inmate, Needs};
pub use probe::{Survey, survey};
pub use supervisor::{Fate, Keeper};

/// Users and groups of monitors that root has started start here; the keeper's process id is added, so that no two monitors
/// have the same. Nobody else has these: systemd's containers end right below, and process ids below 2²².
pub const IDENTITIES: u32 = 0x7000_0000;

/// What closes around a monitor that has one, as it reports it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Jail {
    /// The user it was made on the host, if root started it; otherwise it is the one who did.
    pub uid: Option<u32>,
    /// Its control group, if it has one.
    pub cgroup: Option<String>,
    /// What of a jail this host does not have, each with the reason.
    pub without: Vec<String>,
}

/// The jail cannot be closed, so no guest is run.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// No namespaces.
    #[error("jail: make namespaces: {remedy}; `--no-jail` runs without a jail")]
    Namespaces {
        /// What to do.
        remedy: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// A step that fails on no Linux we know, unless something forbids it.
    #[error(
        "jail: {step}: if this host restricts what may be done in user namespaces, allow it for `chitin-vmm` (AppArmor: a profile with `userns,`); `--no-jail` runs without a jail"
    )]
    Step {
        /// What was to be done.
        step: &'static str,
        /// Why not.
        source: io::Error,
    },
}

/// Which of the two somebody is.
pub enum Side {
    /// Waits outside.
    Keeper(Keeper),
    /// Goes in.
    Inmate(Inmate),
}

/// Linux 5.7; the C library's headers have it as a number that is too small for it.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

const NAMESPACES: c_int = libc::CLONE_NEWUSER
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS;

/// Makes two of this process: one that stays outside, and a child in namespaces of its own, and in a control group if there can
/// be one. To be called with one thread.
///
/// # Errors
/// The host has no namespaces for us; there is no child then.
pub fn divide(spec: &VmSpec) -> Result<Side, JailError> {
    let step = |step| move |source| JailError::Step { step, source };
    // Both live as long as the keeper: that the far end of the first is gone tells that it died.
    let (gate, opener) = pipe(0).map_err(step("make a pipe"))?;
    let (ear, mouth) = pipe(libc::O_NONBLOCK).map_err(step("make a pipe"))?;
    // SAFETY: no arguments.
    let root = unsafe { libc::geteuid() } == 0;
    let mut group = Group::make(spec, root);
    let mut forked = fork(group.as_ref().ok());
    if group.is_ok()
        && forked.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::EINVAL))
    {
        group = Err("the kernel cannot start a process in one: Linux 5.7 can".into());
        forked = fork(None);
    }
    match forked.map_err(refused)? {
        Fork::Child => {
            let found = match group {
                // The directory is closed, and the group the keeper's to remove.
                Ok(group) => Jail { cgroup: Some(group.leave()), ..Jail::default() },
                Err(why) => Jail {
                    without: vec![format!("limits of a control group ({why})")],
                    ..Jail::default()
                },
            };
            Ok(Side::Inmate(Inmate::new(gate, mouth, root, found)))
        }
        Fork::Parent(pid, pidfd) => {
            Ok(Side::Keeper(Keeper::new(pid, pidfd, opener, ear, root, group.ok())))
        }
    }
}

enum Fork {
    Parent(libc::pid_t, OwnedFd),
    Child,
}

/// fork(2) into new namespaces and a group.
fn fork(group: Option<&Group>) -> io::Result<Fork> {
    let mut pidfd: c_int = -1;
    // SAFETY: plain numbers, of which zero is valid.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = (NAMESPACES | libc::CLONE_PIDFD).cast_unsigned().into();
    args.pidfd = (&raw mut pidfd).addr() as u64;
    args.exit_signal = libc::SIGCHLD.unsigned_abs().into();
    if let Some(group) = group {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = group.as_raw_fd().unsigned_abs().into();
    }
    // SAFETY: `args` is valid for its size. Without a stack and without shared memory this is fork(2); with one thread nobody
    // else's locks are copied.
    let pid =
        unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) };
    match libc::pid_t::try_from(pid) {
        Ok(0) => Ok(Fork::Child),
        // SAFETY: the kernel has just made it for us.
        Ok(pid) if pid > 0 => Ok(Fork::Parent(pid, unsafe { OwnedFd::from_raw_fd(pidfd) })),
        _ => Err(io::Error::last_os_error()),
    }
}

fn refused(source: io::Error) -> JailError {
    let remedy = match source.raw_os_error() {
        Some(libc::EPERM) => {
            "this host or container forbids user namespaces to this user: set the sysctl `kernel.unprivileged_userns_clone` to 1, or allow `clone3` with namespaces in the container's seccomp profile"
        }
        Some(libc::ENOSPC | libc::EUSERS) => {
            "there are too many already: raise the sysctls `user.max_user_namespaces` and `user.max_net_namespaces`"
        }
        Some(libc::ENOSYS) => {
            "the kernel is older than 5.3, or the container's seccomp profile does not know `clone3`"
        }
        Some(libc::EINVAL) => {
            "the kernel was built without one of user, pid, net, ipc and uts namespaces"
        }
        _ => "the host refuses",
    };
    JailError::Namespaces { remedy, source }
}

fn pipe(flags: c_int) -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [-1; 2];
    // SAFETY: the array has room for both.
    check(unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC | flags) })?;
    // SAFETY: the kernel has just made them for us.
    Ok(unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) })
}

/// Keeps guest memory, and with it a guest's secrets, out of core dumps and away from other processes of this user.
///
/// # Errors
/// The kernel refuses a limit of zero, which none does.
pub fn forbid_dumps() -> io::Result<()> {
    child::limit(libc::RLIMIT_CORE, 0)?;
    prctl(libc::PR_SET_DUMPABLE, 0)
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Leaves the calling thread these capabilities and no other.
fn keep_capabilities(kept: u32) -> io::Result<()> {
    // Version 3 of `struct __user_cap_header_struct`, this process; and two times effective, permitted, inheritable.
    let header = [0x2008_0522u32, 0];
    let sets = [kept, kept, 0, 0, 0, 0];
    // SAFETY: both are as long as that version has them, and only read.
    match unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn prctl(option: c_int, value: libc::c_ulong) -> io::Result<()> {
    // SAFETY: the options used here take a number, and zeroes.
    check(unsafe { libc::prctl(option, value, 0, 0, 0) })
}
