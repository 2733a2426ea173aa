//! The host's half of egress and credentials: a broker that dials what the policy allows, and what goes with it.
//!
//! ```text
//!   DialRequest ──▶ egress::Broker ──▶ the endpoint
//!                        │  └── proxy: TLS to a credential's hosts, its placeholder replaced on the way
//!                        └───── aws: keys that SDKs fetch, answered here
//!   CredentialSpec ──▶ credentials::fetch_credentials ──▶ values, and leases of a vault that are renewed and revoked
//! ```
//!
//! Nothing here knows how a sandbox is reached: whoever runs one brings its requests as a [`egress::DialSource`].
#![forbid(unsafe_code)]

pub mod audit_log;
pub mod aws;
mod bucket;
pub mod credentials;
pub mod egress;
mod error;
#[cfg(test)]
mod log_test;
pub mod proxy;
mod secret_value;
mod source;
mod tls;
pub mod vault;

pub use audit_log::AuditLog;
pub use error::Error;
pub use secret_value::SecretValue;
