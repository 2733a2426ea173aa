//! The barrier between making a guest ready and running it.

use std::sync::{Condvar, Mutex, PoisonError};

/// Holds vCPU threads back until the guest is to run. Its lock is never held while waiting for
/// anything else.
#[derive(Default)]
pub struct StartBarrier {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    open: bool,
    /// Threads that have reached the barrier.
    arrived: usize,
}

impl StartBarrier {
    /// Lets all threads through, now and later.
    pub fn open(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).open = true;
        self.changed.notify_all();
    }

    /// Waits until `count` threads have reached the barrier. They do nothing more before it opens.
    pub fn await_arrivals(&self, count: usize) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.arrived < count {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Arrives at the barrier and waits until it opens.
    pub fn wait(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.arrived += 1;
        self.changed.notify_all();
        while !state.open {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
