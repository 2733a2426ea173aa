//! The saved state of processors and interrupt controllers: what KVM gives out and takes back, as bytes.

use kvm_bindings::{
    kvm_debugregs, kvm_fpu, kvm_ioapic_state, kvm_mp_state, kvm_pic_state, kvm_regs, kvm_sregs,
    kvm_vcpu_events,
};

use crate::state::Malformed;
use crate::state::wire::{Plain, Reader, Writer};

/// The most model-specific registers of a vCPU: as many as one call of KVM takes.
pub const MAX_MSRS: u16 = 256;

/// The size of the XSAVE area, in 32-bit words.
pub const XSAVE_WORDS: usize = 1024;
/// The registers of a local APIC, in 32-bit words.
pub const LAPIC_WORDS: usize = 256;

// SAFETY (all of them): structures of the kernel's interface, made of integers, with explicit fields where padding would be.
// SAFETY: see above.
unsafe impl Plain for kvm_regs {}
// SAFETY: see above.
unsafe impl Plain for kvm_sregs {}
// SAFETY: see above.
unsafe impl Plain for kvm_fpu {}
// SAFETY: see above.
unsafe impl Plain for kvm_debugregs {}
// SAFETY: see above.
unsafe impl Plain for kvm_vcpu_events {}
// SAFETY: see above.
unsafe impl Plain for kvm_mp_state {}
// SAFETY: see above.
unsafe impl Plain for kvm_pic_state {}
// SAFETY: see above; its union is an integer and its bit fields.
unsafe impl Plain for kvm_ioapic_state {}

/// Registers of the floating point and vector units.
#[derive(Clone)]
pub enum Vectors {
    /// Of a processor without XSAVE.
    Fxsave(Box<kvm_fpu>),
    /// Of one with it: the area in its standard form, and which parts of it are in use.
    Xsave {
        /// The area: [`XSAVE_WORDS`].
        area: Vec<u32>,
        /// The register that enables parts of it.
        xcr0: u64,
    },
}

/// One vCPU.
#[derive(Clone)]
pub struct VcpuState {
    /// The frequency its time stamp counter had.
    pub tsc_khz: u32,
    /// Running, halted, or waiting to be started.
    pub activity: kvm_mp_state,
    /// General registers.
    pub regs: kvm_regs,
    /// Segments, control registers, the address of the local APIC.
    pub sregs: kvm_sregs,
    /// Floating point and vectors.
    pub vectors: Vectors,
    /// Break points.
    pub debug: kvm_debugregs,
    /// The local APIC's registers: [`LAPIC_WORDS`].
    pub lapic: Vec<u32>,
    /// Model-specific registers: index and value, in the order in which they are to be set.
    pub msrs: Vec<(u32, u64)>,
    /// The time stamp counter, and when its timer is to fire; set last, when the guest goes on.
    pub time: Timekeeping,
    /// Exceptions and interrupts on their way.
    pub events: kvm_vcpu_events,
}

/// What of a vCPU goes on by itself while it does not run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timekeeping {
    /// The time stamp counter.
    pub tsc: u64,
    /// At which count the timer of the local APIC fires; zero if it is not in this mode.
    pub deadline: Option<u64>,
}

/// The interrupt controllers that the vCPUs share.
#[derive(Clone, Copy)]
pub struct ChipState {
    /// Both PICs.
    pub pics: [kvm_pic_state; 2],
    /// The I/O APIC.
    pub ioapic: kvm_ioapic_state,
}

impl ChipState {
    /// Writes all of it.
    pub fn encode(&self, writer: &mut Writer) {
        writer.plain(&self.pics);
        writer.sparse(&self.ioapic);
    }

    /// Reads it back.
    ///
    /// # Errors
    /// There are not enough bytes.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Self { pics: reader.plain()?, ioapic: reader.sparse()? })
    }
}

impl VcpuState {
    /// Writes all of it.
    pub fn encode(&self, writer: &mut Writer) {
        writer.plain(&self.tsc_khz);
        writer.plain(&self.activity);
        writer.sparse(&self.regs);
        writer.sparse(&self.sregs);
        match &self.vectors {
            Vectors::Fxsave(fpu) => {
                writer.plain(&0u8);
                writer.sparse(&**fpu);
            }
            Vectors::Xsave { area, xcr0 } => {
                writer.plain(&1u8);
                writer.plain(xcr0);
                writer.sparse_words(area);
            }
        }
        writer.sparse(&self.debug);
        writer.sparse_words(&self.lapic);
        writer.list(&self.msrs, MAX_MSRS, |writer, (index, data)| {
            writer.plain(index);
            writer.sparse(data);
        });
        writer.plain(&self.time.tsc);
        writer.plain(&u8::from(self.time.deadline.is_some()));
        writer.plain(&self.time.deadline.unwrap_or(0));
        writer.sparse(&self.events);
    }

    /// Reads it back.
    ///
    /// # Errors
    /// It is malformed.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Self {
            tsc_khz: reader.plain()?,
            activity: reader.plain()?,
            regs: reader.sparse()?,
            sregs: reader.sparse()?,
            vectors: if reader.flag()? {
                Vectors::Xsave { xcr0: reader.plain()?, area: reader.sparse_words(XSAVE_WORDS)? }
            } else {
                Vectors::Fxsave(Box::new(reader.sparse()?))
            },
            debug: reader.sparse()?,
            lapic: reader.sparse_words(LAPIC_WORDS)?,
            msrs: reader.list(MAX_MSRS, |reader| Ok((reader.plain()?, reader.sparse()?)))?,
            time: {
                let (tsc, armed, deadline) = (reader.plain()?, reader.flag()?, reader.plain()?);
                Timekeeping { tsc, deadline: armed.then_some(deadline) }
            },
            events: reader.sparse()?,
        })
    }
}
