//! The specification of a sandbox as data: tiers, credentials, endpoints and limits, with their text forms.
//!
//! Every other layer imports these types. Nothing here does I/O, and no module imports a layer above it.
#![forbid(unsafe_code)]

mod delivery;
mod endpoint;
mod limits;
mod schema;
mod secret;
mod tier;
mod vault;

pub use delivery::{Delivery, DeliveryKind, ProxyScope};
pub use endpoint::{Endpoint, MAX_HOST, is_numeric};
pub use limits::{EgressLimits, Limits, MAX_MEMORY_MIB, MAX_VCPUS, MIN_MEMORY_MIB};
pub use secret::{ParseSecretError, SecretSource, SecretSpec, check_name};
pub use tier::{Boundary, TierKind};
pub use vault::{SecretId, VaultConfig, VaultLogin, VaultSource};
