//! The times at which one lease is renewed. Every decision is a function of a given time.

use std::time::Duration;

use tokio::time::Instant;

/// The minimum time between two attempts to renew a lease. It protects a server that is down.
pub(crate) const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// The time between two attempts to reissue a secret whose lease has expired.
pub(crate) const EXPIRED_RETRY_PAUSE: Duration = Duration::from_secs(15);

/// The longest TTL in seconds, 100 years, so that no time overflows. The longest default of Vault
/// is 32 days.
const MAX_TTL_SECONDS: u64 = 100 * 366 * 24 * 3600;

/// The lease of a token or of a secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lease {
    pub expires_at: Instant,
    /// The lease duration at the last renewal.
    pub ttl: Duration,
    pub renewable: bool,
}

impl Lease {
    /// Makes the lease that a server grants at `now`. Returns `None` if it never expires.
    pub fn new(ttl_seconds: u64, renewable: bool, now: Instant) -> Option<Lease> {
        let ttl = Duration::from_secs(ttl_seconds.min(MAX_TTL_SECONDS));
        (ttl_seconds > 0).then(|| Lease { expires_at: now + ttl, ttl, renewable })
    }
}

/// A lease and the time of its next renewal.
///
/// ```text
///   issued ──two thirds of the TTL──▶ renewal ──ok──▶ again after two thirds of the new TTL
///                                        └──failed──▶ again after a quarter of the rest, at least
///                                                     1 s, and at the expiry; then every 15 s
/// ```
#[derive(Debug)]
pub(crate) struct LeaseSchedule {
    pub lease: Lease,
    /// The TTL when the secret was issued.
    issued_ttl: Duration,
    next_attempt: Instant,
    /// The last attempt failed.
    failing: bool,
    /// Another secret replaces this one. Its lease is no longer renewed.
    superseded: bool,
    /// The lease has expired, and its expiry was reported.
    expiry_reported: bool,
}

/// The result of a failed renewal.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct RenewalFailure {
    /// The time until the lease expires. Zero: it has expired.
    pub remaining: Duration,
    /// This is the first failure since the last success.
    pub first: bool,
}

impl LeaseSchedule {
    pub fn new(lease: Lease) -> LeaseSchedule {
        LeaseSchedule {
            // A third of the TTL is left for retries.
            next_attempt: lease.expires_at - lease.ttl / 3,
            issued_ttl: lease.ttl,
            lease,
            failing: false,
            superseded: false,
            expiry_reported: false,
        }
    }

    /// Returns the time of the next attempt. `reissuable`: another secret can replace this one, so
    /// that an attempt is useful even if the lease is not renewable.
    pub fn due_at(&self, reissuable: bool) -> Option<Instant> {
        let useful = !self.superseded && (self.lease.renewable || reissuable);
        useful.then_some(self.next_attempt)
    }

    pub fn is_due(&self, reissuable: bool, now: Instant) -> bool {
        self.due_at(reissuable).is_some_and(|due_at| due_at <= now)
    }

    /// Returns true if a renewal extends the lease enough to continue. Close to the maximum TTL, a
    /// server grants less and less: below half of the first TTL, a reissue is better.
    pub fn extends_enough(&self, renewed: &Lease, reissuable: bool, now: Instant) -> bool {
        renewed.expires_at > now + RETRY_PAUSE && !(reissuable && renewed.ttl < self.issued_ttl / 2)
    }

    /// Starts again with a renewed lease.
    pub fn record_renewal(&mut self, lease: Lease) {
        *self = LeaseSchedule { issued_ttl: self.issued_ttl, ..LeaseSchedule::new(lease) };
    }

    /// Records a renewal after which the lease is used until it expires, without another renewal.
    pub fn mark_final(&mut self, lease: Lease) {
        self.lease = Lease { renewable: false, ..lease };
    }

    /// Limits the lease to the time at which its token expires, and makes a reissue due at once.
    pub fn end_by(&mut self, expires_at: Instant, now: Instant) {
        self.lease.expires_at = self.lease.expires_at.min(expires_at);
        self.lease.renewable = false;
        self.next_attempt = now;
    }

    pub fn mark_superseded(&mut self) {
        self.superseded = true;
    }

    /// Returns true if the lease is superseded and has expired, so that nothing is left to revoke.
    pub fn is_obsolete(&self, now: Instant) -> bool {
        self.superseded && self.lease.expires_at <= now
    }

    /// Records a failed attempt, and schedules the next one.
    pub fn record_failure(&mut self, now: Instant) -> RenewalFailure {
        let remaining = self.lease.expires_at.saturating_duration_since(now);
        self.next_attempt = match remaining.is_zero() {
            true => now + EXPIRED_RETRY_PAUSE,
            // The last attempt is at the expiry.
            false => (now + (remaining / 4).max(RETRY_PAUSE)).min(self.lease.expires_at),
        };
        RenewalFailure { remaining, first: !std::mem::replace(&mut self.failing, true) }
    }

    /// Returns true at the first call: the expiry is reported once.
    pub fn report_expiry(&mut self) -> bool {
        !std::mem::replace(&mut self.expiry_reported, true)
    }

    pub fn is_expiry_reported(&self) -> bool {
        self.expiry_reported
    }

    /// Returns true if more than a quarter of the TTL is left.
    pub fn is_fresh(&self, now: Instant) -> bool {
        self.lease.expires_at > now + self.lease.ttl / 4
    }

    /// Returns the time since the expiry of a lease that was still in use.
    pub fn expired_for(&self, now: Instant) -> Option<Duration> {
        let expired = now.checked_duration_since(self.lease.expires_at);
        expired.filter(|_| !self.superseded)
    }
}

#[cfg(test)]
#[path = "lease_schedule_test.rs"]
mod tests;
