//! The one who goes in: a process that has namespaces of its own, and closes everything else behind itself.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr;

use super::{Jail, JailError, check, forbid_dumps, keep_capabilities, prctl};
use crate::seccomp;
use crate::spec::VmSpec;

/// Where the empty root is mounted before it becomes the root. It is there wherever `/dev/kvm` is.
const MOUNT_POINT: &CStr = c"/dev";

/// Descriptors at most. Some 20 are open with one vCPU, each further one has its own, and saving a guest takes ten more.
const MAX_FILES: u64 = 64;

/// The highest capability that a kernel might know: they are bits of a u64.
const MAX_CAPABILITY: libc::c_ulong = 63;

/// A process that is not jailed yet.
pub struct Inmate {
    /// From the keeper, who has its other end as long as it lives.
    gate: OwnedFd,
    /// To the keeper: what is said last.
    mouth: OwnedFd,
    /// Whether it was started by root, and has to become somebody else.
    root: bool,
    /// What is known of its jail so far.
    found: Jail,
}

/// What a process that is to be jailed still needs.
#[derive(Clone, Copy, Debug)]
pub struct Needs {
    /// To write to standard error as it is.
    console: bool,
    /// To write to files: those of a template, or a standard stream that is one.
    files: bool,
}

impl Needs {
    /// What a microVM needs whose events go to a control socket, or to standard output.
    pub fn of(spec: &VmSpec, controlled: bool) -> Self {
        let files = spec.console || spec.template || spec.record || !controlled;
        Self { console: spec.console || !controlled, files }
    }
}

impl Inmate {
    pub(super) fn new(gate: OwnedFd, mouth: OwnedFd, root: bool, found: Jail) -> Self {
        Self { gate, mouth, root, found }
    }

    /// Closes the jail around this process, for good. What is open stays open.
    ///
    /// # Errors
    /// The step that the host refuses. The process is then neither here nor there, and must end.
    pub fn close(self, needs: Needs) -> Result<Jail, JailError> {
        let step = |step| move |source| JailError::Step { step, source };
        let uid = self.take_identity().map_err(step("become a user of its own"))?;
        // After the change of user, which takes it back.
        prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL.unsigned_abs().into())
            .map_err(step("end with the keeper"))?;
        self.keeper_lives().map_err(step("end with the keeper"))?;
        empty_root().map_err(step("enter an empty root"))?;
        // SAFETY: no arguments. Away from the terminal, if there is one; not an error if it leads a session already.
        unsafe { libc::setsid() };
        if !needs.console {
            // SAFETY: both are open descriptors.
            check(unsafe { libc::dup2(self.mouth.as_raw_fd(), libc::STDERR_FILENO) })
                .map_err(step("redirect standard error"))?;
        }
        limits(needs).map_err(step("set limits"))?;
        forbid_dumps().map_err(step("become undumpable"))?;
        drop_capabilities().map_err(step("drop all capabilities"))?;
        seccomp::prepare_process(self.mouth.as_raw_fd()).map_err(step("get ready for filters"))?;
        // Open to the end: what is wrong is said there.
        std::mem::forget(self.mouth);
        Ok(Jail { uid, ..self.found })
    }

    /// Becomes the user that the keeper has made for it, if root started us and the host has such users.
    fn take_identity(&self) -> io::Result<Option<u32>> {
        if !self.root {
            return Ok(None);
        }
        let mut id = [0; 4];
        File::from(self.gate.try_clone()?).read_exact(&mut id)?;
        let id = u32::from_le_bytes(id);
        if id == 0 {
            return Ok(None);
        }
        // SAFETY: no groups are read from no list.
        check(unsafe { libc::setgroups(0, ptr::null()) })?;
        // SAFETY: numbers only.
        check(unsafe { libc::setresgid(id, id, id) })?;
        // SAFETY: as above.
        check(unsafe { libc::setresuid(id, id, id) })?;
        Ok(Some(id))
    }

    /// An error if the keeper died before its death would have been told.
    fn keeper_lives(&self) -> io::Result<()> {
        let mut poll = libc::pollfd { fd: self.gate.as_raw_fd(), events: 0, revents: 0 };
        // SAFETY: one valid entry, and the call returns at once.
        match unsafe { libc::poll(&raw mut poll, 1, 0) } {
            0 => Ok(()),
            _ => Err(io::Error::other("the keeper is gone")),
        }
    }
}

/// Leaves every file system of the host behind: the root is an empty directory that cannot be written to.
fn empty_root() -> io::Result<()> {
    let flags = libc::MS_RDONLY | libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    let none = ptr::null();
    // SAFETY: strings that live, and no data.
    check(unsafe {
        libc::mount(c"jail".as_ptr(), MOUNT_POINT.as_ptr(), c"tmpfs".as_ptr(), flags, none)
    })?;
    // SAFETY: a string that lives.
    check(unsafe { libc::chdir(MOUNT_POINT.as_ptr()) })?;
    // The new root, and over it the old one: both are where we are, so no directory is needed to keep the old one in.
    // SAFETY: strings that live.
    let pivoted = unsafe { libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr()) };
    if pivoted != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a string that lives.
    check(unsafe { libc::umount2(c".".as_ptr(), libc::MNT_DETACH) })?;
    // SAFETY: a string that lives.
    check(unsafe { libc::chdir(c"/".as_ptr()) })
}

/// Limits that hold from here on. How many threads there may be is settled once they have been started.
fn limits(needs: Needs) -> io::Result<()> {
    let mut limits = vec![
        (libc::RLIMIT_NOFILE, MAX_FILES),
        // Nothing here locks memory, has message queues or is to be scheduled before others.
        (libc::RLIMIT_MEMLOCK, 0),
        (libc::RLIMIT_MSGQUEUE, 0),
        (libc::RLIMIT_NICE, 0),
        (libc::RLIMIT_RTPRIO, 0),
    ];
    if !needs.files {
        limits.push((libc::RLIMIT_FSIZE, 0));
    }
    limits.into_iter().try_for_each(|(resource, value)| limit(resource, value))
}

/// Sets a limit, soft and hard.
pub(super) fn limit(resource: libc::__rlimit_resource_t, value: u64) -> io::Result<()> {
    let limit = libc::rlimit { rlim_cur: value, rlim_max: value };
    // SAFETY: a valid limit, read during the call.
    check(unsafe { libc::setrlimit(resource, &raw const limit) })
}

/// Gives up every capability, and every way to one.
fn drop_capabilities() -> io::Result<()> {
    // From the lowest to the first that this kernel does not know.
    for capability in 0..=MAX_CAPABILITY {
        match prctl(libc::PR_CAPBSET_DROP, capability) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) && capability > 0 => break,
            result => result?,
        }
    }
    keep_capabilities(0)
}
