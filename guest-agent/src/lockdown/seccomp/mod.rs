//! The seccomp filters: [`base`] for the agent and all its children, and [`default_deny`] in
//! addition for children under a policy that asks for it.

mod allowlist;
pub mod base;
pub mod default_deny;
