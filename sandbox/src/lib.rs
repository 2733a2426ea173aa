//! Chitin runs untrusted agent code behind a hardware wall.
//!
//! A [`Sandbox`] is a microVM with a small Linux, without a network interface and without a shared
//! file system. Its inputs are copied in and its results are copied out, over one channel to the
//! agent inside.
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
//! A program that handles credentials calls [`harden_process`] before it reads the first one.
//!
//! A [`Sandbox`] ends when it is dropped, and when the process that holds it ends for any reason.
//!
//! The modules build on each other in this order:
//!
//! ```text
//!   deadline                                  time limits outside of the runtime
//!   channel                                   bytes, messages, streams
//!   session                                   a running sandbox as its processes see it
//!   process  copy  forward                    commands, files, ports
//!   credential_delivery  trust_store          credentials after the start
//!   template  spec                            saved guests; settings after validation
//!   launch                                    from a launched guest to one ready for use
//!   sandbox  builder                          the public handle, and its settings
//!   fork  pool  template::build  audit        many sandboxes
//!   doctor  host                              this host
//! ```
#![forbid(unsafe_code)]

pub mod audit;
mod builder;
mod channel;
mod cleanup;
mod copy;
mod credential_delivery;
mod deadline;
mod dial_requests;
pub mod doctor;
mod error;
mod fork;
mod forward;
mod harden;
pub mod host;
mod kvm_verdict;
mod launch;
mod phases;
mod pool;
mod process;
mod prune;
mod sandbox;
mod session;
mod spec;
mod template;
mod trust_store;

pub use builder::Builder;
pub use channel::{StreamReader, StreamWriter, Tunnel};
pub use chitin_broker::egress::{EgressError, RefusedEgress};
pub use chitin_broker::proxy::{SetupError as ProxySetupError, ValueError as ProxyValueError};
pub use chitin_broker::vault::VaultError;
pub use chitin_broker::{Error as CredentialError, SecretError, SecretValueError, SourceError};
pub use chitin_policy::{self as policy, Consent, Policy, PolicyError};
pub use chitin_protocol::{Exit, Failure, Fault, ReachedLimits, StartError, Usage};
pub use chitin_spec::{
    Boundary, Delivery, EgressLimits, EndCause, Endpoint, HeaderField, KEY_HEADERS,
    ParseEndpointError, ParseScopeError, PathPrefix, ProxyScope, RequestMethod, SecretId,
    SecretSource, SecretSpec, TierKind, TierSelection, VaultConfig, VaultLogin, VaultSource,
    parse_bytes, parse_mib,
};
pub use chitin_text::{error_chain, printable, printable_json};
pub use chitin_tiers::{
    Artifacts, BaselineContainer, Capabilities, ContainerError, Error as TierError, GuestEnd,
    PathError, Pruned, RejectedTier, SelectedTier, Unavailable, take_leftovers,
};
pub use chitin_tree::{Error as TreeError, Summary};
pub use chitin_vmm::jail::{Jail, JailUser, Protection, Speculation};
pub use chitin_vmm::{FailureCode, HostError, SpecError};
pub use cleanup::wait_for_cleanup;
pub use copy::check_copy_target;
pub use error::{CopyDirection, Error, ProbeError, RotationError};
pub use fork::MAX_FORKS;
pub use forward::Forward;
pub use harden::harden_process;
pub use phases::Phases;
pub use pool::{MAX_POOL, Pool};
pub use process::{Command, ECHO, OUTPUT_LIMIT, Output, Process};
pub use prune::prune_tier;
pub use sandbox::Sandbox;
pub use template::build::WarmUpSpec;
pub use template::{Distrust, Manifest, TemplateError, TemplateList, Templates};
