//! Forks the monitor: the supervisor stays outside, and the child gets separate namespaces.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use libc::c_int;
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, geteuid};

use super::cgroup::Cgroup;
use super::{Child, Jail, JailError, Supervisor, failed};
use crate::spec::VmSpec;

/// `CLONE_INTO_CGROUP` of Linux 5.7. The C library declares it with a type that is too small.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

const NAMESPACES: c_int = libc::CLONE_NEWUSER
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS;

/// The process that a call of [`fork_into_namespaces`] returns in.
pub enum ForkResult {
    /// The process that called it, which waits outside the jail.
    Supervisor(Supervisor),
    /// The new process, which enters the jail.
    Child(Child),
}

/// Forks this process, which must have one thread, into new namespaces, and into a control group if
/// the host allows one.
///
/// # Errors
/// The host has no namespaces for this process. No child exists then.
pub fn fork_into_namespaces(spec: &VmSpec) -> Result<ForkResult, JailError> {
    // Both pipes live as long as the supervisor: a closed ready pipe tells the child that it died.
    let (ready_rx, ready_tx) = pipe_with(PipeFlags::CLOEXEC).map_err(failed("create a pipe"))?;
    let (stderr_rx, stderr_tx) =
        pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).map_err(failed("create a pipe"))?;
    let is_root = geteuid().is_root();
    let mut cgroup = Cgroup::create(spec, is_root);
    let mut forked = clone_process(cgroup.as_ref().ok());
    if cgroup.is_ok() && matches!(forked, Err(Errno::INVAL)) {
        cgroup = Err("Linux 5.7 or later is needed to start a process in one".into());
        forked = clone_process(None);
    }
    match forked.map_err(explain_refusal)? {
        Cloned::Child => {
            let jail = match cgroup {
                // The child closes the directory; the supervisor removes the group.
                Ok(cgroup) => Jail { cgroup: Some(cgroup.into_path()), ..Jail::default() },
                Err(reason) => {
                    let without = vec![format!("limits of a control group ({reason})")];
                    Jail { without, ..Jail::default() }
                }
            };
            Ok(ForkResult::Child(Child::new(ready_rx, stderr_tx, is_root, jail)))
        }
        Cloned::Parent(pid, pidfd) => {
            let supervisor = Supervisor::new(pid, pidfd, ready_tx, stderr_rx, is_root, cgroup.ok());
            Ok(ForkResult::Supervisor(supervisor))
        }
    }
}

enum Cloned {
    Parent(Pid, OwnedFd),
    Child,
}

/// Calls clone3(2) for a process in new namespaces, and in this control group.
fn clone_process(cgroup: Option<&Cgroup>) -> Result<Cloned, Errno> {
    let mut pidfd: c_int = -1;
    let mut flags: u64 = (NAMESPACES | libc::CLONE_PIDFD).cast_unsigned().into();
    if cgroup.is_some() {
        flags |= CLONE_INTO_CGROUP;
    }
    let mut args = libc::clone_args {
        flags,
        pidfd: (&raw mut pidfd).addr() as u64,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: libc::SIGCHLD.unsigned_abs().into(),
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: cgroup.map_or(0, |cgroup| cgroup.as_raw_fd().unsigned_abs().into()),
    };
    // SAFETY: `args` is valid for its size. A call without a stack and without shared memory acts
    // as fork(2); no other thread exists whose locks the child could inherit. In the parent the
    // kernel has stored a descriptor in `pidfd` that this process owns alone.
    unsafe {
        let pid = libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>());
        let pid = i32::try_from(pid).ok().filter(|pid| *pid >= 0).ok_or_else(last_error)?;
        Ok(match Pid::from_raw(pid) {
            None => Cloned::Child,
            Some(pid) => Cloned::Parent(pid, OwnedFd::from_raw_fd(pidfd)),
        })
    }
}

fn last_error() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

fn explain_refusal(errno: Errno) -> JailError {
    let remedy = match errno {
        Errno::PERM => {
            "this host or container forbids user namespaces to this user: set the sysctl \
             `kernel.unprivileged_userns_clone` to 1, or allow `clone3` with namespaces in the \
             container's seccomp profile"
        }
        Errno::NOSPC | Errno::USERS => {
            "the limit of namespaces is reached: raise the sysctls `user.max_user_namespaces` and \
             `user.max_net_namespaces`"
        }
        Errno::NOSYS => {
            "the kernel is older than 5.3, or the container's seccomp profile does not know \
             `clone3`"
        }
        Errno::INVAL => {
            "the kernel was built without one of user, pid, net, ipc and uts namespaces"
        }
        Errno::AGAIN => {
            let remedy = chitin_text::explain_refused_process();
            return JailError::Process { remedy, source: errno.into() };
        }
        Errno::NOMEM | Errno::MFILE | Errno::NFILE => {
            return JailError::Step { step: "create a process", source: errno.into() };
        }
        _ => "the host refuses",
    };
    JailError::Namespaces { remedy, source: errno.into() }
}
