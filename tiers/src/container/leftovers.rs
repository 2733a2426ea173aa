//! The objects that clean-up in the background could not remove, until the program reports them.

use std::sync::{Mutex, PoisonError};

/// Maximum number of objects that are remembered.
const CAPACITY: usize = 64;

static LEFTOVERS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Remembers an object that could not be removed.
pub(crate) fn report_leftover(leftover: String) {
    tracing::warn!(leftover, "could not be removed");
    let mut leftovers = LEFTOVERS.lock().unwrap_or_else(PoisonError::into_inner);
    if leftovers.len() < CAPACITY {
        leftovers.push(leftover);
    }
}

/// Returns the objects that clean-up in the background could not remove since the last call, each
/// with the reason.
pub fn take_leftovers() -> Vec<String> {
    std::mem::take(&mut *LEFTOVERS.lock().unwrap_or_else(PoisonError::into_inner))
}
