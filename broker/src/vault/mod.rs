//! Credentials of a Vault server: log in, read each secret once, renew the leases, and revoke them
//! at the end.
//!
//! ```text
//!   VAULT_TOKEN ────────────────┐
//!   VAULT_ROLE_ID + SECRET_ID ──┴─▶ VaultClient ──read──▶ fields ──▶ LeaseRenewer ──▶ revoke
//!                                                                    renews leases; then logs in
//!                                                                    and reads the secrets again
//! ```
//!
//! | file | contents |
//! |---|---|
//! | `config` | the login that the environment names |
//! | `client` | requests of the HTTP API |
//! | `wire` | responses, wiped after use |
//! | `reader` | the secrets of one sandbox, each read once |
//! | `lease_schedule` | the times of renewal, without clock or I/O |
//! | `lease_renewal` | the task that renews and revokes |

mod client;
mod config;
mod error;
mod lease_renewal;
mod lease_schedule;
mod reader;
mod wire;

pub(crate) use client::VaultClient;
pub(crate) use config::config_from_env;
pub use error::{ConnectionFailure, VaultError};
pub use lease_renewal::{Change, Changes, LeaseRenewer};
pub(crate) use lease_renewal::{CurrentSecret, LeaseReader};
pub(crate) use reader::VaultReader;
pub use reader::select_field;
pub use wire::Fields;
pub(crate) use wire::WipedJson;

/// The maximum number of fields of one secret: each becomes a credential, and the agent accepts 64.
pub(crate) const MAX_FIELDS: usize = 64;

#[cfg(test)]
#[path = "vault_test/mod.rs"]
mod tests;
