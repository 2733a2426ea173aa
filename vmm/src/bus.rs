//! The address spaces of devices, as vCPUs access them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// A device as a vCPU sees it: registers.
///
/// Called on the vCPU that accesses the register, which waits; an implementation must not block on
/// the guest. `offset` is within the device's range and so is the last byte of `data`, which has 1
/// to 8 bytes (more only for string instructions on ports, all at one port).
pub trait BusDevice: Send {
    /// Fills `data` with the contents of the register at `offset`.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Writes `data` to the register at `offset`.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A range of addresses and its device.
struct Slot {
    start: u64,
    length: u64,
    device: Arc<Mutex<dyn BusDevice>>,
}

/// An address space of devices: memory-mapped, or ports. It does not change once the guest runs.
///
/// Lock order: a device's mutex is held for one access and is taken while holding nothing else. A
/// device may wait for the VMM thread inside an access, so the VMM thread must never take one.
#[derive(Default)]
pub struct Bus {
    slots: Vec<Slot>,
    /// Accesses to addresses without a device, or across the end of a device.
    stray_accesses: AtomicU64,
}

/// The address spaces that a vCPU reaches devices in.
#[derive(Default)]
pub struct Buses {
    /// Memory-mapped devices.
    pub mmio: Bus,
    /// Ports.
    pub ports: Bus,
}

impl Bus {
    /// Adds a device at `start`. The ranges are those of the monitor, not the guest's, and do not
    /// overlap.
    pub fn insert(&mut self, start: u64, length: u64, device: Arc<Mutex<dyn BusDevice>>) {
        let overlaps =
            |slot: &Slot| start < slot.start + slot.length && slot.start < start + length;
        debug_assert!(!self.slots.iter().any(overlaps));
        self.slots.push(Slot { start, length, device });
    }

    /// Reads a register. An address without a device reads as all ones, as on hardware.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find_slot(address, data.len()) {
            Some((slot, offset)) => {
                slot.device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
            }
            None => data.fill(0xff),
        }
    }

    /// Writes a register. A write to an address without a device has no effect.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((slot, offset)) = self.find_slot(address, data.len()) {
            slot.device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
        }
    }

    /// Returns the number of accesses that reached no device.
    pub fn stray_accesses(&self) -> u64 {
        self.stray_accesses.load(Ordering::Relaxed)
    }

    fn find_slot(&self, address: u64, bytes: usize) -> Option<(&Slot, u64)> {
        let found = self.slots.iter().find_map(|slot| {
            let offset = address.checked_sub(slot.start)?;
            let end = offset.checked_add(bytes as u64)?;
            (end <= slot.length).then_some((slot, offset))
        });
        if found.is_none() {
            self.stray_accesses.fetch_add(1, Ordering::Relaxed);
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A device whose registers contain their offsets.
    struct Offsets;

    impl BusDevice for Offsets {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap());
        }
        fn write(&mut self, _: u64, _: &[u8]) {}
    }

    #[test]
    fn access_reaches_its_device_or_is_stray() {
        let mut bus = Bus::default();
        bus.insert(0x100, 0x10, Arc::new(Mutex::new(Offsets)));
        bus.insert(u64::MAX - 0xf, 0xf, Arc::new(Mutex::new(Offsets)));
        let read = |address| {
            let mut data = [0; 4];
            bus.read(address, &mut data);
            data
        };
        assert_eq!(read(0x100), [0; 4]);
        assert_eq!(read(0x10c), [0xc; 4]);
        assert_eq!(bus.stray_accesses(), 0);
        for address in [0xff, 0x10d, 0x110, 0, u64::MAX] {
            assert_eq!(read(address), [0xff; 4]);
        }
        bus.write(0, &[0; 8]);
        assert_eq!(bus.stray_accesses(), 6);
    }
}
