//! How a credential gets to the workload.

use crate::endpoint::Endpoint;

/// How the workload gets a credential.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Delivery {
    /// As a sealed file in memory, inherited, that `NAME_FILE` names.
    Memory,
    /// As the environment variable `NAME`, which everything that the workload starts sees.
    Env,
    /// Not at all: the environment variable `NAME` is a placeholder, which is replaced on its way to the named hosts.
    Proxy(ProxyScope),
    /// When it asks: keys of AWS, which its SDKs fetch from an address of the sandbox's own, again and again. For one credential.
    Endpoint,
}

/// How one that was fetched gets there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeliveryKind {
    /// [`Delivery::Memory`]
    Memory,
    /// [`Delivery::Env`]
    Env,
    /// [`Delivery::Proxy`]
    Proxy,
    /// [`Delivery::Endpoint`]
    Endpoint,
}

impl DeliveryKind {
    /// In the words of a policy.
    pub fn name(self) -> &'static str {
        match self {
            DeliveryKind::Memory => "memory",
            DeliveryKind::Env => "env",
            DeliveryKind::Proxy => "proxy",
            DeliveryKind::Endpoint => "endpoint",
        }
    }
}

/// Where a credential is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxyScope {
    /// The hosts that get it, over TLS at these ports.
    pub hosts: Vec<Endpoint>,
    /// Whether its placeholder is also replaced in the query of a URL, which servers write to their logs.
    pub query: bool,
    /// Whether its placeholder is also replaced in bodies of up to 1 MiB.
    pub body: bool,
}
