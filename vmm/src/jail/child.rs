//! The child: a process in separate namespaces that isolates itself, then runs the guest.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::{
    Gid, Resource, Signal, Uid, chdir, pivot_root, set_parent_process_death_signal, setsid,
};
use rustix::stdio::dup2_stderr;
use rustix::thread::{
    CapabilitySet, remove_capability_from_bounding_set, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid,
};

use super::speculation::restrict_speculation;
use super::{
    Jail, JailError, JailUser, failed, forbid_dumps, keep_capabilities, lower_limit, set_limit,
};
use crate::seccomp;
use crate::spec::VmSpec;

/// The directory where the empty root is mounted before it becomes the root. It exists on every
/// host that has `/dev/kvm`.
const MOUNT_POINT: &CStr = c"/dev";

/// The maximum number of open descriptors. One vCPU needs about 20, each further vCPU one more, and
/// saving a guest ten more.
const MAX_FILES: u64 = 64;

/// The part that a jail lacks if root could not map a user for it.
const NO_USER: &str = "a dedicated user (root has no user ids from 1879048192 on here, as in a \
                       container: the monitor is root)";

/// The number of capabilities that a kernel can have: sets of them are a `u64`.
const MAX_CAPABILITIES: u32 = u64::BITS;

/// A forked process that has not entered its jail yet.
pub struct Child {
    /// Receives the user id. The supervisor holds the other end as long as it lives.
    ready_rx: OwnedFd,
    /// Standard error of the jailed process; the supervisor reads the other end.
    stderr_tx: OwnedFd,
    /// True if root has started the monitor; the child has to become a dedicated user then.
    is_root: bool,
    /// The jail, as far as the fork has determined it.
    jail: Jail,
}

/// Access to the host that a jailed process keeps.
#[derive(Clone, Copy, Debug)]
pub struct ChildAccess {
    /// Keeps standard error, instead of a pipe to the supervisor.
    inherits_stderr: bool,
    /// May grow files: those of a template, or a standard stream that is a file.
    writes_files: bool,
}

impl ChildAccess {
    /// Determines the access that a microVM needs. `controlled` means that its events go to a
    /// control socket, and not to standard output.
    pub fn for_spec(spec: &VmSpec, controlled: bool) -> Self {
        Self {
            inherits_stderr: spec.console || !controlled,
            writes_files: spec.console || spec.template || spec.record || !controlled,
        }
    }
}

impl Child {
    pub(super) fn new(ready_rx: OwnedFd, stderr_tx: OwnedFd, is_root: bool, jail: Jail) -> Self {
        Self { ready_rx, stderr_tx, is_root, jail }
    }

    /// Isolates this process permanently. Open descriptors stay open.
    ///
    /// # Errors
    /// The host refuses a step. The process is then isolated in part only, and must end.
    pub fn enter_jail(self, access: ChildAccess) -> Result<Jail, JailError> {
        let uid = self.take_identity().map_err(failed("become a dedicated user"))?;
        // A change of user resets the signal, so it is set afterwards.
        set_parent_process_death_signal(Some(Signal::KILL))
            .map_err(failed("bind this process to its supervisor"))?;
        self.check_supervisor().map_err(failed("bind this process to its supervisor"))?;
        enter_empty_root().map_err(failed("enter an empty root"))?;
        // Leaves the terminal, if there is one. A process that leads a session already may stay.
        let _ = setsid();
        if !access.inherits_stderr {
            dup2_stderr(&self.stderr_tx).map_err(failed("redirect standard error"))?;
        }
        set_limits(access).map_err(failed("set resource limits"))?;
        forbid_dumps().map_err(failed("forbid core dumps"))?;
        drop_capabilities().map_err(failed("drop all capabilities"))?;
        let speculation = restrict_speculation();
        seccomp::prepare_process(self.stderr_tx.as_raw_fd())
            .map_err(failed("prepare for system call filters"))?;
        // Refused calls are reported to this descriptor until the process ends.
        std::mem::forget(self.stderr_tx);
        let user = match uid {
            Some(_) => JailUser::Dedicated,
            None if self.is_root => JailUser::Root,
            None => JailUser::Caller,
        };
        let mut without = self.jail.without;
        if user == JailUser::Root {
            without.push(NO_USER.into());
        }
        Ok(Jail { uid, user, cgroup: self.jail.cgroup, without, speculation })
    }

    /// Becomes the user that the supervisor has mapped. There is none if an ordinary user started
    /// the monitor, or if the host has no such users.
    fn take_identity(&self) -> io::Result<Option<u32>> {
        if !self.is_root {
            return Ok(None);
        }
        let mut id = [0; 4];
        File::from(self.ready_rx.try_clone()?).read_exact(&mut id)?;
        let id = u32::from_le_bytes(id);
        if id == 0 {
            return Ok(None);
        }
        let (uid, gid) = (Uid::from_raw(id), Gid::from_raw(id));
        set_thread_groups(&[])?;
        set_thread_res_gid(gid, gid, gid)?;
        set_thread_res_uid(uid, uid, uid)?;
        Ok(Some(id))
    }

    /// Fails if the supervisor died before its death would have sent a signal.
    fn check_supervisor(&self) -> io::Result<()> {
        let mut closed = [PollFd::new(&self.ready_rx, PollFlags::empty())];
        match poll(&mut closed, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))? {
            0 => Ok(()),
            _ => Err(io::Error::other("the supervisor has ended")),
        }
    }
}

/// Replaces every file system of the host by an empty directory that cannot be written to.
fn enter_empty_root() -> Result<(), Errno> {
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount(c"jail", MOUNT_POINT, c"tmpfs", flags, None)?;
    chdir(MOUNT_POINT)?;
    // The old root is mounted over the new one, in the same place, so that the empty root needs no
    // directory for it.
    pivot_root(c".", c".")?;
    unmount(c".", UnmountFlags::DETACH)?;
    chdir(c"/")
}

/// Sets limits that apply from here on. The number of threads is limited once they have started.
fn set_limits(access: ChildAccess) -> io::Result<()> {
    lower_limit(Resource::Nofile, MAX_FILES)?;
    // The monitor locks no memory, has no message queues and runs at the default priority.
    set_limit(Resource::Memlock, 0)?;
    set_limit(Resource::Msgqueue, 0)?;
    set_limit(Resource::Nice, 0)?;
    set_limit(Resource::Rtprio, 0)?;
    if !access.writes_files {
        set_limit(Resource::Fsize, 0)?;
    }
    Ok(())
}

/// Drops every capability, and empties the bounding set so that none can be gained again.
fn drop_capabilities() -> io::Result<()> {
    // Capabilities are numbered without a gap: the first that is unknown to this kernel is the end.
    for capability in 0..MAX_CAPABILITIES {
        let capability_set = CapabilitySet::from_bits_retain(1 << capability);
        match remove_capability_from_bounding_set(capability_set) {
            Err(Errno::INVAL) if capability > 0 => break,
            result => result?,
        }
    }
    keep_capabilities(CapabilitySet::empty())
}
