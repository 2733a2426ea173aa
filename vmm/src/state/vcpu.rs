//! The saved state of vCPUs and interrupt controllers, in the structures of KVM.

use kvm_bindings::{
    kvm_debugregs, kvm_fpu, kvm_ioapic_state, kvm_mp_state, kvm_pic_state, kvm_regs, kvm_sregs,
    kvm_vcpu_events,
};

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::malformed::Malformed;
use super::wire::{Reader, Writer};

/// The most model-specific registers of a vCPU: as many as one call of KVM takes.
pub const MAX_MSRS: u16 = 256;

/// The size of the XSAVE area, in 32-bit words.
pub const XSAVE_WORDS: usize = 1024;
/// The size of a local APIC's registers, in 32-bit words.
pub const LAPIC_WORDS: usize = 256;

/// The registers of the floating point and vector units.
#[derive(Clone)]
pub enum FpuState {
    /// Those of a processor without XSAVE.
    Fxsave(Box<kvm_fpu>),
    /// Those of a processor with XSAVE.
    Xsave {
        /// The area in its standard form: [`XSAVE_WORDS`].
        area: Vec<u32>,
        /// The extended control register that enables parts of the area.
        xcr0: u64,
    },
}

/// One vCPU.
#[derive(Clone)]
pub struct VcpuState {
    /// The frequency of the time stamp counter.
    pub tsc_khz: u32,
    /// Running, halted, or waiting to be started.
    pub activity: kvm_mp_state,
    /// The general registers.
    pub regs: kvm_regs,
    /// Segments, control registers, and the address of the local APIC.
    pub sregs: kvm_sregs,
    /// Floating point and vectors.
    pub fpu: FpuState,
    /// The debug registers.
    pub debug: kvm_debugregs,
    /// The registers of the local APIC: [`LAPIC_WORDS`].
    pub lapic: Vec<u32>,
    /// Model-specific registers: index and value, in the order in which they are set.
    pub msrs: Vec<(u32, u64)>,
    /// The state that continues by itself. Set last, when the guest continues.
    pub time: Timekeeping,
    /// Pending exceptions and interrupts.
    pub events: kvm_vcpu_events,
}

/// The state of a vCPU that continues by itself while the vCPU does not run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timekeeping {
    /// The time stamp counter.
    pub tsc: u64,
    /// The count at which the timer of the local APIC fires; `None` if it is not in this mode.
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

/// `kvm_fpu` as plain bytes, which kvm-bindings does not declare it to be.
#[derive(FromBytes, Immutable, IntoBytes)]
#[repr(C)]
struct FxsaveArea {
    fpr: [[u8; 16]; 8],
    fcw: u16,
    fsw: u16,
    ftwx: u8,
    pad1: u8,
    last_opcode: u16,
    last_ip: u64,
    last_dp: u64,
    xmm: [[u8; 16]; 16],
    mxcsr: u32,
    pad2: u32,
}

impl From<kvm_fpu> for FxsaveArea {
    fn from(fpu: kvm_fpu) -> Self {
        Self {
            fpr: fpu.fpr,
            fcw: fpu.fcw,
            fsw: fpu.fsw,
            ftwx: fpu.ftwx,
            pad1: fpu.pad1,
            last_opcode: fpu.last_opcode,
            last_ip: fpu.last_ip,
            last_dp: fpu.last_dp,
            xmm: fpu.xmm,
            mxcsr: fpu.mxcsr,
            pad2: fpu.pad2,
        }
    }
}

impl From<FxsaveArea> for kvm_fpu {
    fn from(area: FxsaveArea) -> Self {
        Self {
            fpr: area.fpr,
            fcw: area.fcw,
            fsw: area.fsw,
            ftwx: area.ftwx,
            pad1: area.pad1,
            last_opcode: area.last_opcode,
            last_ip: area.last_ip,
            last_dp: area.last_dp,
            xmm: area.xmm,
            mxcsr: area.mxcsr,
            pad2: area.pad2,
        }
    }
}

impl ChipState {
    /// Appends the state.
    pub fn encode(&self, writer: &mut Writer) {
        writer.write_value(&self.pics);
        writer.write_sparse(&self.ioapic);
    }

    /// Reads the state.
    ///
    /// # Errors
    /// There are too few bytes.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Self { pics: reader.read_value()?, ioapic: reader.read_sparse()? })
    }
}

impl FpuState {
    fn encode(&self, writer: &mut Writer) {
        match self {
            Self::Fxsave(fpu) => {
                writer.write_value(&0u8);
                writer.write_sparse(&FxsaveArea::from(**fpu));
            }
            Self::Xsave { area, xcr0 } => {
                writer.write_value(&1u8);
                writer.write_value(xcr0);
                writer.write_sparse_words(area);
            }
        }
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        if reader.read_flag()? {
            let xcr0 = reader.read_value()?;
            Ok(Self::Xsave { xcr0, area: reader.read_sparse_words(XSAVE_WORDS)? })
        } else {
            let area: FxsaveArea = reader.read_sparse()?;
            Ok(Self::Fxsave(Box::new(area.into())))
        }
    }
}

impl Timekeeping {
    fn encode(&self, writer: &mut Writer) {
        writer.write_value(&self.tsc);
        writer.write_value(&u8::from(self.deadline.is_some()));
        writer.write_value(&self.deadline.unwrap_or(0));
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        let (tsc, has_deadline) = (reader.read_value()?, reader.read_flag()?);
        let deadline = reader.read_value()?;
        Ok(Self { tsc, deadline: has_deadline.then_some(deadline) })
    }
}

impl VcpuState {
    /// Appends the state.
    pub fn encode(&self, writer: &mut Writer) {
        writer.write_value(&self.tsc_khz);
        writer.write_value(&self.activity);
        writer.write_sparse(&self.regs);
        writer.write_sparse(&self.sregs);
        self.fpu.encode(writer);
        writer.write_sparse(&self.debug);
        writer.write_sparse_words(&self.lapic);
        writer.write_list(&self.msrs, MAX_MSRS, |writer, (index, data)| {
            writer.write_value(index);
            writer.write_sparse(data);
        });
        self.time.encode(writer);
        writer.write_sparse(&self.events);
    }

    /// Reads the state.
    ///
    /// # Errors
    /// It is malformed.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Self {
            tsc_khz: reader.read_value()?,
            activity: reader.read_value()?,
            regs: reader.read_sparse()?,
            sregs: reader.read_sparse()?,
            fpu: FpuState::decode(reader)?,
            debug: reader.read_sparse()?,
            lapic: reader.read_sparse_words(LAPIC_WORDS)?,
            msrs: reader
                .read_list(MAX_MSRS, |reader| Ok((reader.read_value()?, reader.read_sparse()?)))?,
            time: Timekeeping::decode(reader)?,
            events: reader.read_sparse()?,
        })
    }
}
