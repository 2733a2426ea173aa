//! Locks processes down before they become the workload, in the same way on every tier.
//!
//! Code that runs in the child allocates nothing and makes system calls only: the child is the fork
//! of a process that may have other threads.

mod landlock;
pub mod limits;
mod privileges;
mod seccomp;

use chitin_protocol::{Confine, Failure, SystemCalls};
use rustix::io::Errno;
use rustix::thread::CapabilitySet;

use crate::error::{Context, SystemError};
use landlock::Ruleset;
use seccomp::base;
use seccomp::default_deny::Filter;

/// The restrictions of every process. The agent applies to itself those that all of them share, and
/// they inherit them: each costs something only once, and none of it is done between fork and exec.
pub struct Lockdown {
    /// The agent's own capabilities: all of them in a microVM.
    permitted: CapabilitySet,
    /// The filter of every child whose policy has no filter that includes it.
    child_filter: Filter,
    /// The restrictions that a policy adds, and the message that requested them.
    confinement: Option<(Confine, Confinement)>,
}

/// The restrictions that a child applies to itself as its last step before the exec.
struct Confinement {
    files: Option<Ruleset>,
    system_calls: Option<Filter>,
}

impl Lockdown {
    /// Applies the restrictions that the agent shares with its children. Its vsock sockets have to
    /// be open already.
    pub fn apply_to_agent() -> Result<Lockdown, SystemError> {
        let permitted = rustix::thread::capabilities(None).map(|sets| sets.permitted);
        let permitted = permitted.context("read", "the agent's capabilities")?;
        // No child may have more than the agent, and the agent executes no program itself. Without
        // CAP_SETPCAP the set stays as it is, and no_new_privs makes it worthless, because no file
        // can grant capabilities from it.
        if permitted.contains(CapabilitySet::SETPCAP) {
            privileges::shrink_bounding_set(permitted)
                .context("shrink", "the capability bounding set")?;
        }
        rustix::thread::set_no_new_privs(true).context("set", "no_new_privs")?;
        base::install_filters().context("install", "the system call filter")?;
        let child_filter =
            base::assemble_child_filter().context("assemble", "the filter of children")?;
        Ok(Lockdown { permitted, child_filter, confinement: None })
    }

    /// Returns whether [`confine`](Self::confine) has succeeded.
    pub fn is_confined(&self) -> bool {
        self.confinement.is_some()
    }

    /// Returns whether a message requests the restrictions that are enforced already.
    pub fn enforces(&self, confine: &Confine) -> bool {
        self.confinement.as_ref().is_some_and(|(enforced, _)| {
            let enforced = Confine { request: confine.request, ..enforced.clone() };
            enforced == *confine
        })
    }

    /// Prepares the restrictions that a policy adds to every later child.
    pub fn confine(&mut self, confine: &Confine) -> Result<(), Failure> {
        let files = confine.files.as_deref().map(Ruleset::new).transpose()?;
        let system_calls = match confine.system_calls {
            SystemCalls::DefaultAllow => None,
            SystemCalls::DefaultDeny => Some(Filter::default_deny()),
        };
        self.confinement = Some((confine.clone(), Confinement { files, system_calls }));
        Ok(())
    }

    /// Applies the policy's restrictions to the child. Nothing but the exec may follow, because
    /// they may deny anything else.
    pub fn confine_child(&self) -> Result<(), Errno> {
        let confinement = self.confinement.as_ref().map(|(_, confinement)| confinement);
        if let Some(files) = confinement.and_then(|confinement| confinement.files.as_ref()) {
            files.restrict_self()?;
        }
        let filter = confinement.and_then(|confinement| confinement.system_calls.as_ref());
        filter.unwrap_or(&self.child_filter).install()
    }

    /// Makes the child an unprivileged process of this user: see [`privileges::switch_user`].
    pub fn switch_user(&self, uid: u32, gid: u32) -> Result<(), Errno> {
        privileges::switch_user(uid, gid, self.permitted)
    }
}
