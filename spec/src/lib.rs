//! The specification of a sandbox as data: tiers, credentials, endpoints and limits, each with its
//! text form.
//!
//! Every other layer imports these types. This crate does no I/O and imports no layer but the
//! protocol.
#![forbid(unsafe_code)]

mod delivery;
mod end;
mod endpoint;
mod limits;
mod proxy_scope;
mod schema;
mod secret;
mod secret_hosts;
mod size;
mod tier;
mod vault;

pub use chitin_protocol::ReachedLimits;
pub use delivery::{Delivery, DeliveryKind};
pub use end::EndCause;
pub use endpoint::{Endpoint, EndpointError, MAX_HOST, ParseEndpointError, is_numeric};
pub use limits::{EgressLimits, Limits, MAX_MEMORY_MIB, MAX_VCPUS, MIN_MEMORY_MIB};
pub use proxy_scope::{
    HeaderField, KEY_HEADERS, ParseScopeError, PathPrefix, ProxyScope, RequestMethod,
};
pub use secret::{ParseSecretError, SecretSource, SecretSpec, check_name};
pub use secret_hosts::{ParseHostsError, SecretHostError};
pub use size::{Mebibytes, ParseSizeError, parse_bytes, parse_mib};
pub use tier::{Boundary, ParseTierError, ParseTierSelectionError, TierKind, TierSelection};
pub use vault::{ParseVaultSourceError, SecretId, VaultConfig, VaultLogin, VaultSource};
