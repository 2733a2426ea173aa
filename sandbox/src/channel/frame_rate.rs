//! A limit of the frames that a guest may send in a second.
//!
//! Each frame costs this side a fraction of a microsecond, and a guest that controls its kernel can
//! send millions of them. Beyond the limit its channel is not read for a while: the frames wait in
//! the guest, and other sandboxes of the process keep their share of the processor.

use std::time::{Duration, Instant};

/// Frames in a second, in the long run. At 0.3 µs for each this is 1 % of a processor. An honest
/// agent sends pieces of up to 64 KiB: so many frames are up to 2 GB.
const FRAMES_PER_SECOND: u64 = 30_000;

/// Frames at once: a tenth of a second's.
const BURST: u64 = FRAMES_PER_SECOND / 10;

/// A token bucket.
#[derive(Debug)]
pub struct FrameRate {
    /// The frames that may be received now. Below zero by at most one full input buffer.
    tokens: i64,
    updated: Instant,
    received: u64,
}

impl FrameRate {
    /// Starts with a full burst.
    pub fn new(now: Instant) -> Self {
        Self { tokens: to_tokens(BURST), updated: now, received: 0 }
    }

    /// Takes the number of all frames received so far. Returns the time for which the channel must
    /// not be read, if the rate is exceeded.
    pub fn charge(&mut self, received: u64, now: Instant) -> Option<Duration> {
        let elapsed = now.saturating_duration_since(self.updated).as_micros();
        let refill = u64::try_from(elapsed).unwrap_or(u64::MAX).min(1_000_000);
        let refill = refill * FRAMES_PER_SECOND / 1_000_000;
        // A fraction of a token is kept for the next time.
        if refill > 0 {
            self.updated = now;
        }
        let spent = received.saturating_sub(std::mem::replace(&mut self.received, received));
        self.tokens = (self.tokens + to_tokens(refill)).min(to_tokens(BURST)) - to_tokens(spent);
        let missing = u64::try_from(-self.tokens).ok().filter(|missing| *missing > 0)?;
        Some(Duration::from_micros(missing * 1_000_000 / FRAMES_PER_SECOND + 1))
    }
}

fn to_tokens(frames: u64) -> i64 {
    i64::try_from(frames).unwrap_or(i64::MAX / 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn burst_passes_and_flood_waits() {
        let start = Instant::now();
        let mut rate = FrameRate::new(start);
        assert_eq!(rate.charge(BURST, start), None);
        let wait = rate.charge(2 * BURST, start).unwrap();
        assert!(wait >= Duration::from_millis(100) && wait < Duration::from_millis(101));
        assert_eq!(rate.charge(2 * BURST, start + wait), None);
    }

    #[test]
    fn rate_is_kept_over_time() {
        let (start, mut now, mut received) = (Instant::now(), Instant::now(), 0);
        let mut rate = FrameRate::new(start);
        while now < start + Duration::from_secs(10) {
            received += 8192;
            now += rate.charge(received, now).unwrap_or(Duration::from_micros(1));
        }
        let expected = 10 * FRAMES_PER_SECOND;
        assert!(received > expected * 9 / 10 && received < expected * 11 / 10, "{received}");
    }

    #[test]
    fn slow_sender_never_waits() {
        let (mut now, mut received) = (Instant::now(), 0);
        let mut rate = FrameRate::new(now);
        for _ in 0..100_000 {
            received += 1;
            now += Duration::from_micros(40);
            assert_eq!(rate.charge(received, now), None);
        }
    }
}
