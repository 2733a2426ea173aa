//! The reasons for which there is no connection. Their texts are reasons in the audit log.

use std::io;

use super::address::AddressRange;
use super::dial::{CONNECT_LIMIT, RESOLVE_LIMIT};
use crate::audit_log::Verdict;

/// A reason for which a request for a connection is refused or fails.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    #[error("not a valid host name")]
    InvalidName,
    #[error("an IP address is not accepted")]
    AddressLiteral,
    #[error("the policy does not list it")]
    Policy,
    #[error("too many new connections a second")]
    DialRate,
    #[error("too many concurrent connections")]
    ConnectionLimit,
    #[error("the sandbox reached its limit of bytes")]
    ByteLimit,
    #[error("the audit file cannot be written")]
    Audit,
    #[error("the name resolves to {}{}", .0.description(), private_hint(*.0))]
    Address(AddressRange),
    #[error("the name resolves to this host")]
    ThisHost,
    #[error("the name does not resolve: {0}")]
    Resolve(io::Error),
    #[error("the name has no address")]
    NoAddress,
    #[error("the name did not resolve within {} s", RESOLVE_LIMIT.as_secs())]
    ResolveTimedOut,
    #[error("connect: {0}")]
    Connect(io::Error),
    #[error("the endpoint did not answer within {} s", CONNECT_LIMIT.as_secs())]
    ConnectTimedOut,
    #[error("the sandbox ended")]
    SandboxEnded,
}

fn private_hint(range: AddressRange) -> &'static str {
    if range.is_private() { ", which needs --allow-private" } else { "" }
}

impl Refusal {
    /// Returns the remedy, for the user who started the sandbox; none if there is none, or if the
    /// reason names it.
    pub fn remedy(&self) -> Option<&'static str> {
        match self {
            Refusal::Policy => Some("--allow HOST:PORT or the policy permits it"),
            Refusal::AddressLiteral => Some("connect to a name that --allow lists"),
            Refusal::ConnectionLimit => Some("--egress-connections raises the limit"),
            Refusal::ByteLimit => Some("--egress-bytes raises the limit"),
            Refusal::ThisHost => Some("--allow-private permits it"),
            Refusal::Audit => Some("free space for the file of --audit"),
            Refusal::InvalidName
            | Refusal::DialRate
            | Refusal::Address(_)
            | Refusal::Resolve(_)
            | Refusal::NoAddress
            | Refusal::ResolveTimedOut
            | Refusal::Connect(_)
            | Refusal::ConnectTimedOut
            | Refusal::SandboxEnded => None,
        }
    }

    /// Returns the verdict of the audit log: a rule refused the request, or an attempt failed.
    pub fn verdict(&self) -> Verdict {
        match self {
            Refusal::InvalidName
            | Refusal::AddressLiteral
            | Refusal::Policy
            | Refusal::DialRate
            | Refusal::ConnectionLimit
            | Refusal::ByteLimit
            | Refusal::Audit
            | Refusal::Address(_)
            | Refusal::ThisHost => Verdict::Refused,
            Refusal::Resolve(_)
            | Refusal::NoAddress
            | Refusal::ResolveTimedOut
            | Refusal::Connect(_)
            | Refusal::ConnectTimedOut
            | Refusal::SandboxEnded => Verdict::Failed,
        }
    }
}
