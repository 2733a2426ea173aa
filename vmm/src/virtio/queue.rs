//! A queue that a driver has set up, and the one loop over it.
//!
//! Draining, memory barriers, suppression of notifications and the interrupt are in
//! [`ActiveQueue::drain`], once, so that a device is one closure over chains.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::chain::{Chain, DescriptorTable};
use super::{GuestFault, Interrupt, Signal};
use crate::memory::GuestRam;

/// The most chains that one call of [`ActiveQueue::drain`] takes. A guest can add chains as fast as
/// they are taken, and would otherwise keep the VMM thread for itself.
const CHAINS_PER_TURN: usize = 512;

/// The result of a device's work on a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completion {
    /// The chain goes back to the driver with `len` bytes written to it.
    Done {
        /// The bytes written to it.
        len: u32,
    },
    /// The device keeps the chain and passes it to [`ActiveQueue::complete`] later.
    Deferred,
    /// The chain stays in the queue as if it had not been taken, and no more chains are taken.
    Stop,
}

impl Completion {
    /// A chain that goes back with nothing written to it.
    pub const EMPTY: Self = Self::Done { len: 0 };
}

/// The progress of a queue: counts of chains, modulo 2¹⁶.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueuePosition {
    /// Chains taken from the available ring.
    pub next_available: u16,
    /// Chains put into the used ring.
    pub next_used: u16,
}

/// A running queue.
pub struct ActiveQueue {
    index: u16,
    queue: Queue,
    ram: Arc<GuestRam>,
    interrupt: Arc<dyn Interrupt>,
    /// The eventfd of the driver's notifications. The queue itself writes to it to be called again.
    kick: Arc<EventFd>,
}

impl ActiveQueue {
    /// Wraps a queue whose rings were checked to be in `ram`.
    pub fn new(
        index: u16,
        queue: Queue,
        ram: Arc<GuestRam>,
        interrupt: Arc<dyn Interrupt>,
        kick: Arc<EventFd>,
    ) -> Self {
        Self { index, queue, ram, interrupt, kick }
    }

    /// Returns its index in the device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Returns its progress, to be saved. No chain may be deferred.
    pub fn position(&self) -> QueuePosition {
        QueuePosition { next_available: self.queue.next_avail(), next_used: self.queue.next_used() }
    }

    /// Returns whether all chains that the driver has added were taken.
    ///
    /// # Errors
    /// The available ring is invalid.
    pub fn is_empty(&self) -> Result<bool, GuestFault> {
        let invalid = GuestFault::AvailableRing { queue: self.index };
        let index = self.queue.avail_idx(&*self.ram, Ordering::Acquire).map_err(|_| invalid)?;
        Ok(index.0 == self.queue.next_avail())
    }

    /// Asks for another call of the handler, after other work has had its turn.
    pub fn call_again(&self) {
        // A write fails if the counter is full, and then the handler is about to be called.
        let _ = self.kick.write(1);
    }

    /// Passes each available chain to `handle` until there are none, `handle` returns
    /// [`Completion::Stop`], or the turn is over. Then interrupts the driver if it has asked for
    /// that.
    ///
    /// While chains are taken the driver is told not to notify. It is told to notify again only
    /// when the queue is empty: after a [`Completion::Stop`] the caller knows when to go on.
    ///
    /// # Errors
    /// The rings or a chain are invalid, or `handle` failed. Chains completed until then are with
    /// the driver.
    pub fn drain(
        &mut self,
        mut handle: impl FnMut(&mut Chain<'_>) -> Result<Completion, GuestFault>,
    ) -> Result<(), GuestFault> {
        let mut used = false;
        let result = self.take_chains(&mut used, &mut handle);
        if used {
            self.interrupt_driver()?;
        }
        result
    }

    /// Returns a deferred chain to the driver.
    ///
    /// # Errors
    /// The used ring is invalid.
    pub fn complete(&mut self, head: u16, len: u32) -> Result<(), GuestFault> {
        self.push_used(head, len)?;
        self.interrupt_driver()
    }

    /// The loop of [`drain`](Self::drain). Sets `used` if a chain went back to the driver.
    fn take_chains(
        &mut self,
        used: &mut bool,
        handle: &mut dyn FnMut(&mut Chain<'_>) -> Result<Completion, GuestFault>,
    ) -> Result<(), GuestFault> {
        let ram = Arc::clone(&self.ram);
        let invalid = GuestFault::AvailableRing { queue: self.index };
        let (address, size) = (GuestAddress(self.queue.desc_table()), self.queue.size());
        let table = DescriptorTable { queue: self.index, address, size };
        self.queue.disable_notification(&*ram).map_err(|_| invalid)?;
        for _ in 0..CHAINS_PER_TURN {
            let next = self.queue.iter(&*ram).map_err(|_| invalid)?.next();
            let Some(next) = next else {
                // The driver may have added a chain before it saw that notifications are enabled
                // again.
                if self.queue.enable_notification(&*ram).map_err(|_| invalid)? {
                    self.queue.disable_notification(&*ram).map_err(|_| invalid)?;
                    continue;
                }
                return Ok(());
            };
            let mut chain = Chain::read(table, next.head_index(), &ram)?;
            match handle(&mut chain)? {
                Completion::Done { len } => {
                    let head = chain.head;
                    self.push_used(head, len)?;
                    *used = true;
                }
                Completion::Deferred => {}
                Completion::Stop => {
                    self.queue.go_to_previous_position();
                    return Ok(());
                }
            }
        }
        self.call_again();
        Ok(())
    }

    fn push_used(&mut self, head: u16, len: u32) -> Result<(), GuestFault> {
        self.queue
            .add_used(&*self.ram, head, len)
            .map_err(|_| GuestFault::UsedRing { queue: self.index })
    }

    /// Interrupts the driver unless it has suppressed that.
    fn interrupt_driver(&mut self) -> Result<(), GuestFault> {
        let invalid = GuestFault::AvailableRing { queue: self.index };
        let wanted = if self.queue.event_idx_enabled() {
            self.queue.needs_notification(&*self.ram).map_err(|_| invalid)?
        } else {
            let flags = GuestAddress(self.queue.avail_ring());
            let flags: u16 = self.ram.load(flags, Ordering::SeqCst).map_err(|_| invalid)?;
            u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0
        };
        if wanted {
            self.interrupt.trigger(Signal::Queue);
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "queue_test.rs"]
mod tests;
