//! Saves a VM whose vCPUs stand still, and restores the parts that belong to no vCPU.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVMIO, kvm_clock_data,
    kvm_irqchip, kvm_pic_state, kvm_pre_fault_memory,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use vm_memory::GuestAddress;
use vmm_sys_util::ioctl::ioctl_with_mut_ref;

use super::error::{During, KvmError};
use super::vcpu_state::{SaveContext, save_vcpu};
use super::{Vm, msrs};
use crate::state::vcpu::{ChipState, VcpuState};

mod ioctl_numbers {
    //! Numbers of requests that are younger than kvm-ioctls.
    vmm_sys_util::ioctl_iowr_nr!(
        KVM_PRE_FAULT_MEMORY,
        super::KVMIO,
        0xd5,
        super::kvm_pre_fault_memory
    );
}

/// The state that KVM holds of a guest.
pub struct SavedVm {
    /// The guest's clock in nanoseconds.
    pub clock_ns: u64,
    /// The interrupt controllers.
    pub chips: ChipState,
    /// The vCPUs, by index.
    pub vcpus: Vec<VcpuState>,
}

impl Vm {
    /// Reads the state that KVM holds of a guest whose vCPUs have left it permanently.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn save<'a>(
        &self,
        kvm: &Kvm,
        vcpus: impl ExactSizeIterator<Item = &'a VcpuFd>,
    ) -> Result<SavedVm, KvmError> {
        let count = u8::try_from(vcpus.len()).unwrap_or(u8::MAX);
        let spare = Vm::new(kvm)?;
        spare.add_interrupt_controllers()?;
        let spare_vcpu = spare.fd.create_vcpu(0).during("create vCPU")?;
        spare_vcpu.set_cpuid2(&self.vcpu_cpuid(0, count)).during("set CPUID")?;
        let context = SaveContext {
            has_xsave: kvm.check_extension(Cap::Xcrs),
            msrs: msrs::list_saved_msrs(kvm)?,
            spare_vcpu,
        };
        let vcpus = vcpus.map(|vcpu| save_vcpu(vcpu, &context)).collect::<Result<_, _>>()?;
        let clock = self.fd.get_clock().during("get the clock")?;
        let pics = [self.save_pic(KVM_IRQCHIP_PIC_MASTER)?, self.save_pic(KVM_IRQCHIP_PIC_SLAVE)?];
        let ioapic = self.save_chip(KVM_IRQCHIP_IOAPIC)?;
        // SAFETY: KVM has filled in the member that belongs to the chip.
        let ioapic = unsafe { ioapic.chip.ioapic };
        Ok(SavedVm { clock_ns: clock.clock, chips: ChipState { pics, ioapic }, vcpus })
    }

    fn save_pic(&self, id: u32) -> Result<kvm_pic_state, KvmError> {
        let pic = self.save_chip(id)?;
        // SAFETY: KVM has filled in the member that belongs to the chip.
        Ok(unsafe { pic.chip.pic })
    }

    fn save_chip(&self, id: u32) -> Result<kvm_irqchip, KvmError> {
        let mut chip = kvm_irqchip { chip_id: id, ..Default::default() };
        self.fd.get_irqchip(&mut chip).during("get an interrupt controller")?;
        Ok(chip)
    }

    /// Restores the interrupt controllers.
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

    /// Sets the guest's clock, which continues from there. Call it just before the guest runs.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn set_clock(&self, clock_ns: u64) -> Result<(), KvmError> {
        let clock = kvm_clock_data { clock: clock_ns, ..Default::default() };
        self.fd.set_clock(&clock).during("set the clock")
    }
}

/// Maps pages for the guest before it uses them, as far as they exist. Returns false if KVM cannot
/// do that, which Linux 6.11 can.
pub fn prefault_memory(vcpu: &VcpuFd, address: GuestAddress, bytes: u64) -> bool {
    let mut range = kvm_pre_fault_memory { gpa: address.0, size: bytes, ..Default::default() };
    // SAFETY: KVM reads and updates the structure, which names guest memory and no address of this
    // process.
    unsafe { ioctl_with_mut_ref(vcpu, ioctl_numbers::KVM_PRE_FAULT_MEMORY(), &mut range) == 0 }
}
