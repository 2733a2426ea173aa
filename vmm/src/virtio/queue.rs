//! A queue that a driver has set up, and the one loop over it.
//!
//! Draining, memory barriers, suppression of notifications and the interrupt are in [`ActiveQueue::drain`], once, so that
//! a device is one closure over chains. A chain's descriptors are read a single time, so that a guest that changes them
//! meanwhile changes nothing.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};
use vmm_sys_util::eventfd::EventFd;

use super::{GuestFault, Interrupt, Signal};
use crate::memory::GuestRam;

/// How many chains one call of [`ActiveQueue::drain`] takes before other work gets a turn. A guest can add chains as fast as
/// they are taken, and would otherwise keep the VMM thread for itself.
const CHAINS_PER_TURN: usize = 512;

/// What became of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completion {
    /// It goes back to the driver with this many bytes written.
    Done {
        /// Bytes written into it.
        len: u32,
    },
    /// It stays with the device, which hands it to [`ActiveQueue::complete`] later.
    Deferred,
    /// It stays in the queue as if it had not been looked at; nothing more is taken.
    Stop,
}

/// How far a queue has been worked off: counts of chains, modulo 2¹⁶.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// Taken from the available ring.
    pub next_available: u16,
    /// Put into the used ring.
    pub next_used: u16,
}

/// A queue in use, with everything needed to serve it.
pub struct ActiveQueue {
    index: u16,
    queue: Queue,
    ram: Arc<GuestRam>,
    interrupt: Arc<dyn Interrupt>,
    /// What the driver's notifications arrive at; written by ourselves to be called again.
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

    /// Its number in the device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// The descriptor on which the driver's notifications arrive.
    pub fn kick(&self) -> &Arc<EventFd> {
        &self.kick
    }

    /// Where it stands, to be saved. Nothing may be deferred.
    pub fn position(&self) -> Position {
        Position { next_available: self.queue.next_avail(), next_used: self.queue.next_used() }
    }

    /// Whether the driver has added nothing that was not taken yet.
    ///
    /// # Errors
    /// The available ring is broken.
    pub fn is_empty(&self) -> Result<bool, GuestFault> {
        let ring = GuestFault::AvailableRing { queue: self.index };
        let index = self.queue.avail_idx(&*self.ram, Ordering::Acquire).map_err(|_| ring)?;
        Ok(index.0 == self.queue.next_avail())
    }

    /// Hands each available chain to `each` until there are none, `each` says [`Completion::Stop`], or it is somebody
    /// else's turn; then interrupts the driver if it wants to know.
    ///
    /// While chains are taken the driver is told not to notify. It is told to notify again only when the queue is empty:
    /// after a [`Completion::Stop`] it is the caller who knows when to go on.
    ///
    /// # Errors
    /// The rings or a chain are broken, or `each` failed. Chains completed before are with the driver.
    pub fn drain(
        &mut self,
        mut each: impl FnMut(&mut Chain<'_>) -> Result<Completion, GuestFault>,
    ) -> Result<(), GuestFault> {
        let mut used = false;
        let result = self.turn(&mut used, &mut each);
        if used {
            self.notify()?;
        }
        result
    }

    /// Gives a deferred chain back to the driver.
    ///
    /// # Errors
    /// The used ring is broken.
    pub fn complete(&mut self, head: u16, len: u32) -> Result<(), GuestFault> {
        self.push_used(head, len)?;
        self.notify()
    }

    fn turn(
        &mut self,
        used: &mut bool,
        each: &mut dyn FnMut(&mut Chain<'_>) -> Result<Completion, GuestFault>,
    ) -> Result<(), GuestFault> {
        let ram = Arc::clone(&self.ram);
        let ring = GuestFault::AvailableRing { queue: self.index };
        self.queue.disable_notification(&*ram).map_err(|_| ring)?;
        for _ in 0..CHAINS_PER_TURN {
            let next = self.queue.iter(&*ram).map_err(|_| ring)?.next();
            let Some(descriptors) = next else {
                // Nothing left. If the driver added something before it saw that notifications are on again, go on.
                if self.queue.enable_notification(&*ram).map_err(|_| ring)? {
                    self.queue.disable_notification(&*ram).map_err(|_| ring)?;
                    continue;
                }
                return Ok(());
            };
            let mut chain = Chain::read(self.index, descriptors, &ram)?;
            match each(&mut chain)? {
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
        // An eventfd that is full has been written to already.
        let _ = self.kick.write(1);
        Ok(())
    }

    fn push_used(&mut self, head: u16, len: u32) -> Result<(), GuestFault> {
        self.queue
            .add_used(&*self.ram, head, len)
            .map_err(|_| GuestFault::UsedRing { queue: self.index })
    }

    /// Interrupts the driver unless it asked not to be.
    fn notify(&mut self) -> Result<(), GuestFault> {
        let ring = GuestFault::AvailableRing { queue: self.index };
        let wanted = if self.queue.event_idx_enabled() {
            self.queue.needs_notification(&*self.ram).map_err(|_| ring)?
        } else {
            let flags = GuestAddress(self.queue.avail_ring());
            let flags: u16 = self.ram.load(flags, Ordering::SeqCst).map_err(|_| ring)?;
            u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0
        };
        if wanted {
            self.interrupt.trigger(Signal::Queue);
        }
        Ok(())
    }
}

/// One request of a driver: buffers to read from, then buffers to write to, all checked to be in guest memory.
pub struct Chain<'m> {
    /// The first descriptor, which names the chain.
    pub head: u16,
    /// What the driver wants the device to read.
    pub readable: Buffers<'m>,
    /// What the driver wants the device to fill.
    pub writable: Buffers<'m>,
}

impl<'m> Chain<'m> {
    fn read(
        queue: u16,
        chain: DescriptorChain<&'m GuestRam>,
        ram: &'m GuestRam,
    ) -> Result<Self, GuestFault> {
        let head = chain.head_index();
        let broken = GuestFault::Chain { queue, head };
        let mut this = Self { head, readable: Buffers::default(), writable: Buffers::default() };
        let mut complete = false;
        // The iterator ends at the first descriptor that is out of bounds, after as many as the table holds, and at
        // 4 GiB; a chain that ends that way was not finished by the driver.
        for descriptor in chain {
            complete = !descriptor.has_next();
            let buffers = match (descriptor.is_write_only(), this.writable.slices.is_empty()) {
                (true, _) => &mut this.writable,
                (false, true) => &mut this.readable,
                // VIRTIO 1.2, 2.7.4.2: what the device writes comes after what it reads.
                (false, false) => return Err(broken),
            };
            let Ok(bytes) = usize::try_from(descriptor.len()) else { return Err(broken) };
            for slice in GuestMemoryBackend::get_slices(ram, descriptor.addr(), bytes) {
                // Indirect tables may be longer than the queue, but none was offered.
                if buffers.slices.len() >= MAX_SLICES {
                    return Err(broken);
                }
                buffers.push(slice.map_err(|_| GuestFault::Buffer { queue, head })?);
            }
        }
        if complete { Ok(this) } else { Err(broken) }
    }
}

/// The most pieces of guest memory in one direction of a chain: the largest queue of ours has 256 descriptors, and RAM is
/// in two ranges that are not adjacent. Below `IOV_MAX` (1024), so that one system call takes them all.
const MAX_SLICES: usize = 256;

/// Pieces of guest memory, as one run of bytes. Guest memory can change at any time: nothing here hands out a reference.
#[derive(Default)]
pub struct Buffers<'m> {
    slices: Vec<VolatileSlice<'m>>,
    len: usize,
}

impl<'m> Buffers<'m> {
    fn push(&mut self, slice: VolatileSlice<'m>) {
        // At most 4 GiB in a chain, so that this does not overflow.
        self.len += slice.len();
        self.slices.push(slice);
    }

    /// How many bytes are left.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether none are left.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Takes bytes off the front into `bytes`; `None`, and nothing taken, if there are fewer.
    pub fn take(&mut self, bytes: &mut [u8]) -> Option<()> {
        if bytes.len() > self.len {
            return None;
        }
        let mut done = 0;
        for slice in &self.slices {
            done += slice.copy_to(&mut bytes[done..]);
        }
        self.skip(done);
        Some(())
    }

    /// Puts bytes at the front; `None`, and nothing written, if there is less room.
    pub fn put(&mut self, bytes: &[u8]) -> Option<()> {
        if bytes.len() > self.len {
            return None;
        }
        let mut done = 0;
        for slice in &self.slices {
            let count = slice.len().min(bytes.len() - done);
            slice.copy_from(&bytes[done..done + count]);
            done += count;
        }
        self.skip(done);
        Some(())
    }

    /// Drops bytes from the front.
    pub fn skip(&mut self, mut bytes: usize) {
        self.len = self.len.saturating_sub(bytes);
        let mut gone = 0;
        for slice in &mut self.slices {
            if bytes < slice.len() {
                if let Ok(rest) = slice.offset(bytes) {
                    *slice = rest;
                }
                break;
            }
            bytes -= slice.len();
            gone += 1;
        }
        self.slices.drain(..gone);
    }

    /// Splits off the front, as many bytes or as many as there are.
    pub fn split(&mut self, bytes: usize) -> Buffers<'m> {
        let mut front = Buffers::default();
        let mut left = bytes.min(self.len);
        for slice in &self.slices {
            if left == 0 {
                break;
            }
            let count = slice.len().min(left);
            if let Ok(part) = slice.subslice(0, count) {
                front.push(part);
            }
            left -= count;
        }
        self.skip(front.len);
        front
    }

    /// Writes from guest memory into a descriptor, without a copy in between, until one write is short. Returns how many
    /// bytes it took, which are gone from the front.
    ///
    /// # Errors
    /// As `writev(2)`.
    pub fn write_to(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let vectors = self.vectors();
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_possible_wrap,
            reason = "at most MAX_SLICES"
        )]
        let count = vectors.len() as libc::c_int;
        // SAFETY: every vector is a piece of guest memory, which stays mapped while `self` borrows it, and which the
        // kernel only reads. That the guest may write to it meanwhile is the guest's problem.
        let done = unsafe { libc::writev(fd.as_raw_fd(), vectors.as_ptr(), count) };
        self.advance(done)
    }

    /// Reads from a descriptor into guest memory, without a copy in between. Returns how many bytes came, which are gone
    /// from the front; zero at the end of the stream.
    ///
    /// # Errors
    /// As `readv(2)`.
    pub fn read_from(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let vectors = self.vectors();
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_possible_wrap,
            reason = "at most MAX_SLICES"
        )]
        let count = vectors.len() as libc::c_int;
        // SAFETY: every vector is a piece of guest memory, which stays mapped while `self` borrows it, and to which no
        // reference exists: it is only accessed through volatile slices.
        let done = unsafe { libc::readv(fd.as_raw_fd(), vectors.as_ptr(), count) };
        self.advance(done)
    }

    /// Appends all bytes to `out` and takes them off.
    pub fn append_to(&mut self, out: &mut std::collections::VecDeque<u8>) {
        // Guest memory is copied through a page, because a queue of bytes has no uninitialized tail to copy into.
        let mut page = [0; 4096];
        while !self.is_empty() {
            let count = self.len.min(page.len());
            if self.take(&mut page[..count]).is_none() {
                break;
            }
            out.extend(&page[..count]);
        }
    }

    fn vectors(&self) -> Vec<libc::iovec> {
        self.slices
            .iter()
            .map(|slice| libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            })
            .collect()
    }

    fn advance(&mut self, done: isize) -> io::Result<usize> {
        let done = usize::try_from(done).map_err(|_| io::Error::last_os_error())?;
        self.skip(done);
        Ok(done)
    }
}

#[cfg(test)]
#[path = "queue_test.rs"]
pub(crate) mod tests;
