//! The seccomp filters.

pub mod allowlist;
pub mod default_deny;
