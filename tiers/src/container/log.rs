//! The last output of a container, in memory.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The last output of the agent and its runtime. Untrusted text.
#[derive(Debug, Clone, Default)]
pub(crate) struct Log(Arc<Mutex<VecDeque<u8>>>);

impl Log {
    /// Capacity in bytes: some hundred lines.
    const CAPACITY: usize = 16 * 1024;

    fn lock(&self) -> MutexGuard<'_, VecDeque<u8>> {
        // A panic cannot leave the bytes inconsistent.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends bytes and drops the oldest ones beyond the capacity.
    pub fn push(&self, bytes: &[u8]) {
        let mut buffer = self.lock();
        buffer.extend(bytes);
        let surplus = buffer.len().saturating_sub(Log::CAPACITY);
        buffer.drain(..surplus);
    }

    /// Returns the content.
    pub fn to_text(&self) -> String {
        let bytes: Vec<u8> = self.lock().iter().copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Returns the last line that is not blank.
    pub fn last_line(&self) -> Option<String> {
        let text = self.to_text();
        text.lines().rev().map(str::trim).find(|line| !line.is_empty()).map(str::to_owned)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_log_drops_the_oldest_bytes() {
        let log = Log::default();
        log.push(&vec![b'x'; 3 * Log::CAPACITY]);
        log.push(b"\nwhy\n\n");
        assert_eq!(log.to_text().len(), Log::CAPACITY);
        assert_eq!(log.last_line().as_deref(), Some("why"));
        assert_eq!(Log::default().last_line(), None);
    }
}
