//! What a process loses before it becomes the workload. The same on every tier.
//!
//! What runs in the child, the fork of a process that may have other threads, allocates nothing and makes system
//! calls only.

mod landlock;
mod seccomp;

use std::collections::BTreeMap;

use chitin_protocol::{Confine, Failure, SystemCalls};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit};
use rustix::thread::{CapabilitySet, CapabilitySets};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use crate::syscall::check_result;
use crate::{Context, SystemError};
use landlock::Ruleset;
use seccomp::default_deny::Filter;

/// The one capability a workload keeps, so that it can serve port 80 as an ordinary user.
const KEPT: CapabilitySet = CapabilitySet::NET_BIND_SERVICE;

/// Open files: programs raise the soft limit themselves if they know to handle more than `select(2)` can; the hard
/// one bounds the kernel memory of a table at half a MiB.
const OPEN_FILES: Rlimit = Rlimit { current: Some(1024), maximum: Some(65_536) };

/// A core dump would be a copy of the workload's credentials.
const CORE: Rlimit = Rlimit { current: Some(0), maximum: Some(0) };

// Other limits stay as the kernel sets them. The number of processes has one (half of the machine's threads),
// which counts per user and so cannot replace the cgroup's, nor need it be changed.

/// Marks system calls of the x32 ABI (`__X32_SYSCALL_BIT` of the kernel's uapi).
const X32: i64 = 0x4000_0000;

/// System calls that answer ENOSYS, as on a kernel built without them. The microVM's kernel is; other tiers' are
/// not, and the workload should not see a difference. What needs capabilities is not repeated here.
const ABSENT: [i64; 9] = [
    // Opens sockets and files without passing this filter.
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    // The most frequent ways into a kernel for a user without rights; programs do without them.
    libc::SYS_bpf,
    libc::SYS_userfaultfd,
    libc::SYS_perf_event_open,
    // Key rings are not divided by namespaces.
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
];

/// How processes are locked down. What all of them share, the agent takes upon itself and they inherit it: each of
/// these costs something only once, and none of it stands between fork and exec.
pub struct Lockdown {
    /// What the agent itself may do. All of it in a microVM.
    permitted: CapabilitySet,
    /// What a policy adds.
    confinement: Option<Confinement>,
}

/// What a child takes upon itself last, before it execs.
struct Confinement {
    files: Option<Ruleset>,
    system_calls: Option<Filter>,
}

impl Lockdown {
    /// From here on the filter and the bounding set hold for the agent too. It has opened its channel already.
    pub fn begin() -> Result<Lockdown, SystemError> {
        let permitted = rustix::thread::capabilities(None).map(|sets| sets.permitted);
        let permitted = permitted.context("read", "the agent's capabilities")?;
        // Nobody this process starts may have more than it, and it execs nothing itself. Without the right to do it
        // the set stays, and no_new_privs makes it worthless, for no file can give it to anybody.
        if permitted.contains(CapabilitySet::SETPCAP) {
            shrink_bounding_set(permitted).context("shrink", "the capability bounding set")?;
        }
        rustix::thread::set_no_new_privs(true).context("set", "no_new_privs")?;
        install_filters().context("install", "the system call filter")?;
        Ok(Lockdown { permitted, confinement: None })
    }

    /// Whether [`confine`](Self::confine) has been called.
    pub fn is_confined(&self) -> bool {
        self.confinement.is_some()
    }

    /// Prepares what every later child is confined by.
    pub fn confine(&mut self, confine: &Confine) -> Result<(), Failure> {
        let files = confine.files.as_deref().map(Ruleset::new).transpose()?;
        let system_calls = match confine.system_calls {
            SystemCalls::DefaultAllow => None,
            SystemCalls::DefaultDeny => Some(Filter::default_deny()),
        };
        self.confinement = Some(Confinement { files, system_calls });
        Ok(())
    }

    /// In the child, behind everything but the exec: it may not be allowed to do anything else afterwards.
    pub fn confine_self(&self) -> Result<(), Errno> {
        let Some(Confinement { files, system_calls }) = &self.confinement else { return Ok(()) };
        if let Some(files) = files {
            files.restrict()?;
        }
        system_calls.as_ref().map_or(Ok(()), Filter::install)
    }

    /// In the child: gives every right up but those of the user and [`KEPT`]. Needs the rights it gives up; an
    /// agent that is an ordinary user can only stay that user, and `uid` and `gid` have to be its own.
    pub fn become_user(&self, uid: u32, gid: u32) -> Result<(), Errno> {
        rustix::thread::set_keep_capabilities(true)?;
        if self.permitted.contains(CapabilitySet::SETGID) {
            rustix::thread::set_thread_groups(&[])?;
        }
        // Raw system calls: the C library's would have to reach all threads, which a forked child does not have.
        // SAFETY: these calls change the credentials of this thread, the only one of the child, and no memory.
        unsafe {
            check_result(libc::syscall(libc::SYS_setresgid, gid, gid, gid))?;
            check_result(libc::syscall(libc::SYS_setresuid, uid, uid, uid))?;
        }
        let kept = KEPT & self.permitted;
        let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: kept };
        rustix::thread::set_capabilities(None, sets)?;
        match rustix::thread::clear_ambient_capability_set() {
            // gVisor has no such set: then the exec drops everything, which is more than was asked for.
            Err(Errno::INVAL) => return Ok(()),
            other => other?,
        }
        if !kept.is_empty() {
            rustix::thread::configure_capability_in_ambient_set(kept, true)?;
        }
        Ok(())
    }
}

fn install_filters() -> Result<(), Errno> {
    for filter in filters().map_err(|_| Errno::INVAL)? {
        seccompiler::apply_filter(&filter).map_err(|error| match error {
            seccompiler::Error::Prctl(error) | seccompiler::Error::Seccomp(error) => {
                Errno::from_io_error(&error).unwrap_or(Errno::IO)
            }
            _ => Errno::INVAL,
        })?;
    }
    Ok(())
}

/// What the agent itself may not do is not in the bounding set of a container either, which its runtime makes of one list; a call
/// for each of forty takes milliseconds under gVisor.
fn shrink_bounding_set(permitted: CapabilitySet) -> Result<(), Errno> {
    let all = (0..u64::BITS).map(|number| CapabilitySet::from_bits_retain(1 << number));
    all.filter(|&capability| permitted.contains(capability) && capability != KEPT)
        .try_for_each(rustix::thread::remove_capability_from_bounding_set)
}

/// In the child, while it may still raise limits: sets what every workload has.
pub fn limit_resources() -> Result<(), Errno> {
    rustix::process::umask(Mode::from_raw_mode(0o022));
    rustix::process::setrlimit(Resource::Core, CORE)?;
    match rustix::process::setrlimit(Resource::Nofile, OPEN_FILES) {
        // Not allowed to raise it: what there is has to do.
        Err(Errno::PERM) => {
            let maximum = rustix::process::getrlimit(Resource::Nofile).maximum;
            let current = OPEN_FILES.current.min(maximum);
            rustix::process::setrlimit(Resource::Nofile, Rlimit { current, maximum })
        }
        other => other,
    }
}

/// In the child: nothing ignored, nothing blocked. The agent ignores SIGPIPE and nothing else.
pub fn reset_signals() {
    // SAFETY: the default disposition involves no code of this process; all-zero is a valid, empty `sigset_t`, and
    // `sigprocmask` only reads it.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        let none: libc::sigset_t = std::mem::zeroed();
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}

fn filters() -> Result<[BpfProgram; 2], seccompiler::BackendError> {
    // The channel is identified by its socket, and any process may open vsock: only this keeps the workload
    // off it. EAFNOSUPPORT is what a kernel without vsock says, and what programs expect.
    let vsock = SeccompCondition::new(
        0,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::Eq,
        libc::AF_VSOCK.cast_unsigned().into(),
    )?;
    let vsock = SeccompRule::new(vec![vsock])?;
    // seccompiler ends a process that uses another architecture's calls (int 0x80); x32 shares ours, so each rule
    // stands twice.
    let sockets =
        [libc::SYS_socket, libc::SYS_socket | X32].map(|call| (call, vec![vsock.clone()]));
    let absent = ABSENT.iter().flat_map(|&call| [(call, vec![]), (call | X32, vec![])]);
    Ok([
        compile(sockets.into_iter().collect(), libc::EAFNOSUPPORT)?,
        compile(absent.collect(), libc::ENOSYS)?,
    ])
}

fn compile(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    errno: i32,
) -> Result<BpfProgram, seccompiler::BackendError> {
    let refuse = SeccompAction::Errno(errno.cast_unsigned());
    SeccompFilter::new(rules, SeccompAction::Allow, refuse, TargetArch::x86_64)?.try_into()
}
