//! What a hostile guest tries, and what becomes of it.

use chitin_vmm::arch::x86_64::layout::{DEVICE_HOLE, image_address};
use chitin_vmm::virtio::vsock::CHANNEL_PORT;
use chitin_vmm::virtio::vsock::connection::MAX_ANSWERS;
use chitin_vmm::virtio::vsock::packet::{
    Address, Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND,
};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_DRIVER_FEATURES, VIRTIO_MMIO_DRIVER_FEATURES_SEL,
    VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY,
    VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY,
    VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_STATUS,
};

use crate::PING;
use crate::driver::{
    DRIVER_OK, Descriptor, Driver, FEATURES_OK, INDIRECT, NEEDS_RESET, NEXT, PMEM, RECEIVE, SIZES,
    TRANSMIT, VSOCK, WINDOW, WRITE, data, encode, header,
};
use crate::host::Host;
use crate::program::{Program, RAM_END, Width};

/// The last words of a guest whose connection works, or does again.
pub const CARRIED_ON: &str = "carried on";
/// Those of one whose connection was reset, and nothing else.
pub const CUT_OFF: &str = "was cut off";

/// What must become of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// It goes on, and has broken no rule.
    Harmless,
    /// It goes on, and the rule it broke has this name.
    CarriedOn(&'static str),
    /// Its connection is reset, and it goes on without; the rule has this name, if it is one.
    CutOff(Option<&'static str>),
    /// It is ended, with this reason.
    Ended(&'static str),
}

/// One attack.
pub struct Attack {
    /// What the guest does.
    pub name: &'static str,
    /// What must become of it.
    pub expected: Expected,
    /// What the host does meanwhile.
    pub host: Host,
    program: Box<dyn Fn(&mut Program)>,
}

impl Attack {
    /// The guest's program.
    pub fn program(&self) -> Program {
        let mut program = Program::new();
        (self.program)(&mut program);
        program
    }
}

/// All of them: those on the transport and on queues, then those on the vsock device.
pub fn all() -> Vec<Attack> {
    let mut list = List(Vec::new());
    descriptors(&mut list);
    rings(&mut list);
    registers(&mut list);
    floods(&mut list);
    packets(&mut list);
    connections(&mut list);
    list.0
}

/// A guest that does nothing wrong.
pub fn harmless() -> Attack {
    let mut list = List(Vec::new());
    list.add("nothing", Expected::Harmless, |program| works(program, 0));
    list.0.remove(0)
}

struct List(Vec<Attack>);

impl List {
    fn add(
        &mut self,
        name: &'static str,
        expected: Expected,
        program: impl Fn(&mut Program) + 'static,
    ) {
        self.0.push(Attack { name, expected, host: Host::Answers, program: Box::new(program) });
    }

    /// An attack by chains in the transmit queue, on a device that nothing was done with yet: it wants to be reset, and
    /// then works.
    fn chain(
        &mut self,
        name: &'static str,
        fault: &'static str,
        break_it: impl Fn(&mut Program, &mut Driver) + 'static,
    ) {
        self.add(name, Expected::CarriedOn(fault), move |program| {
            let mut driver = Driver::vsock(0);
            driver.start(program);
            break_it(program, &mut driver);
            driver.wait_for_needs_reset(program);
            works(program, 1);
        });
    }

    /// An attack on an open connection that leaves it as it is.
    fn survived(
        &mut self,
        name: &'static str,
        expected: Expected,
        attack: impl Fn(&mut Program, &mut Driver) + 'static,
    ) {
        self.add(name, expected, move |program| {
            let mut driver = connected(program);
            attack(program, &mut driver);
            driver.talk(program);
            program.say(CARRIED_ON);
        });
    }

    /// An attack on an open connection that is the end of it.
    fn cut_off(
        &mut self,
        name: &'static str,
        fault: Option<&'static str>,
        attack: impl Fn(&mut Program, &mut Driver) + 'static,
    ) {
        self.add(name, Expected::CutOff(fault), move |program| {
            let mut driver = connected(program);
            attack(program, &mut driver);
            driver.receive(program, Op::Reset);
            program.say(CUT_OFF);
        });
    }
}

/// A connection, and proof that it works.
fn connected(program: &mut Program) -> Driver {
    let mut driver = Driver::vsock(0);
    driver.start(program);
    driver.connect(program);
    driver.talk(program);
    driver
}

/// The vsock device works, after a reset.
fn works(program: &mut Program, life: u64) {
    let mut driver = Driver::vsock(life);
    driver.start(program);
    driver.connect(program);
    driver.talk(program);
    program.say(CARRIED_ON);
}

/// One descriptor that the device is to read.
fn readable(address: u64, len: u32) -> Descriptor {
    Descriptor { address, len, flags: 0, next: 0 }
}

const LEAVES_MEMORY: &str = "queue 1: descriptor chain 0 leaves guest memory";
const BROKEN_CHAIN: &str = "queue 1: descriptor chain 0 broken";
const TOO_SHORT: &str = "vsock packet: shorter than a header";

fn descriptors(list: &mut List) {
    let (device, image) = (VSOCK, image_address(RAM_END).0);
    for (name, address, len) in [
        ("descriptor over the end of memory", RAM_END - 4, 44),
        ("descriptor at the end of memory", RAM_END, 1),
        ("descriptor whose address and length overflow", u64::MAX - 10, 100),
        ("descriptor in the device hole", device, 44),
        ("descriptor in the root image", image, 44),
        ("descriptor of 4 GiB", 0, u32::MAX),
    ] {
        list.chain(name, LEAVES_MEMORY, move |program, driver| {
            driver.add(program, TRANSMIT, &[readable(address, len)]);
        });
    }
    list.add(
        "descriptor over the end of memory, on an open connection",
        Expected::Ended("queue 1: descriptor chain 2 leaves guest memory"),
        |program| {
            let mut driver = connected(program);
            driver.add(program, TRANSMIT, &[readable(RAM_END - 4, 44)]);
            program.forever(|_| {});
        },
    );
    list.chain("chain of more than 4 GiB", BROKEN_CHAIN, |program, driver| {
        let mut chain = vec![Descriptor { flags: NEXT, ..readable(0, 60 << 20) }; 100];
        chain[99].flags = 0;
        driver.add(program, TRANSMIT, &chain);
    });
    list.chain("chain that goes round", BROKEN_CHAIN, |program, driver| {
        for (index, next) in [(0, 1), (1, 0)] {
            let entry =
                Descriptor { address: driver.buffer(TRANSMIT, 0), len: 4, flags: NEXT, next };
            driver.put_descriptor(program, TRANSMIT, index, entry);
        }
        driver.add_head(program, TRANSMIT, 0);
    });
    list.chain("chain that leaves its table", BROKEN_CHAIN, |program, driver| {
        let entry =
            Descriptor { flags: NEXT, next: SIZES[1], ..readable(driver.buffer(TRANSMIT, 0), 4) };
        driver.put_descriptor(program, TRANSMIT, 0, entry);
        driver.add_head(program, TRANSMIT, 0);
    });
    list.chain(
        "head outside the table",
        "queue 1: descriptor chain 65535 broken",
        |program, driver| driver.add_head(program, TRANSMIT, u16::MAX),
    );
    list.chain("readable after writable", BROKEN_CHAIN, |program, driver| {
        let buffer = driver.buffer(TRANSMIT, 0);
        driver.add(
            program,
            TRANSMIT,
            &[Descriptor { flags: WRITE | NEXT, ..readable(buffer, 44) }, readable(buffer, 44)],
        );
    });
    let nested = |flags, len, at: u64| {
        move |program: &mut Program, driver: &mut Driver| {
            let table = driver.buffer(TRANSMIT, 100) + at;
            let inner = driver.buffer(TRANSMIT, 101);
            program.data(table, encode(&[Descriptor { flags, ..readable(inner, 16) }]));
            driver.add(
                program,
                TRANSMIT,
                &[Descriptor { flags: INDIRECT, ..readable(table, len) }],
            );
        }
    };
    list.chain("indirect table in an indirect table", BROKEN_CHAIN, nested(INDIRECT, 16, 0));
    list.chain("indirect table of a length that is no multiple", BROKEN_CHAIN, nested(0, 17, 0));
    list.chain("indirect table of 4 GiB", BROKEN_CHAIN, nested(0, u32::MAX, 0));
    list.chain("indirect table over the end of memory", BROKEN_CHAIN, |program, driver| {
        let entry = Descriptor { flags: INDIRECT, ..readable(RAM_END - 8, 16) };
        driver.add(program, TRANSMIT, &[entry]);
    });
    list.survived(
        "descriptors of no length around a packet",
        Expected::Harmless,
        |program, driver| {
            let packet = driver.packet(program, header(Op::CreditUpdate), &[], 1);
            let empty = Descriptor { flags: NEXT, ..readable(packet[0].address, 0) };
            let packet = Descriptor { flags: NEXT, ..packet[0] };
            driver.add(
                program,
                TRANSMIT,
                &[empty, empty, packet, Descriptor { flags: 0, ..empty }],
            );
            driver.taken(program, TRANSMIT);
        },
    );
    list.survived(
        "descriptors of no length alone",
        Expected::CarriedOn(TOO_SHORT),
        |program, driver| {
            driver.add(program, TRANSMIT, &[readable(0, 0)]);
            driver.taken(program, TRANSMIT);
        },
    );
    list.survived(
        "write-only where read is due",
        Expected::CarriedOn(TOO_SHORT),
        |program, driver| {
            let entry = Descriptor { flags: WRITE, ..readable(driver.buffer(TRANSMIT, 9), 44) };
            driver.add(program, TRANSMIT, &[entry]);
            driver.taken(program, TRANSMIT);
        },
    );
    list.add(
        "read-only where write is due",
        Expected::Ended("queue 0: descriptor chain 0 has 0 bytes where more are due"),
        |program| receive_into(program, |buffer| readable(buffer, 4096)),
    );
    list.add(
        "buffer too small for any packet",
        Expected::Ended("queue 0: descriptor chain 0 has 44 bytes where more are due"),
        |program| {
            receive_into(program, |buffer| Descriptor { flags: WRITE, ..readable(buffer, 44) })
        },
    );
    list.add(
        "buffer to write to in the root image",
        Expected::Ended("queue 0: descriptor chain 0 leaves guest memory"),
        move |program| {
            receive_into(program, |_| Descriptor { flags: WRITE, ..readable(image, 4096) })
        },
    );
    list.add("root image written to", Expected::Harmless, move |program| {
        program.store(Width::W32, image + 1024, 0);
        program.expect(Width::W32, image + 1024, 0xe0f5_e1e2, "the root image can be written to");
        works(program, 0);
    });
    for (name, fault, kind, room) in [
        ("unknown request to the root image", "queue 0: unknown request 7", 7u32, 4),
        (
            "flush without room for the answer",
            "queue 0: descriptor chain 0 has 3 bytes where more are due",
            0,
            3,
        ),
    ] {
        list.add(name, Expected::CarriedOn(fault), move |program| {
            let mut driver = Driver::pmem(0);
            driver.start(program);
            let (request, answer) = (driver.buffer(0, 0), driver.buffer(0, 1));
            program.data(request, kind.to_le_bytes());
            driver.add(
                program,
                0,
                &[
                    Descriptor { flags: NEXT, ..readable(request, 4) },
                    Descriptor { flags: WRITE, ..readable(answer, room) },
                ],
            );
            driver.wait_for_needs_reset(program);
            let mut driver = Driver::pmem(1);
            driver.start(program);
            let answer = driver.buffer(0, 1);
            program.data(answer, u32::MAX.to_le_bytes());
            driver.add(
                program,
                0,
                &[
                    Descriptor { flags: NEXT, ..readable(driver.buffer(0, 0), 4) },
                    Descriptor { flags: WRITE, ..readable(answer, 4) },
                ],
            );
            driver.taken(program, 0);
            program.expect(Width::W32, answer, 0, "the flush was not answered");
            works(program, 0);
        });
    }
}

/// Connects with a first receive buffer of another kind.
fn receive_into(program: &mut Program, descriptor: impl Fn(u64) -> Descriptor) {
    let mut driver = Driver::vsock(0);
    driver.start(program);
    let buffer = driver.buffer(RECEIVE, 0);
    driver.put_descriptor(program, RECEIVE, 0, descriptor(buffer));
    driver.send(program, header(Op::Request), &[]);
    program.forever(|_| {});
}

fn rings(list: &mut List) {
    let unusable = |queue| match queue {
        0 => "queue 0 enabled without usable rings",
        _ => "queue 1 enabled without usable rings",
    };
    for (name, size) in [
        ("queue of no size", 0),
        ("queue of a size that is no power of two", 3),
        ("queue of twice the largest size", 128),
        ("queue of 2¹⁶ descriptors", 1 << 16),
        ("queue of 2³¹ descriptors", 1 << 31),
    ] {
        list.add(name, Expected::CarriedOn(unusable(0)), move |program| {
            let driver = Driver::vsock(0);
            refused(program, &driver, 0, size, driver.rings(0));
        });
    }
    type Move = fn([u64; 3]) -> [u64; 3];
    let moves: [(&str, Move); 7] = [
        ("descriptor table misaligned", |[table, available, used]| [table + 8, available, used]),
        ("available ring misaligned", |[table, available, used]| [table, available + 1, used]),
        ("used ring misaligned", |[table, available, used]| [table, available, used + 2]),
        ("rings over the end of memory", |[_, available, used]| [RAM_END - 16, available, used]),
        ("rings in the device hole", |[table, available, _]| [table, available, VSOCK]),
        ("rings from memory into the device hole", |[table, available, _]| {
            [table, available, DEVICE_HOLE.0 - 4]
        }),
        ("rings at the end of the address space", |[table, _, used]| [table, u64::MAX - 1, used]),
    ];
    for (name, change) in moves {
        list.add(name, Expected::CarriedOn(unusable(1)), move |program| {
            let driver = Driver::vsock(0);
            refused(program, &driver, 1, SIZES[1].into(), change(driver.rings(1)));
        });
    }
    list.add("queue that is not ready", Expected::CarriedOn(unusable(1)), |program| {
        let driver = Driver::vsock(0);
        driver.negotiate(program);
        driver.queue(program, 0, SIZES[0].into(), driver.rings(0));
        needs_reset(program, &driver);
    });
    list.chain(
        "available index ahead by more than the size",
        "queue 1: available ring broken",
        |program, driver| {
            program.store(Width::W16, driver.available(TRANSMIT), u64::from(SIZES[1]) + 1);
            driver.kick(program, TRANSMIT);
        },
    );
    list.add(
        "available index of the receive queue runs ahead",
        Expected::Ended("queue 0: available ring broken"),
        |program| {
            let mut driver = connected(program);
            // Two packets have come: these are two more than there can be.
            program.store(Width::W16, driver.available(RECEIVE), u64::from(SIZES[0]) + 4);
            driver.send(program, data(PING), PING);
            program.forever(|_| {});
        },
    );
    list.add(
        "used ring on top of the descriptor table",
        Expected::CarriedOn(TOO_SHORT),
        |program| {
            let mut driver = Driver::vsock(0);
            driver.negotiate(program);
            let [table, available, _] = driver.rings(TRANSMIT);
            for queue in [0, 2] {
                driver.queue(program, queue, SIZES[usize::from(queue)].into(), driver.rings(queue));
            }
            driver.queue(program, TRANSMIT, SIZES[1].into(), [table, available, table]);
            driver.status(program, DRIVER_OK);
            driver.add(program, TRANSMIT, &[readable(driver.buffer(TRANSMIT, 0), 4)]);
            program.wait_until(table + 2, 1);
            works(program, 1);
        },
    );
    for (name, fault, register, value) in [
        (
            "queue moved while it is in use",
            "virtio register 0x80 written in status 0xf",
            VIRTIO_MMIO_QUEUE_DESC_LOW,
            0x1000,
        ),
        (
            "queue resized while it is in use",
            "virtio register 0x38 written in status 0xf",
            VIRTIO_MMIO_QUEUE_NUM,
            2,
        ),
        (
            "queue disabled while it is in use",
            "virtio register 0x44 written in status 0xf",
            VIRTIO_MMIO_QUEUE_READY,
            0,
        ),
    ] {
        list.survived(name, Expected::CarriedOn(fault), move |program, driver| {
            for queue in 0..3 {
                driver.set(program, VIRTIO_MMIO_QUEUE_SEL, queue);
                driver.set(program, register, value);
            }
        });
    }
}

/// Sets up one queue in another way, and finds the device refusing to start.
fn refused(program: &mut Program, driver: &Driver, queue: u16, size: u32, rings: [u64; 3]) {
    driver.negotiate(program);
    driver.queues(program);
    driver.set(program, VIRTIO_MMIO_QUEUE_SEL, queue.into());
    driver.set(program, VIRTIO_MMIO_QUEUE_READY, 0);
    driver.queue(program, queue, size, rings);
    needs_reset(program, driver);
}

fn needs_reset(program: &mut Program, driver: &Driver) {
    driver.status(program, DRIVER_OK);
    driver.expect_status(program, FEATURES_OK | NEEDS_RESET, "the device starts with such a queue");
    works(program, 1);
}

fn registers(list: &mut List) {
    list.survived(
        "queues that do not exist are selected",
        Expected::CarriedOn("virtio register 0x38 written in status 0xf"),
        |program, driver| {
            for queue in [3, 0x7fff_ffff, 0x8000_0000, u32::MAX] {
                driver.set(program, VIRTIO_MMIO_QUEUE_SEL, queue);
                for register in [VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY] {
                    let address = driver.base + u64::from(register);
                    program.expect(Width::W32, address, 0, "a queue that does not exist is there");
                }
                driver.set(program, VIRTIO_MMIO_QUEUE_NUM, 8);
                driver.set(program, VIRTIO_MMIO_QUEUE_READY, 1);
            }
        },
    );
    list.survived(
        "configuration read and written past its end",
        Expected::CarriedOn("access of 8 bytes to virtio register 0x108"),
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
            program.expect(Width::W64, config, 3, "the configuration has changed");
        },
    );
    for (name, fault, width) in [
        ("registers accessed as bytes", "access of 1 bytes to virtio register 0x0", Width::W8),
        (
            "registers accessed as half words",
            "access of 2 bytes to virtio register 0x0",
            Width::W16,
        ),
        (
            "registers accessed as double words",
            "access of 8 bytes to virtio register 0x0",
            Width::W64,
        ),
        ("registers accessed between two", "access of 4 bytes to virtio register 0x1", Width::W32),
    ] {
        list.survived(name, Expected::CarriedOn(fault), move |program, driver| {
            for offset in 0..0x100 {
                if width != Width::W32 || offset % 4 != 0 {
                    program.load(width, driver.base + offset);
                    program.store(width, driver.base + offset, u64::MAX);
                }
            }
        });
    }
    list.survived(
        "accesses across the ends of devices",
        Expected::CarriedOn("access of 1 bytes to virtio register 0x0"),
        |program, _| {
            for address in [VSOCK - 1, PMEM - 1, PMEM - 2, PMEM + 0xffd, PMEM + 0xfff] {
                for width in [Width::W16, Width::W32, Width::W64] {
                    program.load(width, address);
                    program.store(width, address, u64::MAX);
                }
            }
        },
    );
    list.survived(
        "status walked backwards",
        Expected::CarriedOn("virtio status 0xb written after 0xf"),
        |program, driver| {
            for status in [11, 3, 1, 0x4f, 0x1000, 0xffff_ff00, 64] {
                driver.status(program, status);
            }
            driver.expect_status(program, DRIVER_OK, "the status has changed");
        },
    );
    list.add(
        "steps of the status left out",
        Expected::CarriedOn("virtio status 0xf written after 0x0"),
        |program| {
            let driver = Driver::vsock(0);
            for status in [DRIVER_OK, FEATURES_OK, 3] {
                driver.status(program, status);
                driver.expect_status(program, 0, "a step can be left out");
            }
            works(program, 1);
        },
    );
    list.survived(
        "features negotiated again",
        Expected::CarriedOn("virtio register 0x20 written in status 0xf"),
        |program, driver| {
            for select in 0..3 {
                driver.set(program, VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
                driver.set(program, VIRTIO_MMIO_DRIVER_FEATURES, u32::MAX);
            }
        },
    );
    list.add(
        "features that were not offered",
        Expected::CarriedOn("virtio status 0xb written after 0x3"),
        |program| {
            let driver = Driver::vsock(0);
            for status in [1, 3] {
                driver.status(program, status);
            }
            for select in [0, 1] {
                driver.set(program, VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
                driver.set(program, VIRTIO_MMIO_DRIVER_FEATURES, u32::MAX);
            }
            driver.status(program, FEATURES_OK);
            driver.expect_status(program, 3, "features that were not offered are taken");
            works(program, 1);
        },
    );
    list.survived("ports that nobody owns", Expected::Harmless, |program, _| {
        for port in (0x1000..0xff00)
            .step_by(0x101)
            .chain([0x60, 0x64, 0x70, 0x92, 0x3f8, 0x402, 0xcf8, 0xcfc])
        {
            program.port(port);
        }
    });
    list.survived("addresses that nobody owns", Expected::Harmless, |program, _| {
        for address in [DEVICE_HOLE.0, VSOCK - 8, PMEM + 0x1000, 0xe000_0000, 0xffff_fff8] {
            for width in [Width::W8, Width::W16, Width::W32, Width::W64] {
                program.load(width, address);
                program.store(width, address, u64::MAX);
            }
        }
        program.expect(Width::W64, VSOCK - 8, u64::MAX, "nobody answers with something");
    });
}

fn floods(list: &mut List) {
    list.survived(
        "100,000 kicks of a queue with nothing in it",
        Expected::Harmless,
        |program, driver| {
            program.repeat(50_000, |program| {
                driver.kick(program, TRANSMIT);
                driver.kick(program, RECEIVE);
            });
        },
    );
    list.survived(
        "kicks of queues that do not exist",
        Expected::CarriedOn("queue 3 notified, which does not exist"),
        |program, driver| {
            for queue in [3, 0xffff, u32::MAX] {
                driver.set(program, VIRTIO_MMIO_QUEUE_NOTIFY, queue);
            }
        },
    );
    list.add(
        "kicks before the device is ready",
        Expected::CarriedOn("queue 0 notified, which does not exist"),
        |program| {
            let driver = Driver::vsock(0);
            driver.kick(program, RECEIVE);
            program.repeat(1000, |program| driver.kick(program, TRANSMIT));
            works(program, 0);
        },
    );
    list.survived(
        "25,600 malformed chains, each with an interrupt",
        Expected::CarriedOn(TOO_SHORT),
        |program, driver| {
            driver.spread(program, &[0; 4]);
            program.repeat(200, |program| {
                program.add16(driver.available(TRANSMIT), SIZES[1]);
                driver.kick(program, TRANSMIT);
                driver.taken(program, TRANSMIT);
                driver.set(program, VIRTIO_MMIO_INTERRUPT_ACK, 1);
            });
            driver.looped(SIZES[1].wrapping_mul(200));
        },
    );
    list.add("2,000 resets", Expected::Harmless, |program| {
        let driver = Driver::vsock(0);
        program.repeat(2000, |program| {
            for status in [1, 3, 0] {
                driver.status(program, status);
            }
        });
        works(program, 1);
    });
    list.add("300 resets of a device in use", Expected::Harmless, |program| {
        let mut driver = Driver::vsock(0);
        program.repeat(300, |program| {
            Driver::vsock(0).start(program);
        });
        driver.start(program);
        works(program, 1);
    });
    list.add(
        "reset in mid-transfer",
        Expected::CutOff(Some("vsock packet: a second connection")),
        |program| {
            let mut driver = connected(program);
            let packet = driver.packet(program, data(&[0; 4000]), &[0; 4000], 1);
            for _ in 0..16 {
                driver.add(program, TRANSMIT, &packet);
            }
            let mut driver = Driver::vsock(1);
            driver.start(program);
            driver.send(program, header(Op::Request), &[]);
            driver.receive(program, Op::Reset);
            program.say(CUT_OFF);
        },
    );
    list.add("a driver that gives up", Expected::Harmless, |program| {
        let mut driver = Driver::vsock(0);
        driver.start(program);
        driver.status(program, 128);
        program.expect_bits(
            VSOCK + u64::from(VIRTIO_MMIO_STATUS),
            128,
            128,
            "giving up is not taken note of",
        );
        driver.kick(program, TRANSMIT);
        works(program, 1);
    });
}

fn packets(list: &mut List) {
    // The operation is not one of ours, so it is put in behind the header's back.
    list.cut_off(
        "unknown operation",
        Some("vsock packet: of an unknown operation"),
        |program, driver| {
            driver.send(program, Header { op: None, ..header(Op::Data) }, &[]);
        },
    );
    let elsewhere = |cid| Address { cid, ..header(Op::Data).source };
    list.survived(
        "packet from another context",
        Expected::CarriedOn("vsock packet: from another context"),
        move |program, driver| {
            for cid in [0, 1, 2, 4, u64::MAX] {
                driver.send(program, Header { source: elsewhere(cid), ..data(PING) }, PING);
            }
        },
    );
    list.survived(
        "packet to another context",
        Expected::CarriedOn("vsock packet: to a context that is not here"),
        |program, driver| {
            for cid in [0, 1, 3, 4, u64::MAX] {
                let destination = Address { cid, port: CHANNEL_PORT };
                driver.send(program, Header { destination, ..data(PING) }, PING);
                driver.receive(program, Op::Reset);
            }
        },
    );
    list.cut_off(
        "packet of another type",
        Some("vsock packet: of a type that is not offered"),
        |program, driver| driver.send(program, Header { kind: 2, ..data(PING) }, PING),
    );
    list.cut_off(
        "length of 4 GiB in a packet of four bytes",
        Some("vsock packet: longer than its buffers"),
        |program, driver| driver.send(program, Header { len: u32::MAX, ..data(PING) }, PING),
    );
    list.cut_off(
        "packet of more than 64 KiB, all of it there",
        Some("vsock packet: longer than any packet"),
        |program, driver| {
            let len = 64 * 1024 + 1;
            let first = driver.packet(program, Header { len, ..header(Op::Data) }, &[], 1)[0];
            let rest = Descriptor { flags: 0, ..readable(driver.buffer(RECEIVE, 0), len) };
            driver.add(program, TRANSMIT, &[Descriptor { flags: NEXT, ..first }, rest]);
        },
    );
    list.survived("packet over twelve descriptors", Expected::Harmless, |program, driver| {
        let chain = driver.packet(program, data(PING), PING, 12);
        assert_eq!(chain.len(), 12);
        driver.add(program, TRANSMIT, &chain);
        driver.hear(program);
    });
    list.survived("more taken out than was ever sent", Expected::Harmless, |program, driver| {
        // The window is none, so that the answer to the ping does not come.
        driver.send(program, Header { fwd_cnt: 1000, ..data(PING) }, PING);
        driver.receive(program, Op::CreditRequest);
        driver.send(
            program,
            Header { buf_alloc: u32::MAX, fwd_cnt: 4, ..header(Op::CreditUpdate) },
            &[],
        );
        driver.hear(program);
    });
    list.add(
        "payload before there is a connection",
        Expected::CarriedOn("vsock packet: without a connection"),
        |program| {
            let mut driver = Driver::vsock(0);
            driver.start(program);
            driver.send(program, data(PING), PING);
            driver.receive(program, Op::Reset);
            driver.connect(program);
            driver.talk(program);
            program.say(CARRIED_ON);
        },
    );
    list.cut_off(
        "response that nobody asked for",
        Some("vsock packet: a response that nobody asked for"),
        |program, driver| driver.send(program, header(Op::Response), &[]),
    );
}

fn connections(list: &mut List) {
    list.add(
        "10,000 resets without a connection",
        Expected::CarriedOn("vsock packet: without a connection"),
        |program| {
            let mut driver = Driver::vsock(0);
            driver.start(program);
            flood(program, &mut driver, &header(Op::Reset), 10_000, |_, _| {});
            driver.connect(program);
            driver.talk(program);
            program.say(CARRIED_ON);
        },
    );
    list.survived(
        "10,000 connections beside the one",
        Expected::CarriedOn("vsock packet: a second connection"),
        |program, driver| {
            flood(program, driver, &header(Op::Request), 10_000, |program, driver| {
                // One buffer was used for the refusal; two were before, so that there is always room in the ring.
                program.add16(driver.available(RECEIVE), 1);
                driver.kick(program, RECEIVE);
            });
            driver.skip_to(program, 10_002);
        },
    );
    list.survived(
        "connections to ports that are not open",
        Expected::CarriedOn("vsock packet: a connection to a port that is not open"),
        |program, driver| {
            for port in [0, 22, CHANNEL_PORT - 1, CHANNEL_PORT + 1, u32::MAX] {
                let destination = Address { port, ..header(Op::Request).destination };
                driver.send(program, Header { destination, ..header(Op::Request) }, &[]);
                driver.receive(program, Op::Reset);
            }
        },
    );
    list.add(
        "refusals with no buffers to receive them",
        Expected::CarriedOn("vsock packet: a connection to a port that is not open"),
        |program| {
            let mut driver = Driver::vsock(0);
            driver.start(program);
            driver.status(program, 0);
            program.store(Width::W16, driver.available(RECEIVE), 0);
            driver.negotiate(program);
            driver.queues(program);
            driver.status(program, DRIVER_OK);
            let destination = Address { port: 9, ..header(Op::Request).destination };
            let packet =
                driver.packet(program, Header { destination, ..header(Op::Request) }, &[], 1);
            let (sent, kept) = (100, u16::try_from(MAX_ANSWERS).unwrap_or(u16::MAX));
            for _ in 0..sent {
                driver.add(program, TRANSMIT, &packet);
            }
            // As many as are kept, and then as many more as there are buffers each time.
            program.wait_until(driver.used(TRANSMIT), kept);
            for given in (SIZES[0]..sent + SIZES[0]).step_by(SIZES[0].into()) {
                program.add16(driver.available(RECEIVE), SIZES[0]);
                driver.kick(program, RECEIVE);
                program.wait_until(driver.used(TRANSMIT), sent.min(kept + given));
                program.wait_until(driver.used(RECEIVE), sent.min(given));
            }
            driver.skip_to(program, sent);
            driver.connect(program);
            driver.talk(program);
            program.say(CARRIED_ON);
        },
    );
    list.add("host that never reads, within the window", Expected::Harmless, |program| {
        let mut driver = Driver::vsock(0);
        driver.start(program);
        driver.connect(program);
        let packet = driver.packet(program, data(&[0; 4000]), &[0; 4000], 1);
        for _ in 0..64 {
            driver.add(program, TRANSMIT, &packet);
        }
        driver.taken(program, TRANSMIT);
        driver.send(program, header(Op::CreditRequest), &[]);
        driver.receive(program, Op::CreditUpdate);
        program.say(CARRIED_ON);
    });
    list.add(
        "host that never reads, beyond the window",
        Expected::CutOff(Some("vsock packet: payload beyond the window")),
        |program| {
            let mut driver = Driver::vsock(0);
            driver.start(program);
            driver.connect(program);
            // 64 packets fill the window, a few more are on their way, and to those after that a reset each is the answer.
            flood(program, &mut driver, &data(&[0; 4000]), 100, |_, _| {});
            driver.receive(program, Op::Reset);
            program.say(CUT_OFF);
        },
    );
    for attack in
        list.0.iter_mut().filter(|attack| attack.name.starts_with("host that never reads"))
    {
        attack.host = Host::Silent;
    }
    list.survived(
        "the receiving half shut, with every other bit",
        Expected::Harmless,
        |program, driver| {
            // Nothing comes back after that, so what shows that the rest works is an answer to a question.
            let flags = !SHUTDOWN_BOTH;
            driver.send(program, Header { flags, ..header(Op::Shutdown) }, &[]);
        },
    );
    for (name, flags) in
        [("the receiving half shut", SHUTDOWN_RECEIVE), ("the sending half shut", SHUTDOWN_SEND)]
    {
        list.add(name, Expected::Harmless, move |program| {
            let mut driver = connected(program);
            driver.send(program, Header { flags, ..header(Op::Shutdown) }, &[]);
            driver.send(program, header(Op::CreditRequest), &[]);
            driver.receive(program, Op::CreditUpdate);
            program.say(CARRIED_ON);
        });
    }
    list.cut_off("both halves shut", None, |program, driver| {
        driver.send(program, Header { flags: SHUTDOWN_BOTH, ..header(Op::Shutdown) }, &[]);
    });
    list.cut_off(
        "payload after the end",
        Some("vsock packet: payload after the end"),
        |program, driver| {
            driver.send(program, Header { flags: SHUTDOWN_SEND, ..header(Op::Shutdown) }, &[]);
            driver.send(program, data(PING), PING);
        },
    );
    list.add(
        "a connection after its reset",
        Expected::CutOff(Some("vsock packet: a second connection")),
        |program| {
            let mut driver = connected(program);
            driver.send(program, header(Op::Reset), &[]);
            driver.send(program, Header { buf_alloc: WINDOW, ..header(Op::Request) }, &[]);
            driver.receive(program, Op::Reset);
            program.say(CUT_OFF);
        },
    );
}

/// Sends the same header again and again, each from another port but the guest's own, with as much payload as it says.
fn flood(
    program: &mut Program,
    driver: &mut Driver,
    header: &Header,
    times: u16,
    each: impl Fn(&mut Program, &mut Driver),
) {
    let payload = vec![0; usize::try_from(header.len).unwrap_or(0)];
    let buffer = driver.spread(program, &[&header.to_bytes()[..], &payload].concat());
    program.repeat(times.into(), |program| {
        if header.len == 0 {
            // The port, in its upper bits as well, so that it is never the one that is ours.
            program.store_counter(buffer + 16);
            program.store(Width::W8, buffer + 19, 1);
        }
        program.add16(driver.available(TRANSMIT), 1);
        driver.kick(program, TRANSMIT);
        driver.taken(program, TRANSMIT);
        each(program, driver);
    });
    driver.looped(times);
}
