//! The state file of a template: the input as the file, and the input as the payload that a holder
//! of the key has signed.
#![no_main]

use std::io::{Seek, Write};
use std::sync::OnceLock;

use chitin_fuzz::DeviceUnderTest;
use chitin_vmm::state::{Key, MachineState, verify_state};
use chitin_vmm::virtio::pmem::Pmem;
use chitin_vmm::virtio::vsock::{ChannelSlot, Vsock};
use libfuzzer_sys::fuzz_target;
use vm_memory::GuestAddress;

const MEMORY_BYTES: u64 = 64 << 20;
const IMAGE_BYTES: u64 = 2 << 20;

fuzz_target!(|data: &[u8]| {
    static KEY: OnceLock<Key> = OnceLock::new();
    let key = KEY.get_or_init(|| {
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(&[7; 32]).and_then(|()| file.rewind()).expect("write a key");
        Key::read(&mut file).expect("read a key")
    });
    assert!(verify_state(data, key).is_err(), "a state without a valid MAC is accepted");

    let Some((vcpus, payload)) = data.split_first() else { return };
    let Ok(machine) = MachineState::decode(payload, *vcpus, MEMORY_BYTES, IMAGE_BYTES) else {
        return;
    };
    let again = MachineState::decode(&machine.encode(), *vcpus, MEMORY_BYTES, IMAGE_BYTES);
    assert!(again.is_ok(), "an encoded state cannot be decoded");
    let [vsock, pmem] = &machine.devices[..] else { panic!("two devices") };
    let mut device = DeviceUnderTest::new(Box::new(Vsock::new(ChannelSlot::default(), false)));
    if device.transport().restore(vsock).is_ok() {
        device.with_handler(|handler| handler.on_kick());
    }
    let mut device = DeviceUnderTest::new(Box::new(Pmem::new(GuestAddress(1 << 32), IMAGE_BYTES)));
    if device.transport().restore(pmem).is_ok() {
        device.with_handler(|handler| handler.on_kick());
    }
});
