//! Token buckets: so much in a second, so much at once.

use std::time::{Duration, Instant};

/// Tokens come at a rate and are kept up to a number.
#[derive(Debug)]
pub(crate) struct Bucket {
    rate: f64,
    most: f64,
    tokens: f64,
    filled: Instant,
}

impl Bucket {
    /// Full at first. `rate` is tokens a second and more than 0.
    pub fn new(rate: f64, most: f64) -> Bucket {
        Bucket { rate, most, tokens: most, filled: Instant::now() }
    }

    /// Takes a token, if there is one.
    pub fn take_one(&mut self) -> bool {
        self.fill(Instant::now());
        let there = self.tokens >= 1.0;
        if there {
            self.tokens -= 1.0;
        }
        there
    }

    /// Takes so many, there or not, and says how long it is until they would have been.
    #[expect(clippy::cast_precision_loss, reason = "a byte more or less")]
    pub fn borrow(&mut self, count: u64) -> Duration {
        self.fill(Instant::now());
        self.tokens -= count as f64;
        Duration::try_from_secs_f64(-self.tokens / self.rate).unwrap_or_default()
    }

    fn fill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.filled).as_secs_f64();
        self.tokens = (self.tokens + passed * self.rate).min(self.most);
        self.filled = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn so_much_at_once_and_so_much_in_a_second() {
        let mut bucket = Bucket::new(10.0, 3.0);
        assert_eq!((0..5).filter(|_| bucket.take_one()).count(), 3);
        bucket.fill(bucket.filled + Duration::from_millis(250));
        assert!(bucket.tokens >= 2.0 && bucket.tokens < 3.0);
        bucket.fill(bucket.filled + Duration::from_secs(3600));
        assert!(bucket.tokens <= 3.0);
    }

    #[test]
    fn a_debt_takes_time() {
        let mut bucket = Bucket::new(1000.0, 1000.0);
        assert_eq!(bucket.borrow(1000), Duration::ZERO);
        let wait = bucket.borrow(500).as_secs_f64();
        assert!((0.4..=0.5).contains(&wait), "{wait}");
    }
}
