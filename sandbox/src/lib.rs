//! Chitin runs untrusted agent code behind a hardware wall.
//!
//! A [`Sandbox`] is a microVM with a tiny Linux in it, no network interface and no shared file system. What the
//! workload needs is handed in, and what it made is handed out, over one channel to the agent inside.
//!
//! ```no_run
//! # async fn example() -> Result<(), chitin::Error> {
//! use chitin::{Sandbox, SecretSource};
//!
//! let sandbox = Sandbox::builder()
//!     .memory_mib(256)
//!     .timeout(std::time::Duration::from_secs(60))
//!     .secret("API_TOKEN", SecretSource::Env("API_TOKEN".into()))
//!     .start()
//!     .await?;
//! sandbox.copy_in("data.csv", "/work/data.csv").await?;
//! let output = sandbox.command("python3").args(["-c", "print(6 * 7)"]).output().await?;
//! assert_eq!(output.stdout, b"42\n");
//! sandbox.copy_out("/work/report", "report").await?;
//! sandbox.stop().await?;
//! # Ok(())
//! # }
//! ```
//!
//! Dropping a [`Sandbox`] ends it. So does the death of the process that holds it, however it dies.
#![forbid(unsafe_code)]

pub mod audit;
mod builder;
mod channel;
mod cleanup;
mod copy;
mod credential_delivery;
mod dial_requests;
pub mod doctor;
mod error;
mod fork;
mod forward;
mod phases;
mod pool;
mod process;
mod sandbox;
mod session;
mod template;
mod trust_store;

pub use builder::{Builder, ECHO, Warming};
pub use channel::{StreamReader, StreamWriter, Tunnel};
pub use chitin_broker::egress::EgressError;
pub use chitin_policy::{self as policy, Policy, PolicyError};
pub use chitin_protocol::{Exit, StartError, Usage};
pub use chitin_spec::{
    Boundary, Delivery, EgressLimits, Endpoint, ProxyScope, SecretId, SecretSource, SecretSpec,
    TierKind, TierSelection, VaultConfig, VaultLogin, VaultSource,
};
pub use chitin_tiers::{
    Artifacts, BaselineContainer, Capabilities, GuestEnd, RejectedTier, SelectedTier, Unavailable,
};
pub use chitin_vmm::FailureCode;
pub use chitin_vmm::jail::Jail;
pub use chitin_vmm::{error_chain, printable};
pub use cleanup::wait_for_cleanup;
pub use error::Error;
pub use fork::MAX_FORKS;
pub use forward::Forward;
pub use phases::Phases;
pub use pool::{MAX_POOL, Pool};
pub use process::{Command, Output, Process};
pub use sandbox::Sandbox;
pub use template::{Manifest, TemplateError, Templates};
