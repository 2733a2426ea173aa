//! Token buckets: rate limits with a burst.

use std::time::{Duration, Instant};

/// A bucket that refills at a rate, up to its capacity.
#[derive(Debug)]
pub(crate) struct TokenBucket {
    rate: f64,
    capacity: f64,
    tokens: f64,
    refilled: Instant,
}

impl TokenBucket {
    /// Makes a full bucket. `rate` is in tokens per second and greater than 0.
    pub fn new(rate: f64, capacity: f64) -> TokenBucket {
        TokenBucket { rate, capacity, tokens: capacity, refilled: Instant::now() }
    }

    /// Takes a token. Returns false if there is none.
    pub fn try_take(&mut self) -> bool {
        self.refill(Instant::now());
        let available = self.tokens >= 1.0;
        if available {
            self.tokens -= 1.0;
        }
        available
    }

    /// Returns true if there is no token.
    pub fn is_empty(&mut self) -> bool {
        self.refill(Instant::now());
        self.tokens < 1.0
    }

    /// Takes tokens, whether available or not. Returns the time until the debt is paid.
    #[expect(clippy::cast_precision_loss, reason = "limits need no exact byte count")]
    pub fn take_with_debt(&mut self, count: u64) -> Duration {
        self.refill(Instant::now());
        self.tokens -= count as f64;
        Duration::try_from_secs_f64(-self.tokens / self.rate).unwrap_or_default()
    }

    fn refill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.refilled).as_secs_f64();
        self.tokens = (self.tokens + elapsed * self.rate).min(self.capacity);
        self.refilled = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bucket_limits_burst_and_rate() {
        let mut bucket = TokenBucket::new(10.0, 3.0);
        assert_eq!((0..5).filter(|_| bucket.try_take()).count(), 3);
        bucket.refill(bucket.refilled + Duration::from_millis(250));
        assert!(bucket.tokens >= 2.0 && bucket.tokens < 3.0);
        bucket.refill(bucket.refilled + Duration::from_secs(3600));
        assert!(bucket.tokens <= 3.0);
    }

    #[test]
    fn debt_is_paid_at_the_rate() {
        let mut bucket = TokenBucket::new(1000.0, 1000.0);
        assert_eq!(bucket.take_with_debt(1000), Duration::ZERO);
        let wait = bucket.take_with_debt(500).as_secs_f64();
        assert!((0.4..=0.5).contains(&wait), "{wait}");
    }
}
