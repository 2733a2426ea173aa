//! Egress of a sandbox without a network: the broker on the host dials the endpoints that the
//! policy allows, and nothing else.
//!
//! ```text
//!   Dial of the agent ─▶ name, port allowed? ─▶ limits ─▶ resolve ─▶ public address? ─▶ connect
//!          │                     │                 │          │             │              │
//!          └─ refused, recorded ◀┴─────────────────┴──────────┴─────────────┘      bytes both ways
//! ```
//!
//! The agent checks names, too, so that the workload gets an error of name resolution. Nothing
//! relies on that: a compromised guest can send any Dial. The host parses no packets, and it dials
//! the address that it has checked: a name cannot resolve to another one in between.

mod address;
mod broker;
mod dial;
mod dial_source;
mod notice;
mod refusal;
mod resolve;
mod spec;
mod splice;

pub use broker::Broker;
pub use dial_source::{DialRequest, DialSource, Ended};
pub(crate) use notice::RefusalNotices;
pub use notice::{RefusalObserver, RefusedEgress};
pub use spec::{EgressError, EgressSpec};
pub use splice::{SpliceError, TransferCounts, TransferLimits, splice};

#[cfg(test)]
#[path = "egress_test/mod.rs"]
mod tests;
