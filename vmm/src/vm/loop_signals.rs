//! Signals of the event loop's subscribers to the loop itself.

use std::cell::{Cell, RefCell};

use super::end::End;

/// The signals. Subscribers set them, and the loop reads them after each round of events.
#[derive(Default)]
pub(super) struct LoopSignals {
    /// The guest is to be stopped.
    pub stop: Cell<bool>,
    /// The host may have sent a request.
    pub control_ready: Cell<bool>,
    end: RefCell<Option<End>>,
    frozen: Cell<Frozen>,
}

/// Progress of a guest that waits to be saved, which is reported once.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Frozen {
    #[default]
    No,
    Unreported,
    Reported,
}

impl LoopSignals {
    /// Ends the guest. Only the first end is kept.
    pub fn set_end(&self, end: End) {
        self.end.borrow_mut().get_or_insert(end);
    }

    /// Takes the end that a device caused.
    pub fn take_end(&self) -> Option<End> {
        self.end.take()
    }

    /// Notes that the guest waits to be saved.
    pub fn set_frozen(&self) {
        if self.frozen.get() == Frozen::No {
            self.frozen.set(Frozen::Unreported);
        }
    }

    /// Returns true once after the guest began to wait to be saved.
    pub fn take_frozen(&self) -> bool {
        let unreported = self.frozen.get() == Frozen::Unreported;
        if unreported {
            self.frozen.set(Frozen::Reported);
        }
        unreported
    }
}
