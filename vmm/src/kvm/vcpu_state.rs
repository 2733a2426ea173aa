//! Saves and restores one vCPU.
//!
//! The order of the calls is that of KVM's own dependencies. Reading `MP_STATE` may deliver a
//! start-up that changes registers. Events are right only when nothing else changes them. The
//! address of the local APIC is a special register, the mode of its timer decides about the
//! deadline, and the deadline is a count of the time stamp counter, which has to be right first.
//! Sources: `Documentation/virt/kvm/api.rst` of Linux, and the experience of other monitors.

use kvm_bindings::{kvm_lapic_state, kvm_xcrs, kvm_xsave};
use kvm_ioctls::VcpuFd;

use super::Vm;
use super::error::{During, KvmError};
use super::msrs::{KVM_MSRS, MSR_TSC, MSR_TSC_DEADLINE, read_msr, write_msrs};
use crate::state::vcpu::{FpuState, Timekeeping, VcpuState};

/// The number of the extended control register that enables the parts of the XSAVE area.
const XCR0: u32 = 0;

/// The word of the local APIC's registers with the mode of its timer (`LVT Timer`, offset 0x320).
const LVT_TIMER_WORD: usize = 0x320 / 4;
const LVT_TIMER_MODE: u32 = 0b11 << 17;
const LVT_TIMER_MODE_DEADLINE: u32 = 0b10 << 17;

/// Everything that is needed to save the vCPUs of one guest.
pub(super) struct SaveContext {
    /// Set if the processor has XSAVE. KVM accepts the calls without it as well, and half of them
    /// fail.
    pub has_xsave: bool,
    /// The model-specific registers that may be worth saving.
    pub msrs: Vec<u32>,
    /// A vCPU that never ran, to compare with and to try registers on.
    pub spare_vcpu: VcpuFd,
}

impl Vm {
    /// Creates a vCPU in a saved state, except for its time: see [`resume_time`].
    ///
    /// # Errors
    /// KVM refuses.
    pub fn restore_vcpu(
        &self,
        index: u8,
        vcpus: u8,
        state: &VcpuState,
    ) -> Result<VcpuFd, KvmError> {
        let vcpu = self.create_vcpu(index, vcpus)?;
        vcpu.set_mp_state(state.activity).during("set the activity of a vCPU")?;
        vcpu.set_regs(&state.regs).during("set registers")?;
        vcpu.set_sregs(&state.sregs).during("set special registers")?;
        restore_fpu(&vcpu, &state.fpu)?;
        vcpu.set_debug_regs(&state.debug).during("set debug registers")?;
        vcpu.set_lapic(&lapic_from_words(&state.lapic)).during("set the local APIC")?;
        vcpu.set_tsc_khz(state.tsc_khz).during("set the frequency of the time stamp counter")?;
        write_msrs(&vcpu, &state.msrs)?;
        vcpu.set_vcpu_events(&state.events).during("set events")?;
        Ok(vcpu)
    }
}

fn restore_fpu(vcpu: &VcpuFd, fpu: &FpuState) -> Result<(), KvmError> {
    match fpu {
        FpuState::Fxsave(fpu) => vcpu.set_fpu(fpu).during("set floating point registers"),
        FpuState::Xsave { area, xcr0 } => {
            let mut xsave = Box::<kvm_xsave>::default();
            for (word, saved) in xsave.region.iter_mut().zip(area) {
                *word = *saved;
            }
            // SAFETY: the call reads 4 KiB, which is the whole structure: no feature that needs
            // more was ever enabled for this process.
            unsafe { vcpu.set_xsave(&xsave) }.during("set vector registers")?;
            let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
            (xcrs.xcrs[0].xcr, xcrs.xcrs[0].value) = (XCR0, *xcr0);
            vcpu.set_xcrs(&xcrs).during("set extended control registers")
        }
    }
}

/// Sets the time of a restored vCPU. Call it just before the vCPU runs. All vCPUs of a guest get
/// the same counter, by which KVM knows that they run in step.
///
/// # Errors
/// KVM refuses.
pub fn resume_time(vcpu: &VcpuFd, time: Timekeeping) -> Result<(), KvmError> {
    let Timekeeping { tsc, deadline } = time;
    match deadline {
        // Zero means that the timer has fired. The interrupt may not have reached the local APIC
        // yet when that was saved: fire it again, which is harmless to a guest.
        Some(deadline) => {
            let deadline = if deadline == 0 { tsc } else { deadline };
            write_msrs(vcpu, &[(MSR_TSC, tsc), (MSR_TSC_DEADLINE, deadline)])?;
        }
        None => write_msrs(vcpu, &[(MSR_TSC, tsc)])?,
    }
    match vcpu.kvmclock_ctrl() {
        // A guest without a clock from KVM, or without one yet, cannot be told that it was paused.
        Err(error) if error.errno() == libc::EINVAL => Ok(()),
        result => result.during("tell the guest that it was paused"),
    }
}

/// Reads the state of a vCPU.
pub(super) fn save_vcpu(vcpu: &VcpuFd, context: &SaveContext) -> Result<VcpuState, KvmError> {
    let activity = vcpu.get_mp_state().during("get the activity of a vCPU")?;
    let regs = vcpu.get_regs().during("get registers")?;
    let sregs = vcpu.get_sregs().during("get special registers")?;
    let fpu = save_fpu(vcpu, context.has_xsave)?;
    let debug = vcpu.get_debug_regs().during("get debug registers")?;
    let lapic = lapic_to_words(&vcpu.get_lapic().during("get the local APIC")?);
    let tsc_khz = vcpu.get_tsc_khz().during("get the frequency of the time stamp counter")?;
    let has_deadline = lapic
        .get(LVT_TIMER_WORD)
        .is_some_and(|timer| timer & LVT_TIMER_MODE == LVT_TIMER_MODE_DEADLINE);
    let time = Timekeeping {
        tsc: read_msr(vcpu, MSR_TSC).unwrap_or(0),
        deadline: read_msr(vcpu, MSR_TSC_DEADLINE).filter(|_| has_deadline),
    };
    let msrs = save_msrs(vcpu, context);
    let events = vcpu.get_vcpu_events().during("get events")?;
    Ok(VcpuState { tsc_khz, activity, regs, sregs, fpu, debug, lapic, msrs, time, events })
}

fn save_fpu(vcpu: &VcpuFd, has_xsave: bool) -> Result<FpuState, KvmError> {
    if !has_xsave {
        let fpu = vcpu.get_fpu().during("get floating point registers")?;
        return Ok(FpuState::Fxsave(Box::new(fpu)));
    }
    let xsave = vcpu.get_xsave().during("get vector registers")?;
    let xcrs = vcpu.get_xcrs().during("get extended control registers")?;
    let count = usize::try_from(xcrs.nr_xcrs).unwrap_or(0).min(xcrs.xcrs.len());
    let xcr0 = xcrs.xcrs[..count].iter().find(|xcr| xcr.xcr == XCR0);
    Ok(FpuState::Xsave { area: xsave.region.to_vec(), xcr0: xcr0.map_or(1, |xcr| xcr.value) })
}

/// Reads the model-specific registers that have to be set in a restored vCPU: not those that are
/// zero and are zero in a new vCPU, and not those that cannot be set. The registers of KVM cannot
/// be tried, because they are addresses of guest memory, of which the spare VM has none.
fn save_msrs(vcpu: &VcpuFd, context: &SaveContext) -> Vec<(u32, u64)> {
    let SaveContext { msrs, spare_vcpu, .. } = context;
    let saved = msrs.iter().filter_map(|index| {
        let value = read_msr(vcpu, *index)?;
        let is_default = value == 0 && read_msr(spare_vcpu, *index) == Some(0);
        let can_be_set =
            || KVM_MSRS.contains(index) || write_msrs(spare_vcpu, &[(*index, value)]).is_ok();
        (!is_default && can_be_set()).then_some((*index, value))
    });
    saved.collect()
}

fn lapic_to_words(lapic: &kvm_lapic_state) -> Vec<u32> {
    let words = lapic.regs.chunks_exact(4);
    words
        .map(|bytes| u32::from_le_bytes(std::array::from_fn(|at| bytes[at].cast_unsigned())))
        .collect()
}

fn lapic_from_words(words: &[u32]) -> kvm_lapic_state {
    let mut lapic = kvm_lapic_state::default();
    for (bytes, word) in lapic.regs.chunks_exact_mut(4).zip(words) {
        for (byte, value) in bytes.iter_mut().zip(word.to_le_bytes()) {
            *byte = value.cast_signed();
        }
    }
    lapic
}
