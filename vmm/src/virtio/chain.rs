//! Descriptor chains: one request of a driver, as buffers in guest memory.
//!
//! A chain's descriptors are read a single time, so that a guest that changes them meanwhile
//! changes nothing.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::GuestFault;
use crate::memory::GuestRam;

/// The most pieces of guest memory in one direction of a chain. The longest queue has 128
/// descriptors, and RAM consists of two ranges that are not adjacent, so that a buffer is at most
/// two pieces. Below `IOV_MAX` (1024): one system call takes them all.
const MAX_SLICES: usize = 256;

/// The flags that a descriptor may have without a negotiated feature (VIRTIO 1.2, 2.7.5). Indirect
/// tables (`VIRTQ_DESC_F_INDIRECT`) and the flags of packed queues need features that are not
/// offered.
#[expect(clippy::cast_possible_truncation, reason = "flags have 16 bits")]
const KNOWN_FLAGS: u16 = (VRING_DESC_F_NEXT | VRING_DESC_F_WRITE) as u16;

/// The descriptor table of a queue.
#[derive(Clone, Copy)]
pub(super) struct DescriptorTable {
    pub queue: u16,
    pub address: GuestAddress,
    pub size: u16,
}

impl DescriptorTable {
    /// Reads the descriptors of a chain, at most as many as the table holds and at most 4 GiB of
    /// buffers. The crate virtio-queue has an iterator for this, which follows indirect tables
    /// whether or not they were negotiated.
    fn read_chain(
        self,
        head: u16,
        ram: &GuestRam,
        mut visit: impl FnMut(Descriptor) -> Result<(), GuestFault>,
    ) -> Result<(), GuestFault> {
        let DescriptorTable { queue, address, size } = self;
        let invalid = GuestFault::Chain { queue, head };
        let (mut index, mut bytes) = (head, 0u32);
        for _ in 0..size {
            if index >= size {
                return Err(invalid);
            }
            let offset = u64::from(index) * size_of::<Descriptor>() as u64;
            let at = address.0.checked_add(offset).ok_or(invalid)?;
            let descriptor: Descriptor = ram.read_obj(GuestAddress(at)).map_err(|_| invalid)?;
            if descriptor.flags() & !KNOWN_FLAGS != 0 {
                let flags = descriptor.flags();
                return Err(GuestFault::DescriptorFlags { queue, head, flags });
            }
            // VIRTIO 1.2, 2.7.5.2: a chain has at most 4 GiB.
            bytes = bytes.checked_add(descriptor.len()).ok_or(invalid)?;
            visit(descriptor)?;
            if !descriptor.has_next() {
                return Ok(());
            }
            index = descriptor.next();
        }
        Err(invalid)
    }
}

/// One request of a driver: buffers to read from, then buffers to write to, all checked to be in
/// guest memory.
pub struct Chain<'m> {
    /// The index of the first descriptor, which identifies the chain.
    pub head: u16,
    /// The buffers that the device reads.
    pub readable: Buffers<'m>,
    /// The buffers that the device writes.
    pub writable: Buffers<'m>,
}

impl<'m> Chain<'m> {
    /// Reads the descriptors of a chain.
    ///
    /// # Errors
    /// The chain is invalid, or one of its buffers is not in guest memory.
    pub(super) fn read(
        table: DescriptorTable,
        head: u16,
        ram: &'m GuestRam,
    ) -> Result<Self, GuestFault> {
        let queue = table.queue;
        let invalid = GuestFault::Chain { queue, head };
        let mut this = Self { head, readable: Buffers::default(), writable: Buffers::default() };
        table.read_chain(head, ram, |descriptor| {
            let buffers = match (descriptor.is_write_only(), this.writable.slices.is_empty()) {
                (true, _) => &mut this.writable,
                (false, true) => &mut this.readable,
                // VIRTIO 1.2, 2.7.4.2: the buffers to write come after those to read.
                (false, false) => return Err(invalid),
            };
            let Ok(bytes) = usize::try_from(descriptor.len()) else { return Err(invalid) };
            for slice in GuestMemoryBackend::get_slices(ram, descriptor.addr(), bytes) {
                if buffers.slices.len() >= MAX_SLICES {
                    return Err(invalid);
                }
                buffers.push(slice.map_err(|_| GuestFault::BufferAddress { queue, head })?);
            }
            Ok(())
        })?;
        Ok(this)
    }
}

/// Pieces of guest memory that form one run of bytes. Every method takes the bytes it handles off
/// the front. The guest can change its memory at any time, so no method returns a reference to it.
#[derive(Default)]
pub struct Buffers<'m> {
    slices: Vec<VolatileSlice<'m>>,
    len: usize,
}

impl<'m> Buffers<'m> {
    fn push(&mut self, slice: VolatileSlice<'m>) {
        // A chain has at most 4 GiB, so that this does not overflow.
        self.len += slice.len();
        self.slices.push(slice);
    }

    /// Returns how many bytes are left.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns whether no bytes are left.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Fills `bytes` from guest memory. Returns `None`, and takes nothing, if fewer bytes are left.
    pub fn read_bytes(&mut self, bytes: &mut [u8]) -> Option<()> {
        if bytes.len() > self.len {
            return None;
        }
        let mut done = 0;
        for slice in &self.slices {
            done += slice.copy_to(&mut bytes[done..]);
        }
        self.skip_bytes(done);
        Some(())
    }

    /// Writes all of `bytes` to guest memory. Returns `None`, and writes nothing, if there is less
    /// room.
    pub fn write_bytes(&mut self, bytes: &[u8]) -> Option<()> {
        if bytes.len() > self.len {
            return None;
        }
        let mut done = 0;
        for slice in &self.slices {
            let count = slice.len().min(bytes.len() - done);
            slice.copy_from(&bytes[done..done + count]);
            done += count;
        }
        self.skip_bytes(done);
        Some(())
    }

    /// Appends all bytes to `out`.
    pub fn append_to(&mut self, out: &mut VecDeque<u8>) {
        // Guest memory is copied through a page, because a deque has no uninitialized tail to copy
        // into.
        let mut page = [0; 4096];
        while !self.is_empty() {
            let count = self.len.min(page.len());
            if self.read_bytes(&mut page[..count]).is_none() {
                break;
            }
            out.extend(&page[..count]);
        }
    }

    /// Splits off the first `bytes` bytes, or all if there are fewer.
    pub fn split_front(&mut self, bytes: usize) -> Buffers<'m> {
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
        self.skip_bytes(front.len);
        front
    }

    /// Writes from guest memory to a descriptor without a copy in between. Returns how many bytes
    /// were written.
    ///
    /// # Errors
    /// As for `writev(2)`.
    pub fn write_to_fd(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let (vectors, count) = self.io_vectors();
        // SAFETY: `vectors` holds `count` entries. Each is a piece of guest memory, which stays
        // mapped for `'m`, and the kernel only reads it. A guest that writes to it meanwhile
        // garbles its own output.
        let done = unsafe { libc::writev(fd.as_raw_fd(), vectors.as_ptr(), count) };
        self.skip_done(done)
    }

    /// Reads from a descriptor into guest memory without a copy in between. Returns how many bytes
    /// were read; zero is the end of the stream.
    ///
    /// # Errors
    /// As for `readv(2)`.
    pub fn read_from_fd(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let (vectors, count) = self.io_vectors();
        // SAFETY: `vectors` holds `count` entries. Each is a piece of guest memory, which stays
        // mapped for `'m`, and to which no reference exists: it is accessed through volatile slices
        // alone.
        let done = unsafe { libc::readv(fd.as_raw_fd(), vectors.as_ptr(), count) };
        self.skip_done(done)
    }

    /// Returns the slices for `readv` and `writev`. Safe wrappers of these calls take `IoSlice`,
    /// which is a reference, and there must be none to memory that a guest changes.
    fn io_vectors(&self) -> (Vec<libc::iovec>, libc::c_int) {
        let vectors: Vec<_> = self
            .slices
            .iter()
            .map(|slice| libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            })
            .collect();
        let count = libc::c_int::try_from(vectors.len()).unwrap_or(libc::c_int::MAX);
        (vectors, count)
    }

    /// Takes off the bytes that a system call has handled.
    fn skip_done(&mut self, done: isize) -> io::Result<usize> {
        let done = usize::try_from(done).map_err(|_| io::Error::last_os_error())?;
        self.skip_bytes(done);
        Ok(done)
    }

    fn skip_bytes(&mut self, mut bytes: usize) {
        self.len = self.len.saturating_sub(bytes);
        let mut emptied = 0;
        for slice in &mut self.slices {
            if bytes < slice.len() {
                if let Ok(rest) = slice.offset(bytes) {
                    *slice = rest;
                }
                break;
            }
            bytes -= slice.len();
            emptied += 1;
        }
        self.slices.drain(..emptied);
    }
}

#[cfg(test)]
#[path = "chain_test.rs"]
mod tests;
