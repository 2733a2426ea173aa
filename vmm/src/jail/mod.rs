//! The jail: isolates the monitor before it runs a guest.
//!
//! ```text
//!  chitin ──spawns──▶ supervisor ──clone3(user, mnt, pid, net, ipc, uts)──▶ child
//!    │                  │                                                  │
//!    │                  │ opens kernel, image and /dev/kvm before the fork │
//!    │                  │ maps a dedicated user ────── ready pipe ───────▶ │ becomes it (root only)
//!    │                  │ drops every file                                 │ empty root, limits,
//!    │                  │ waits for the child                              │ no capabilities
//!    │                  │ ◀───────────────────────── stderr pipe ───────── │ makes the VM, starts
//!    │                  │                                                  │ and filters threads
//!    │                  │                                                  ▼ enters the guest
//!    ├─ closes the control socket ─── SIGKILL ───────────────────────────▶ ends
//!    └─ kills the supervisor ──────── PR_SET_PDEATHSIG ──────────────────▶ ends
//!
//!  states of the child:  forked ─▶ identified ─▶ jailed ─▶ filtered ─▶ in the guest ─▶ ended
//!                       `Child`   `Child::enter_jail`     `seccomp`                   `ChildExit`
//! ```
//!
//! A jail encloses a whole process, so it belongs to the program `chitin-vmm` and not to
//! [`Monitor`](crate::Monitor), which may be embedded in a program with other tasks. Everything
//! that has a path is opened before the fork. Nothing is created, so no other process can replace
//! it by name.

mod cgroup;
mod child;
mod fork;
mod probe;
mod speculation;
mod supervisor;

use std::io;

use rustix::process::{
    DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit,
};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};
use serde::{Deserialize, Serialize};

pub use self::child::{Child, ChildAccess};
pub use self::fork::{ForkResult, fork_into_namespaces};
pub use self::probe::{JailSupport, probe_jail};
pub use self::speculation::{Protection, Speculation};
pub use self::supervisor::{ChildExit, KilledChild, Supervisor};

/// The base of the user and group ids of monitors that root starts.
///
/// The process id of the supervisor is added, so that no two monitors share an id. Nothing else
/// uses this range: ids of systemd's containers end right below it, and process ids are below 2²².
pub const BASE_UID: u32 = 0x7000_0000;

/// The jail of a monitor, as the monitor reports it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Jail {
    /// The dedicated user of a monitor that root has started. Without it the monitor runs as the
    /// user who started it.
    pub uid: Option<u32>,
    /// The user that the monitor runs as.
    pub user: JailUser,
    /// The control group of the monitor, if it has one.
    pub cgroup: Option<String>,
    /// Parts of a jail that this host cannot provide, each with the reason.
    pub without: Vec<String>,
    /// Protections against speculation.
    pub speculation: Speculation,
}

/// The user of a jailed monitor, seen from the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JailUser {
    /// A user of this monitor alone.
    Dedicated,
    /// The ordinary user who started it: other processes of that user can send it signals.
    #[default]
    Caller,
    /// Root, because root has no other users here: a guest that escapes from the jail is root.
    Root,
}

/// A jail that cannot be set up; no guest is run.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message of a variant explains its fields")]
pub enum JailError {
    /// The host has no namespaces for this process.
    #[error("jail: create namespaces: {remedy}; `--no-jail` runs without a jail")]
    Namespaces {
        /// The remedy for this cause.
        remedy: &'static str,
        source: io::Error,
    },
    /// The host has no room for another process.
    #[error("jail: create a process: {remedy}")]
    Process {
        /// The limit, if it is known, and the remedy.
        remedy: String,
        source: io::Error,
    },
    /// The host forbids a step that succeeds on every supported Linux.
    #[error(
        "jail: {step}: if this host restricts user namespaces, allow them for `chitin-vmm` \
         (AppArmor: a profile with `userns,`); `--no-jail` runs without a jail"
    )]
    Forbidden { step: &'static str, source: io::Error },
    /// A step failed for a reason that has nothing to do with permissions.
    #[error("jail: {step}")]
    Step { step: &'static str, source: io::Error },
}

/// Names the step that failed.
fn failed<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> JailError {
    move |source| {
        let source: io::Error = source.into();
        match source.kind() {
            io::ErrorKind::PermissionDenied => JailError::Forbidden { step, source },
            _ => JailError::Step { step, source },
        }
    }
}

/// Keeps guest memory, which holds the guest's secrets, out of core dumps and away from other
/// processes of this user.
///
/// # Errors
/// The kernel rejects a limit of zero, which no supported kernel does.
pub fn forbid_dumps() -> io::Result<()> {
    set_limit(Resource::Core, 0)?;
    Ok(set_dumpable_behavior(DumpableBehavior::NotDumpable)?)
}

/// Sets both the soft and the hard limit.
fn set_limit(resource: Resource, value: u64) -> io::Result<()> {
    Ok(setrlimit(resource, Rlimit { current: Some(value), maximum: Some(value) })?)
}

/// Lowers both limits to at most this value. Only root may raise a hard limit that is lower.
fn lower_limit(resource: Resource, value: u64) -> io::Result<()> {
    let maximum = getrlimit(resource).maximum.unwrap_or(u64::MAX);
    set_limit(resource, value.min(maximum))
}

/// Drops all capabilities of the calling thread except these.
fn keep_capabilities(kept: CapabilitySet) -> io::Result<()> {
    let sets =
        CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    Ok(set_capabilities(None, sets)?)
}
