//! Register accesses to both devices, in any order and size, with anything in guest memory.
#![no_main]

use chitin_fuzz::{Choices, DeviceUnderTest, RAM_BYTES};
use chitin_vmm::bus::BusDevice;
use chitin_vmm::virtio::VirtioDevice;
use chitin_vmm::virtio::pmem::Pmem;
use chitin_vmm::virtio::vsock::{ChannelSlot, Vsock};
use libfuzzer_sys::fuzz_target;
use vm_memory::GuestAddress;

fn make_device(is_vsock: bool) -> Box<dyn VirtioDevice> {
    if is_vsock {
        Box::new(Vsock::new(ChannelSlot::default(), true))
    } else {
        Box::new(Pmem::new(GuestAddress(1 << 32), 2 << 20))
    }
}

fuzz_target!(|data: &[u8]| {
    let mut choices = Choices(data);
    let is_vsock = choices.take_u8() & 1 != 0;
    let mut device = DeviceUnderTest::new(make_device(is_vsock));
    while !choices.is_empty() {
        match choices.take_u8() % 8 {
            0 => {
                let (register, value) = (u64::from(choices.take_u8()) * 4, choices.take_u32());
                device.write_register(register, value);
            }
            1 => {
                let (offset, bytes) = (choices.take_u16(), choices.take_u8() % 8 + 1);
                device.transport().read(offset.into(), &mut vec![0; bytes.into()]);
            }
            2 => {
                let (offset, bytes) = (choices.take_u16(), choices.take_u8() % 8 + 1);
                let mut value = vec![0; bytes.into()];
                for (byte, chosen) in value.iter_mut().zip(choices.take_bytes(bytes.into())) {
                    *byte = *chosen;
                }
                device.transport().write(offset.into(), &value);
            }
            3 => {
                device.with_handler(|handler| handler.on_kick());
            }
            4 => {
                let (address, count) = (choices.take_number(3) % RAM_BYTES, choices.take_u8());
                device.write_memory(address, choices.take_bytes(count.into()));
            }
            5 => device.start_device(),
            6 => {
                let available_ring = DeviceUnderTest::rings(u64::from(choices.take_u8() % 3))[1];
                let index = choices.take_u16();
                device.write_memory(available_ring + 2, &index.to_le_bytes());
            }
            _ => device.save_and_restore(make_device(is_vsock)),
        }
    }
});
