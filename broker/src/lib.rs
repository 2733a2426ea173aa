//! The host side of egress and credentials: a broker that dials the endpoints that the policy
//! allows, a proxy that replaces placeholders, and the sources of credentials.
//!
//! ```text
//!   DialRequest ──▶ egress::Broker ──▶ the endpoint
//!                        │  └── proxy: intercepts TLS to the hosts of a credential
//!                        └───── aws: serves the keys that SDKs request
//!   CredentialSpec ──▶ credentials::fetch_credentials ──▶ values and Vault leases
//! ```
//!
//! This crate does not know how a sandbox is reached: the caller provides the requests as an
//! [`egress::DialSource`].
#![forbid(unsafe_code)]

pub mod audit_log;
pub mod aws;
pub mod credentials;
pub mod egress;
mod error;
#[cfg(test)]
mod log_test;
pub mod proxy;
mod secret_value;
mod source;
mod tls;
mod token_bucket;
pub mod vault;

pub use audit_log::AuditLog;
pub use error::{Error, SecretError};
pub use secret_value::{SecretValue, SecretValueError};
pub use source::SourceError;
