//! Attacks by registers, status and features, and by addresses outside the devices.

use chitin_vmm::arch::x86_64::layout::DEVICE_HOLE;
use chitin_vmm::virtio::GuestFault;
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_DRIVER_FEATURES, VIRTIO_MMIO_DRIVER_FEATURES_SEL,
    VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY,
    VIRTIO_MMIO_QUEUE_SEL,
};

use super::{AttackList, Expected, connect_and_carry_on};
use crate::driver::{DRIVER_OK, Driver, FEATURES_OK, PMEM, VSOCK};
use crate::program::Width;

const ALL_WIDTHS: [Width; 4] = [Width::W8, Width::W16, Width::W32, Width::W64];

pub(super) fn add_to(list: &mut AttackList) {
    add_register_accesses(list);
    add_status_changes(list);
    add_features(list);
    add_unassigned_addresses(list);
}

fn add_register_accesses(list: &mut AttackList) {
    list.add_survived(
        "selection of queues that do not exist",
        refused_write(VIRTIO_MMIO_QUEUE_NUM),
        |program, driver| {
            for queue in [3, 0x7fff_ffff, 0x8000_0000, u32::MAX] {
                driver.write_register(program, VIRTIO_MMIO_QUEUE_SEL, queue);
                for register in [VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY] {
                    let address = driver.base + u64::from(register);
                    program.expect(Width::W32, address, 0, "a queue that does not exist is there");
                }
                driver.write_register(program, VIRTIO_MMIO_QUEUE_NUM, 8);
                driver.write_register(program, VIRTIO_MMIO_QUEUE_READY, 1);
            }
        },
    );
    list.add_survived(
        "configuration space accessed past its end",
        invalid_access(0x108, 8),
        |program, driver| {
            let config = driver.base + u64::from(VIRTIO_MMIO_CONFIG);
            for (width, offset) in [
                (Width::W64, 8),
                (Width::W64, 4),
                (Width::W32, 6),
                (Width::W8, 0xeff),
                (Width::W32, 0xefc),
            ] {
                program.load(width, config + offset);
                program.store(width, config + offset, u64::MAX);
            }
            program.expect(Width::W64, config, 3, "the configuration space has changed");
        },
    );
    for (name, expected, width) in [
        ("registers accessed as bytes", invalid_access(0, 1), Width::W8),
        ("registers accessed as 16-bit words", invalid_access(0, 2), Width::W16),
        ("registers accessed as 64-bit words", invalid_access(0, 8), Width::W64),
        ("unaligned register accesses", invalid_access(1, 4), Width::W32),
    ] {
        list.add_survived(name, expected, move |program, driver| {
            for offset in 0..0x100 {
                if width != Width::W32 || offset % 4 != 0 {
                    program.load(width, driver.base + offset);
                    program.store(width, driver.base + offset, u64::MAX);
                }
            }
        });
    }
    list.add_survived("accesses across the ends of devices", invalid_access(0, 1), |program, _| {
        for address in [VSOCK - 1, PMEM - 1, PMEM - 2, PMEM + 0xffd, PMEM + 0xfff] {
            for width in [Width::W16, Width::W32, Width::W64] {
                program.load(width, address);
                program.store(width, address, u64::MAX);
            }
        }
    });
}

fn add_status_changes(list: &mut AttackList) {
    list.add_survived(
        "status set backwards",
        invalid_status(DRIVER_OK, FEATURES_OK),
        |program, driver| {
            for status in [11, 3, 1, 0x4f, 0x1000, 0xffff_ff00, 64] {
                driver.write_status(program, status);
            }
            driver.expect_status(program, DRIVER_OK, "the status has changed");
        },
    );
    list.add("status steps left out", invalid_status(0, DRIVER_OK), |program| {
        let driver = Driver::vsock(0);
        for status in [DRIVER_OK, FEATURES_OK, 3] {
            driver.write_status(program, status);
            driver.expect_status(program, 0, "a step can be left out");
        }
        connect_and_carry_on(program, 1);
    });
}

fn add_features(list: &mut AttackList) {
    list.add_survived(
        "features negotiated again",
        refused_write(VIRTIO_MMIO_DRIVER_FEATURES),
        |program, driver| {
            for select in 0..3 {
                driver.write_register(program, VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
                driver.write_register(program, VIRTIO_MMIO_DRIVER_FEATURES, u32::MAX);
            }
        },
    );
    list.add("features that were not offered", invalid_status(3, FEATURES_OK), |program| {
        let driver = Driver::vsock(0);
        for status in [1, 3] {
            driver.write_status(program, status);
        }
        for select in [0, 1] {
            driver.write_register(program, VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
            driver.write_register(program, VIRTIO_MMIO_DRIVER_FEATURES, u32::MAX);
        }
        driver.write_status(program, FEATURES_OK);
        driver.expect_status(program, 3, "features that were not offered are accepted");
        connect_and_carry_on(program, 1);
    });
}

fn add_unassigned_addresses(list: &mut AttackList) {
    list.add_survived("unassigned I/O ports", Expected::Harmless, |program, _| {
        let legacy_devices = [0x60, 0x64, 0x70, 0x92, 0x3f8, 0x402, 0xcf8, 0xcfc];
        for port in (0x1000..0xff00).step_by(0x101).chain(legacy_devices) {
            program.access_port(port);
        }
    });
    list.add_survived("unassigned MMIO addresses", Expected::Harmless, |program, _| {
        for address in [DEVICE_HOLE.0, VSOCK - 8, PMEM + 0x1000, 0xe000_0000, 0xffff_fff8] {
            for width in ALL_WIDTHS {
                program.load(width, address);
                program.store(width, address, u64::MAX);
            }
        }
        program.expect(Width::W64, VSOCK - 8, u64::MAX, "an unassigned address has a value");
    });
}

/// The guest goes on after a write to a register of a running device was refused.
fn refused_write(register: u32) -> Expected {
    let offset = register.into();
    Expected::CarriedOn(GuestFault::RegisterWrite { offset, status: DRIVER_OK })
}

/// The guest goes on after an access that no register has.
fn invalid_access(offset: u64, bytes: usize) -> Expected {
    Expected::CarriedOn(GuestFault::RegisterAccess { offset, bytes })
}

/// The guest goes on after a change of the status was refused.
fn invalid_status(from: u32, to: u32) -> Expected {
    Expected::CarriedOn(GuestFault::StatusTransition { from, to })
}
