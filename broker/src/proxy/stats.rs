//! The outcome of the requests of one connection, for the audit log.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::blocked::BlockReason;

/// Blocked requests of one connection that are recorded with their reasons.
const MAX_BLOCKED: usize = 16;

/// Statistics of one connection through the proxy.
#[derive(Debug, Default)]
pub(crate) struct ProxyStats {
    counters: Mutex<Counters>,
}

#[derive(Debug, Default)]
struct Counters {
    requests: u64,
    scrubbed: u64,
    delivered: BTreeSet<String>,
    blocked: Vec<BlockReason>,
    blocked_more: u64,
}

impl ProxyStats {
    fn counters(&self) -> MutexGuard<'_, Counters> {
        self.counters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn count_request(&self) {
        self.counters().requests += 1;
    }

    /// Counts a message of the endpoint in which a value was scrubbed.
    pub(super) fn count_scrubbed(&self) {
        self.counters().scrubbed += 1;
    }

    pub(super) fn record_delivery(&self, credential: &str) {
        let mut counters = self.counters();
        if !counters.delivered.contains(credential) {
            counters.delivered.insert(credential.to_owned());
        }
    }

    pub(super) fn record_blocked(&self, reason: BlockReason) {
        let mut counters = self.counters();
        if counters.blocked.len() < MAX_BLOCKED {
            counters.blocked.push(reason);
        } else {
            counters.blocked_more += 1;
        }
    }

    /// Returns the names of the credentials that were sent to the endpoint.
    pub fn delivered_credentials(&self) -> Vec<String> {
        self.counters().delivered.iter().cloned().collect()
    }

    /// Returns the number of requests that were sent to the endpoint.
    pub fn request_count(&self) -> u64 {
        self.counters().requests
    }

    /// Returns the number of the endpoint's messages in which a value was scrubbed.
    pub fn scrubbed_count(&self) -> u64 {
        self.counters().scrubbed
    }

    /// Returns the reasons of the first blocked requests, and the number of further ones.
    pub fn blocked_requests(&self) -> (Vec<BlockReason>, u64) {
        let counters = self.counters();
        (counters.blocked.clone(), counters.blocked_more)
    }
}
