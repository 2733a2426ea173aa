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

mod artifacts;
pub mod audit;
mod channel;
mod copy;
mod credential;
pub mod doctor;
mod egress;
mod error;
mod fork;
mod inner;
mod phases;
pub mod policy;
mod pool;
mod process;
mod returning;
mod sandbox;
mod secret;
mod template;
mod tier;

pub use artifacts::Artifacts;
pub use channel::{StreamReader, StreamWriter, Tunnel};
pub use chitin_protocol::{Exit, StartError, Usage};
pub use chitin_vmm::jail::Jail;
pub use credential::{Delivery, Reach, SecretId, VaultConfig, VaultLogin};
pub use egress::{EgressError, EgressLimits, Forward};
pub use error::{Error, GuestEnd};
pub use fork::MAX_FORKS;
pub use phases::Phases;
pub use policy::{Policy, PolicyError, Runtime};
pub use pool::{MAX_POOL, Pool};
pub use process::{Command, Output, Process};
pub use returning::given_back;
pub use sandbox::{Builder, ECHO, Sandbox, Warming};
pub use secret::{SecretSource, SecretSpec};
pub use template::{Manifest, TemplateError, Templates};
pub use tier::bare::Bare;
pub use tier::select::{Chosen, PassedOver};
pub use tier::{Capabilities, Unavailable};
