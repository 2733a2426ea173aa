//! Attacks by descriptors and chains of descriptors.

use chitin_vmm::arch::x86_64::layout::image_address;
use chitin_vmm::virtio::vsock::packet::Op;
use chitin_vmm::virtio::{GuestFault, PacketFault};

use super::{AttackList, Expected, carried_on_after, connect_and_carry_on, connected_driver};
use crate::driver::{
    Descriptor, Driver, INDIRECT, NEXT, RECEIVE, TRANSMIT, VSOCK, VSOCK_QUEUE_SIZES, encode, header,
};
use crate::program::{Program, RAM_END, Width};

const OUTSIDE_MEMORY: GuestFault = GuestFault::BufferAddress { queue: TRANSMIT, head: 0 };
const INVALID_CHAIN: GuestFault = GuestFault::Chain { queue: TRANSMIT, head: 0 };
const ONLY_QUEUE: u16 = 0;

/// `VIRTQ_DESC_F_AVAIL` (VIRTIO 1.2, 2.8.1).
const PACKED_AVAILABLE: u16 = 1 << 7;

/// The first bytes of the root image's superblock.
const EROFS_MAGIC: u64 = 0xe0f5_e1e2;

pub(super) fn add_to(list: &mut AttackList) {
    add_buffers_outside_memory(list);
    add_invalid_chains(list);
    add_indirect_tables(list);
    add_lengths_and_directions(list);
    add_receive_buffers(list);
    add_root_image_requests(list);
}

fn add_buffers_outside_memory(list: &mut AttackList) {
    for (name, address, len) in [
        ("descriptor across the end of memory", RAM_END - 4, 44),
        ("descriptor at the end of memory", RAM_END, 1),
        ("descriptor whose address and length overflow", u64::MAX - 10, 100),
        ("descriptor in the device hole", VSOCK, 44),
        ("descriptor in the root image", image_address(RAM_END).0, 44),
        ("descriptor of 4 GiB", 0, u32::MAX),
    ] {
        list.add_needs_reset(name, OUTSIDE_MEMORY, move |program, driver| {
            driver.add_chain(program, TRANSMIT, &[Descriptor::readable(address, len)]);
        });
    }
    list.add(
        "descriptor across the end of memory, on an open connection",
        Expected::Ended(GuestFault::BufferAddress { queue: TRANSMIT, head: 2 }),
        |program| {
            let mut driver = connected_driver(program);
            driver.add_chain(program, TRANSMIT, &[Descriptor::readable(RAM_END - 4, 44)]);
            program.repeat_forever(|_| {});
        },
    );
}

fn add_invalid_chains(list: &mut AttackList) {
    list.add_needs_reset("chain of more than 4 GiB", INVALID_CHAIN, |program, driver| {
        let mut chain = vec![Descriptor::readable(0, 60 << 20).chained(); 100];
        chain[99].flags = 0;
        driver.add_chain(program, TRANSMIT, &chain);
    });
    list.add_needs_reset("chain that loops", INVALID_CHAIN, |program, driver| {
        let address = driver.buffer(TRANSMIT, 0);
        for (index, next) in [(0, 1), (1, 0)] {
            let descriptor = Descriptor { address, len: 4, flags: NEXT, next };
            driver.put_descriptor(program, TRANSMIT, index, descriptor);
        }
        driver.add_head(program, TRANSMIT, 0);
    });
    list.add_needs_reset("chain that leaves its table", INVALID_CHAIN, |program, driver| {
        let (address, next) = (driver.buffer(TRANSMIT, 0), VSOCK_QUEUE_SIZES[1]);
        let descriptor = Descriptor { address, len: 4, flags: NEXT, next };
        driver.put_descriptor(program, TRANSMIT, 0, descriptor);
        driver.add_head(program, TRANSMIT, 0);
    });
    list.add_needs_reset(
        "head outside the table",
        GuestFault::Chain { queue: TRANSMIT, head: u16::MAX },
        |program, driver| driver.add_head(program, TRANSMIT, u16::MAX),
    );
    list.add_needs_reset("readable after writable", INVALID_CHAIN, |program, driver| {
        let buffer = driver.buffer(TRANSMIT, 0);
        let chain = [Descriptor::writable(buffer, 44).chained(), Descriptor::readable(buffer, 44)];
        driver.add_chain(program, TRANSMIT, &chain);
    });
}

/// Indirect tables are not offered. None is followed, whatever it contains.
fn add_indirect_tables(list: &mut AttackList) {
    let fault = |flags| GuestFault::DescriptorFlags { queue: TRANSMIT, head: 0, flags };
    for (name, inner_flags, table_len) in [
        ("indirect table with one valid descriptor", 0, 16),
        ("indirect table in an indirect table", INDIRECT, 16),
        ("indirect table with a partial descriptor", 0, 17),
        ("indirect table of 4 GiB", 0, u32::MAX),
    ] {
        list.add_needs_reset(name, fault(INDIRECT), move |program, driver| {
            let (table, inner) = (driver.buffer(TRANSMIT, 100), driver.buffer(TRANSMIT, 101));
            let inner = Descriptor { flags: inner_flags, ..Descriptor::readable(inner, 16) };
            program.put_data(table, encode(inner));
            let outer = Descriptor { flags: INDIRECT, ..Descriptor::readable(table, table_len) };
            driver.add_chain(program, TRANSMIT, &[outer]);
        });
    }
    list.add_needs_reset(
        "indirect table across the end of memory",
        fault(INDIRECT),
        |program, driver| {
            let outer = Descriptor { flags: INDIRECT, ..Descriptor::readable(RAM_END - 8, 16) };
            driver.add_chain(program, TRANSMIT, &[outer]);
        },
    );
    list.add_needs_reset(
        "descriptor with the flag of a packed queue",
        fault(PACKED_AVAILABLE),
        |program, driver| {
            let buffer = Descriptor::readable(driver.buffer(TRANSMIT, 0), 44);
            let packed = Descriptor { flags: PACKED_AVAILABLE, ..buffer };
            driver.add_chain(program, TRANSMIT, &[packed]);
        },
    );
}

fn add_lengths_and_directions(list: &mut AttackList) {
    list.add_survived(
        "zero-length descriptors around a packet",
        Expected::Harmless,
        |program, driver| {
            let packet = driver.put_packet(program, header(Op::CreditUpdate), &[], 1)[0];
            let empty = Descriptor::readable(packet.address, 0);
            let chain = [empty.chained(), empty.chained(), packet.chained(), empty];
            driver.add_chain(program, TRANSMIT, &chain);
            driver.wait_until_used(program, TRANSMIT);
        },
    );
    list.add_survived(
        "zero-length descriptor alone",
        carried_on_after(PacketFault::ShortHeader),
        |program, driver| {
            driver.add_chain(program, TRANSMIT, &[Descriptor::readable(0, 0)]);
            driver.wait_until_used(program, TRANSMIT);
        },
    );
    list.add_survived(
        "write-only buffer to read from",
        carried_on_after(PacketFault::ShortHeader),
        |program, driver| {
            let buffer = Descriptor::writable(driver.buffer(TRANSMIT, 9), 44);
            driver.add_chain(program, TRANSMIT, &[buffer]);
            driver.wait_until_used(program, TRANSMIT);
        },
    );
}

fn add_receive_buffers(list: &mut AttackList) {
    list.add(
        "read-only buffer to write to",
        Expected::Ended(GuestFault::BufferTooSmall { queue: RECEIVE, head: 0, bytes: 0 }),
        |program| receive_into(program, |buffer| Descriptor::readable(buffer, 4096)),
    );
    list.add(
        "buffer too small for any packet",
        Expected::Ended(GuestFault::BufferTooSmall { queue: RECEIVE, head: 0, bytes: 44 }),
        |program| receive_into(program, |buffer| Descriptor::writable(buffer, 44)),
    );
    list.add(
        "writable buffer in the root image",
        Expected::Ended(GuestFault::BufferAddress { queue: RECEIVE, head: 0 }),
        |program| {
            let image = image_address(RAM_END).0;
            receive_into(program, |_| Descriptor::writable(image, 4096));
        },
    );
}

/// Connects with another first receive buffer. The argument of `descriptor` is the address of the
/// usual one.
fn receive_into(program: &mut Program, descriptor: impl Fn(u64) -> Descriptor) {
    let mut driver = Driver::vsock(0);
    driver.start(program);
    let buffer = driver.buffer(RECEIVE, 0);
    driver.put_descriptor(program, RECEIVE, 0, descriptor(buffer));
    driver.send(program, header(Op::Request), &[]);
    program.repeat_forever(|_| {});
}

fn add_root_image_requests(list: &mut AttackList) {
    list.add("write to the root image", Expected::Harmless, |program| {
        let superblock = image_address(RAM_END).0 + 1024;
        program.store(Width::W32, superblock, 0);
        program.expect(Width::W32, superblock, EROFS_MAGIC, "the root image is writable");
        connect_and_carry_on(program, 0);
    });
    let (queue, head) = (ONLY_QUEUE, 0);
    for (name, fault, kind, response_bytes) in [
        (
            "unknown request to the root image",
            GuestFault::UnknownRequest { queue, kind: 7 },
            7u32,
            4,
        ),
        (
            "flush without room for the response",
            GuestFault::BufferTooSmall { queue, head, bytes: 3 },
            0,
            3,
        ),
    ] {
        list.add(name, Expected::CarriedOn(fault), move |program| {
            let mut driver = Driver::pmem(0);
            driver.start(program);
            program.put_data(driver.buffer(ONLY_QUEUE, 0), kind.to_le_bytes());
            send_root_image_request(program, &mut driver, response_bytes);
            driver.wait_for_needs_reset(program);
            flush_root_image(program);
            connect_and_carry_on(program, 0);
        });
    }
}

/// Adds a request in the first buffer, with the second buffer for the response.
fn send_root_image_request(program: &mut Program, driver: &mut Driver, response_bytes: u32) {
    let (request, response) = (driver.buffer(ONLY_QUEUE, 0), driver.buffer(ONLY_QUEUE, 1));
    let chain = [
        Descriptor::readable(request, 4).chained(),
        Descriptor::writable(response, response_bytes),
    ];
    driver.add_chain(program, ONLY_QUEUE, &chain);
}

/// Proves that the root image's device works after a reset. The request is zero, a flush.
fn flush_root_image(program: &mut Program) {
    let mut driver = Driver::pmem(1);
    driver.start(program);
    let response = driver.buffer(ONLY_QUEUE, 1);
    program.put_data(response, u32::MAX.to_le_bytes());
    send_root_image_request(program, &mut driver, 4);
    driver.wait_until_used(program, ONLY_QUEUE);
    program.expect(Width::W32, response, 0, "the flush was not answered");
}
