//! The attacks: what each guest does, and the outcome it must have.

mod connections;
mod descriptors;
mod floods;
mod packets;
mod registers;
mod rings;

use chitin_vmm::virtio::vsock::packet::Op;
use chitin_vmm::virtio::{GuestFault, PacketFault};

use crate::driver::Driver;
use crate::host::HostBehavior;
use crate::program::Program;

/// The log of a guest whose connection works, perhaps after a reset of the device.
pub const CARRIED_ON: &str = "carried on";
/// The log of a guest that has lost its connection, and nothing else.
pub const CUT_OFF: &str = "was cut off";

/// The outcome that an attack must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// The guest goes on, without a fault.
    Harmless,
    /// The guest goes on, and this is its first fault.
    CarriedOn(GuestFault),
    /// The guest's connection is reset, and it goes on without. This is its first fault, if it has
    /// committed any.
    CutOff(Option<GuestFault>),
    /// The guest is ended for this fault.
    Ended(GuestFault),
}

/// One attack.
pub struct Attack {
    /// The actions of the guest in a few words. The threat model quotes them.
    pub name: &'static str,
    /// The outcome that it must have.
    pub expected: Expected,
    /// The behavior of the host meanwhile.
    pub host: HostBehavior,
    program: Box<dyn Fn(&mut Program)>,
}

impl Attack {
    /// Writes the guest's program.
    pub fn program(&self) -> Program {
        let mut program = Program::new();
        (self.program)(&mut program);
        program
    }
}

/// Returns all attacks: those on the transport and on queues first, then those on the vsock device.
pub fn all() -> Vec<Attack> {
    let mut list = AttackList(Vec::new());
    descriptors::add_to(&mut list);
    rings::add_to(&mut list);
    registers::add_to(&mut list);
    floods::add_to(&mut list);
    packets::add_to(&mut list);
    connections::add_to(&mut list);
    list.0
}

/// Returns a guest that keeps the rules.
pub fn harmless() -> Attack {
    Attack {
        name: "nothing",
        expected: Expected::Harmless,
        host: HostBehavior::AnswersPings,
        program: Box::new(|program| connect_and_carry_on(program, 0)),
    }
}

/// A list of attacks under construction.
struct AttackList(Vec<Attack>);

impl AttackList {
    /// Adds an attack of which nothing is given. Returns it, to be changed.
    fn add(
        &mut self,
        name: &'static str,
        expected: Expected,
        program: impl Fn(&mut Program) + 'static,
    ) -> &mut Attack {
        let (host, program) = (HostBehavior::AnswersPings, Box::new(program));
        self.0.push(Attack { name, expected, host, program });
        self.0.last_mut().expect("an attack was added")
    }

    /// Adds an attack on a vsock device that has started and never connected. It makes the device
    /// ask for a reset, after which it works.
    fn add_needs_reset(
        &mut self,
        name: &'static str,
        fault: GuestFault,
        attack: impl Fn(&mut Program, &mut Driver) + 'static,
    ) {
        self.add(name, Expected::CarriedOn(fault), move |program| {
            let mut driver = Driver::vsock(0);
            driver.start(program);
            attack(program, &mut driver);
            driver.wait_for_needs_reset(program);
            connect_and_carry_on(program, 1);
        });
    }

    /// Adds an attack on an open connection, which must survive it.
    fn add_survived(
        &mut self,
        name: &'static str,
        expected: Expected,
        attack: impl Fn(&mut Program, &mut Driver) + 'static,
    ) {
        self.add(name, expected, move |program| {
            let mut driver = connected_driver(program);
            attack(program, &mut driver);
            driver.exchange_ping(program);
            program.write_log(CARRIED_ON);
        });
    }

    /// Adds an attack on an open connection, which must end it.
    fn add_cut_off(
        &mut self,
        name: &'static str,
        fault: impl Into<Option<PacketFault>>,
        attack: impl Fn(&mut Program, &mut Driver) + 'static,
    ) {
        let fault = fault.into().map(GuestFault::Packet);
        self.add(name, Expected::CutOff(fault), move |program| {
            let mut driver = connected_driver(program);
            attack(program, &mut driver);
            driver.receive(program, Op::Rst);
            program.write_log(CUT_OFF);
        });
    }
}

/// The guest goes on, and this invalid packet was its first fault.
const fn carried_on_after(fault: PacketFault) -> Expected {
    Expected::CarriedOn(GuestFault::Packet(fault))
}

/// Opens a connection and proves that it works.
fn connected_driver(program: &mut Program) -> Driver {
    let mut driver = Driver::vsock(0);
    driver.start(program);
    driver.connect(program);
    driver.exchange_ping(program);
    driver
}

/// Starts the vsock device after so many resets, and proves that it works.
fn connect_and_carry_on(program: &mut Program, generation: u64) {
    let mut driver = Driver::vsock(generation);
    driver.start(program);
    driver.connect(program);
    driver.exchange_ping(program);
    program.write_log(CARRIED_ON);
}
