//! Registers, of both devices, in any order and size, with anything in memory.
#![no_main]

use chitin_fuzz::{Choices, Device, RAM_BYTES};
use chitin_vmm::bus::BusDevice;
use chitin_vmm::virtio::VirtioDevice;
use chitin_vmm::virtio::pmem::Pmem;
use chitin_vmm::virtio::vsock::{ChannelSlot, Vsock};
use libfuzzer_sys::fuzz_target;
use vm_memory::GuestAddress;

fn model(vsock: bool) -> Box<dyn VirtioDevice> {
    if vsock {
        Box::new(Vsock::new(ChannelSlot::default(), true))
    } else {
        Box::new(Pmem::new(GuestAddress(1 << 32), 2 << 20))
    }
}

fuzz_target!(|data: &[u8]| {
    let mut choices = Choices(data);
    let vsock = choices.byte() & 1 != 0;
    let mut device = Device::new(model(vsock));
    while !choices.is_empty() {
        match choices.byte() % 8 {
            0 => {
                let (register, value) = (u64::from(choices.byte()) * 4, choices.word());
                device.set(register, value);
            }
            1 => {
                let (offset, bytes) = (choices.short(), choices.byte() % 8 + 1);
                device.transport().read(offset.into(), &mut vec![0; bytes.into()]);
            }
            2 => {
                let (offset, bytes) = (choices.short(), choices.byte() % 8 + 1);
                let mut value = vec![0; bytes.into()];
                for (byte, chosen) in value.iter_mut().zip(choices.bytes(bytes.into())) {
                    *byte = *chosen;
                }
                device.transport().write(offset.into(), &value);
            }
            3 => {
                device.with_handler(|handler| handler.on_kick());
            }
            4 => {
                let (address, count) = (choices.number(3) % RAM_BYTES, choices.byte());
                device.put(address, choices.bytes(count.into()));
            }
            5 => device.start(),
            6 => {
                // The index of an available ring.
                let queue = u64::from(choices.byte() % 3);
                let index = choices.short();
                device.put(Device::rings(queue)[1] + 2, &index.to_le_bytes());
            }
            _ => device.save_and_restore(model(vsock)),
        }
    }
});
