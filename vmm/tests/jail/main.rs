//! A monitor in its jail, seen from outside. Its guest has a few instructions and runs on any
//! `/dev/kvm`.
//!
//! The user who runs these tests needs access to `/dev/kvm`. What only root can observe is tested
//! when root runs them.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod isolation;
mod lifecycle;
mod monitor;
mod seccomp;
mod template;

/// Tests whether the tests run as root.
fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
