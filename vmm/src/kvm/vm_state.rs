//! Saving a VM whose vCPUs stand still, and making another one like it.
//!
//! The order matters and is that of KVM's own dependencies: reading `MP_STATE` may deliver a start-up that changes
//! registers, reading events is only right when nothing else changes them; the local APIC's address is a special register,
//! its timer's mode decides what becomes of the deadline, and the deadline is a time of a counter that has to be right
//! first. Sources: `Documentation/virt/kvm/api.rst` of Linux, and what other monitors had to learn.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVMIO, Msrs, kvm_clock_data,
    kvm_irqchip, kvm_lapic_state, kvm_msr_entry, kvm_pre_fault_memory, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use vm_memory::GuestAddress;
use vmm_sys_util::ioctl::ioctl_with_mut_ref;

use super::{During, KvmError, Vm};
use crate::arch::x86_64::state::{ChipState, Timekeeping, VcpuState, Vectors};

mod numbers {
    //! Of calls that are younger than the crate that wraps them.
    vmm_sys_util::ioctl_iowr_nr!(
        KVM_PRE_FAULT_MEMORY,
        super::KVMIO,
        0xd5,
        super::kvm_pre_fault_memory
    );
}

const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// What KVM itself adds: clocks, asynchronous page faults, stolen time, end of interrupt. KVM lists most of them.
const MSRS_OF_KVM: std::ops::RangeInclusive<u32> = 0x4b56_4d00..=0x4b56_4dff;
/// Memory types, which KVM keeps and does not list.
const MSRS_OF_MEMORY_TYPES: [std::ops::RangeInclusive<u32>; 5] =
    [0x200..=0x20f, 0x250..=0x250, 0x258..=0x259, 0x268..=0x26f, 0x2ff..=0x2ff];

/// Writing one of these has KVM write the time of day into guest memory, and nothing else: a guest does that when it wants
/// to know, and would only get a page of its own out of it.
const MSRS_OF_WALL_CLOCK: [u32; 2] = [0x11, 0x4b56_4d00];

const XCR0: u32 = 0;

/// What is saved of a VM, beside its vCPUs.
pub struct Shared {
    /// The guest's clock, nanoseconds.
    pub clock_ns: u64,
    /// Interrupt controllers.
    pub chips: ChipState,
}

impl Vm {
    /// Reads everything KVM holds of vCPUs that have left the guest for good.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn save<'a>(
        &self,
        kvm: &Kvm,
        vcpus: impl ExactSizeIterator<Item = &'a VcpuFd>,
    ) -> Result<(Vec<VcpuState>, Shared), KvmError> {
        let count = u8::try_from(vcpus.len()).unwrap_or(u8::MAX);
        // A vCPU that never ran, to compare with and to try out on.
        let spare = Vm::new(kvm)?;
        spare.add_interrupt_controllers()?;
        let fresh = spare.fd.create_vcpu(0).during("create vCPU")?;
        fresh.set_cpuid2(&self.cpuid_of(0, count)).during("set CPUID")?;
        let indices = candidates(kvm)?;

        // Where the processor has no XSAVE, KVM has the calls for it all the same, and half of them fail.
        let extended = kvm.check_extension(Cap::Xcrs);
        let states = vcpus
            .map(|vcpu| save_vcpu(vcpu, extended, &indices, &fresh))
            .collect::<Result<Vec<_>, _>>()?;
        let clock = self.fd.get_clock().during("get the clock")?;
        let chips = ChipState {
            pics: [self.pic(KVM_IRQCHIP_PIC_MASTER)?, self.pic(KVM_IRQCHIP_PIC_SLAVE)?],
            // SAFETY: KVM has filled in the part that belongs to the chip asked for.
            ioapic: unsafe { self.chip(KVM_IRQCHIP_IOAPIC)?.chip.ioapic },
        };
        Ok((states, Shared { clock_ns: clock.clock, chips }))
    }

    fn pic(&self, id: u32) -> Result<kvm_bindings::kvm_pic_state, KvmError> {
        let chip = self.chip(id)?;
        // SAFETY: KVM has filled in the part that belongs to the chip asked for.
        Ok(unsafe { chip.chip.pic })
    }

    fn chip(&self, id: u32) -> Result<kvm_irqchip, KvmError> {
        let mut chip = kvm_irqchip { chip_id: id, ..Default::default() };
        self.fd.get_irqchip(&mut chip).during("get an interrupt controller")?;
        Ok(chip)
    }

    /// Puts the interrupt controllers into a saved state.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn restore_chips(&self, chips: &ChipState) -> Result<(), KvmError> {
        let [master, slave] = chips.pics;
        let mut chip = kvm_irqchip::default();
        for (id, pic) in [(KVM_IRQCHIP_PIC_MASTER, master), (KVM_IRQCHIP_PIC_SLAVE, slave)] {
            chip.chip_id = id;
            chip.chip.pic = pic;
            self.fd.set_irqchip(&chip).during("set an interrupt controller")?;
        }
        chip.chip_id = KVM_IRQCHIP_IOAPIC;
        chip.chip.ioapic = chips.ioapic;
        self.fd.set_irqchip(&chip).during("set an interrupt controller")
    }

    /// Creates a vCPU in a saved state. What goes by time is not set yet: see [`resume`].
    ///
    /// # Errors
    /// KVM refuses.
    pub fn restore_vcpu(
        &self,
        index: u8,
        vcpus: u8,
        state: &VcpuState,
    ) -> Result<VcpuFd, KvmError> {
        let vcpu = self.fd.create_vcpu(index.into()).during("create vCPU")?;
        vcpu.set_cpuid2(&self.cpuid_of(index, vcpus)).during("set CPUID")?;
        vcpu.set_mp_state(state.activity).during("set the activity of a vCPU")?;
        vcpu.set_regs(&state.regs).during("set registers")?;
        vcpu.set_sregs(&state.sregs).during("set special registers")?;
        match &state.vectors {
            Vectors::Fxsave(fpu) => vcpu.set_fpu(fpu).during("set floating point registers")?,
            Vectors::Xsave { area, xcr0 } => {
                let mut xsave = Box::<kvm_xsave>::default();
                for (word, saved) in xsave.region.iter_mut().zip(area) {
                    *word = *saved;
                }
                // SAFETY: the call reads 4 KiB, which is all of the structure: no feature that needs more was ever
                // enabled for this process.
                unsafe { vcpu.set_xsave(&xsave) }.during("set vector registers")?;
                let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
                (xcrs.xcrs[0].xcr, xcrs.xcrs[0].value) = (XCR0, *xcr0);
                vcpu.set_xcrs(&xcrs).during("set extended control registers")?;
            }
        }
        vcpu.set_debug_regs(&state.debug).during("set debug registers")?;
        vcpu.set_lapic(&lapic_of(&state.lapic)).during("set the local APIC")?;
        vcpu.set_tsc_khz(state.tsc_khz).during("set the frequency of the time stamp counter")?;
        set_msrs(&vcpu, &state.msrs)?;
        vcpu.set_vcpu_events(&state.events).during("set events")?;
        Ok(vcpu)
    }

    /// Lets a restored guest's clock go on from where it stood: to be called just before the guest runs.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn set_clock(&self, clock_ns: u64) -> Result<(), KvmError> {
        let clock = kvm_clock_data { clock: clock_ns, ..Default::default() };
        self.fd.set_clock(&clock).during("set the clock")
    }
}

/// Lets a restored vCPU's time go on: to be called just before it runs. All vCPUs of a guest get the same counter: KVM then
/// knows that they run in step.
///
/// # Errors
/// KVM refuses.
pub fn resume(vcpu: &VcpuFd, time: Timekeeping) -> Result<(), KvmError> {
    let Timekeeping { tsc, deadline } = time;
    match deadline {
        // Zero says that the timer has fired. The interrupt may not have reached the local APIC yet when that was saved:
        // fire again, which no guest minds.
        Some(deadline) => {
            let deadline = if deadline == 0 { tsc } else { deadline };
            set_msrs(vcpu, &[(MSR_TSC, tsc), (MSR_TSC_DEADLINE, deadline)])?;
        }
        None => set_msrs(vcpu, &[(MSR_TSC, tsc)])?,
    }
    match vcpu.kvmclock_ctrl() {
        // A guest that has no clock from KVM (yet) cannot be told that it was paused.
        Err(error) if error.errno() == libc::EINVAL => Ok(()),
        result => result.during("tell the guest that it was paused"),
    }
}

/// Maps pages for the guest before it uses them, as far as KVM can (Linux 6.11) and they are there. Returns whether it can.
pub fn prefault(vcpu: &VcpuFd, at: GuestAddress, bytes: u64) -> bool {
    let mut range = kvm_pre_fault_memory { gpa: at.0, size: bytes, ..Default::default() };
    // SAFETY: KVM reads and updates the structure, which says what it needs to know about guest memory that it has.
    unsafe { ioctl_with_mut_ref(vcpu, numbers::KVM_PRE_FAULT_MEMORY(), &mut range) == 0 }
}

fn save_vcpu(
    vcpu: &VcpuFd,
    extended: bool,
    indices: &[u32],
    fresh: &VcpuFd,
) -> Result<VcpuState, KvmError> {
    let activity = vcpu.get_mp_state().during("get the activity of a vCPU")?;
    let regs = vcpu.get_regs().during("get registers")?;
    let sregs = vcpu.get_sregs().during("get special registers")?;
    let vectors = if extended {
        let xsave = vcpu.get_xsave().during("get vector registers")?;
        let xcrs = vcpu.get_xcrs().during("get extended control registers")?;
        let count = usize::try_from(xcrs.nr_xcrs).unwrap_or(0).min(xcrs.xcrs.len());
        let xcr0 = xcrs.xcrs[..count].iter().find(|xcr| xcr.xcr == XCR0);
        Vectors::Xsave { area: xsave.region.to_vec(), xcr0: xcr0.map_or(1, |xcr| xcr.value) }
    } else {
        Vectors::Fxsave(Box::new(vcpu.get_fpu().during("get floating point registers")?))
    };
    let debug = vcpu.get_debug_regs().during("get debug registers")?;
    let registers = vcpu.get_lapic().during("get the local APIC")?.regs;
    let lapic: Vec<_> = registers
        .chunks_exact(4)
        .map(|bytes| u32::from_le_bytes(std::array::from_fn(|at| bytes[at].cast_unsigned())))
        .collect();
    let tsc_khz = vcpu.get_tsc_khz().during("get the frequency of the time stamp counter")?;
    let time = Timekeeping {
        tsc: msr(vcpu, MSR_TSC).unwrap_or(0),
        deadline: msr(vcpu, MSR_TSC_DEADLINE).filter(|_| {
            lapic.get(TIMER_AT).is_some_and(|timer| timer & TIMER_MODE == TIMER_MODE_DEADLINE)
        }),
    };
    let msrs = indices
        .iter()
        .filter_map(|index| {
            let value = msr(vcpu, *index)?;
            let default = msr(fresh, *index);
            // What is zero, and zero in a vCPU that never ran, needs not be set.
            let kept = value != 0 || default != Some(0);
            // And what cannot be set is no state. KVM's own are addresses of memory, which the spare VM has none of.
            (kept && (MSRS_OF_KVM.contains(index) || set_msrs(fresh, &[(*index, value)]).is_ok()))
                .then_some((*index, value))
        })
        .collect();
    let events = vcpu.get_vcpu_events().during("get events")?;
    Ok(VcpuState { tsc_khz, activity, regs, sregs, vectors, debug, lapic, msrs, time, events })
}

/// The word of the local APIC's registers that says how its timer works (offset 0x320).
const TIMER_AT: usize = 0x320 / 4;
const TIMER_MODE: u32 = 0b11 << 17;
const TIMER_MODE_DEADLINE: u32 = 0b10 << 17;

/// Registers that may be worth saving. The time stamp counter and its deadline are treated by themselves.
fn candidates(kvm: &Kvm) -> Result<Vec<u32>, KvmError> {
    let listed = kvm.get_msr_index_list().during("list model-specific registers")?;
    let mut indices = listed.as_slice().to_vec();
    indices.extend(MSRS_OF_KVM);
    indices.extend(MSRS_OF_MEMORY_TYPES.into_iter().flatten());
    indices.retain(|index| {
        !matches!(*index, MSR_TSC | MSR_TSC_DEADLINE) && !MSRS_OF_WALL_CLOCK.contains(index)
    });
    indices.sort_unstable();
    indices.dedup();
    Ok(indices)
}

fn msr(vcpu: &VcpuFd, index: u32) -> Option<u64> {
    let mut msrs = Msrs::from_entries(&[kvm_msr_entry { index, ..Default::default() }]).ok()?;
    (vcpu.get_msrs(&mut msrs).ok()? == 1).then(|| msrs.as_slice()[0].data)
}

fn set_msrs(vcpu: &VcpuFd, values: &[(u32, u64)]) -> Result<(), KvmError> {
    let entries: Vec<_> = values
        .iter()
        .map(|(index, data)| kvm_msr_entry { index: *index, data: *data, ..Default::default() })
        .collect();
    super::set_msrs(vcpu, &entries)
}

fn lapic_of(words: &[u32]) -> kvm_lapic_state {
    let mut lapic = kvm_lapic_state::default();
    for (bytes, word) in lapic.regs.chunks_exact_mut(4).zip(words) {
        for (byte, value) in bytes.iter_mut().zip(word.to_le_bytes()) {
            *byte = value.cast_signed();
        }
    }
    lapic
}
