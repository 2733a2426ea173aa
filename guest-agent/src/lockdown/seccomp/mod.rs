//! The seccomp filters: [`base`] for the agent and all its children, and [`default_deny`] in
//! addition for children under a policy that asks for it.

mod allowlist;
pub mod base;
pub mod default_deny;

/// The namespaces that clone(2) can create: `CLONE_NEW*` of `linux/sched.h`, without CLONE_NEWTIME,
/// which only clone3(2) and unshare(2) take.
const NAMESPACES: [u32; 7] = [
    libc::CLONE_NEWNS.cast_unsigned(),
    libc::CLONE_NEWCGROUP.cast_unsigned(),
    libc::CLONE_NEWUTS.cast_unsigned(),
    libc::CLONE_NEWIPC.cast_unsigned(),
    libc::CLONE_NEWUSER.cast_unsigned(),
    libc::CLONE_NEWPID.cast_unsigned(),
    libc::CLONE_NEWNET.cast_unsigned(),
];
