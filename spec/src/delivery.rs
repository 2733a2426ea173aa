//! The ways in which a credential reaches the workload.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::proxy_scope::ProxyScope;

/// The way in which the workload gets a credential.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Delivery {
    /// A file in memory that the workload cannot change. `NAME_FILE` is its path.
    Memory,
    /// The environment variable `NAME`. Every process that the workload starts can read it.
    Env,
    /// No delivery: the environment variable `NAME` holds a placeholder, and the broker replaces
    /// the placeholder in requests to the named hosts.
    Proxy(ProxyScope),
    /// An address of the sandbox from which AWS SDKs fetch access keys, repeatedly. At most one
    /// credential of a sandbox is delivered this way.
    Endpoint,
}

impl Delivery {
    /// Returns the same without its parameters.
    pub fn kind(&self) -> DeliveryKind {
        match self {
            Delivery::Memory => DeliveryKind::Memory,
            Delivery::Env => DeliveryKind::Env,
            Delivery::Proxy(_) => DeliveryKind::Proxy,
            Delivery::Endpoint => DeliveryKind::Endpoint,
        }
    }
}

/// A [`Delivery`] without its parameters, as a policy names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DeliveryKind {
    /// A file in memory that the variable `NAME_FILE` names.
    Memory,
    /// The environment variable `NAME`. Every process that the workload starts can read it.
    Env,
    /// A placeholder in the environment variable `NAME` that the broker replaces in requests to
    /// `hosts`.
    Proxy,
    /// AWS access keys that SDKs fetch from an address in the sandbox. At most one credential.
    Endpoint,
}

impl DeliveryKind {
    /// Returns the word that a policy uses.
    pub fn name(self) -> &'static str {
        match self {
            DeliveryKind::Memory => "memory",
            DeliveryKind::Env => "env",
            DeliveryKind::Proxy => "proxy",
            DeliveryKind::Endpoint => "endpoint",
        }
    }
}
