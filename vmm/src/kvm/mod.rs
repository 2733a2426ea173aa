//! KVM: the VM of one guest, its memory, interrupts and vCPUs.
//!
//! Source: `Documentation/virt/kvm/api.rst` of Linux.

mod error;
mod msrs;
pub mod vcpu_state;
pub mod vm_state;

use kvm_bindings::{
    CpuId, KVM_CAP_PMU_CAPABILITY, KVM_MAX_CPUID_ENTRIES, KVM_MEM_READONLY, KVM_PMU_CAP_DISABLE,
    kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MmapRegion};
use vmm_sys_util::eventfd::EventFd;

use self::error::During;
pub use self::error::KvmError;
use crate::arch::x86_64::{cpuid, layout, registers};
use crate::memory::GuestRam;
use crate::state::processor::Processor;

/// The version of the API, which has not changed since 2007.
const API_VERSION: i32 = 12;

/// The most attempts at creating a VM. It sets up kernel threads and is interrupted by any signal,
/// a stray one included; more interruptions in a row have another cause.
const CREATE_ATTEMPTS: usize = 8;

/// Room for CPUID entries in the first attempt: twice as many as any processor has. Most of the
/// longest possible list would be zeroed and copied for nothing.
const CPUID_ENTRIES: usize = 96;

/// Opens `/dev/kvm` and checks that it has what a microVM needs.
///
/// # Errors
/// A missing device, a missing permission and a missing ability are errors of their own.
pub fn open_kvm() -> Result<Kvm, KvmError> {
    let kvm = Kvm::new().map_err(KvmError::from_open)?;
    match kvm.get_api_version() {
        API_VERSION => {}
        version => return Err(KvmError::Version { version }),
    }
    for (cap, name) in [
        (Cap::Irqchip, "an in-kernel interrupt controller"),
        (Cap::Ioeventfd, "ioeventfd"),
        (Cap::Irqfd, "irqfd"),
        (Cap::ReadonlyMem, "read-only memory"),
        (Cap::ImmediateExit, "immediate exit"),
    ] {
        if !kvm.check_extension(cap) {
            return Err(KvmError::Lacks(name));
        }
    }
    Ok(kvm)
}

/// Returns the version of the API, for the report of the probe.
pub fn api_version(kvm: &Kvm) -> i32 {
    kvm.get_api_version()
}

/// A VM.
pub struct Vm {
    fd: VmFd,
    /// The CPUID that KVM supports, before it is fitted to each vCPU.
    cpuid: CpuId,
    /// Set if KVM emulates the TSC deadline timer.
    has_tsc_deadline: bool,
    /// The number of memory slots in use.
    slots: u32,
}

impl Vm {
    /// Creates a VM without memory, interrupt controllers and vCPUs.
    ///
    /// # Errors
    /// KVM refuses; [`KvmError::Call`] names the operation.
    pub fn new(kvm: &Kvm) -> Result<Self, KvmError> {
        let fd = create_vm(kvm)?;
        let cpuid = kvm
            .get_supported_cpuid(CPUID_ENTRIES)
            .or_else(|error| match error.errno() {
                libc::E2BIG => kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES),
                _ => Err(error),
            })
            .during("get supported CPUID")?;
        let has_tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        fd.set_tss_address(layout::KVM_TSS).during("set TSS address")?;
        Ok(Self { fd, cpuid, has_tsc_deadline, slots: 0 })
    }

    /// Takes the performance counters from the guest. Call it before a vCPU is created.
    ///
    /// The counters that AMD's processors have always had are in no leaf of CPUID, so that hiding
    /// features leaves them in place: they count the cache misses and branches of the host's
    /// processor. Returns false if KVM refuses: before Linux 5.18 it cannot disable them, and one
    /// that was loaded without counters (`enable_pmu=0`) needs no more.
    pub fn disable_counters(&self) -> bool {
        let capability = kvm_enable_cap {
            cap: KVM_CAP_PMU_CAPABILITY,
            args: [KVM_PMU_CAP_DISABLE.into(), 0, 0, 0],
            ..Default::default()
        };
        self.fd.enable_cap(&capability).is_ok()
    }

    /// Adds interrupt controllers: PIC, I/O APIC, local APICs. There is no timer chip, because
    /// guests use the TSC deadline timer of the local APIC.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn add_interrupt_controllers(&self) -> Result<(), KvmError> {
        self.fd.create_irq_chip().during("create interrupt controllers")
    }

    /// Gives the VM its RAM. `ram` must live as long as the VM.
    ///
    /// # Errors
    /// KVM refuses a range.
    pub fn add_ram(&mut self, ram: &GuestRam) -> Result<(), KvmError> {
        for region in ram.iter() {
            self.add_memory_slot(region.start_addr(), region.as_ptr(), region.len(), 0)?;
        }
        Ok(())
    }

    /// Gives the VM memory that it cannot write to. `region` must live as long as the VM.
    ///
    /// # Errors
    /// KVM refuses the range.
    pub fn add_read_only_memory(
        &mut self,
        address: GuestAddress,
        region: &MmapRegion<()>,
    ) -> Result<(), KvmError> {
        self.add_memory_slot(address, region.as_ptr(), region.size() as u64, KVM_MEM_READONLY)
    }

    fn add_memory_slot(
        &mut self,
        address: GuestAddress,
        host: *mut u8,
        bytes: u64,
        flags: u32,
    ) -> Result<(), KvmError> {
        let region = kvm_userspace_memory_region {
            slot: self.slots,
            flags,
            guest_phys_addr: address.0,
            memory_size: bytes,
            userspace_addr: host as u64,
        };
        self.slots += 1;
        // SAFETY: the range is one whole mapping, and its owner keeps it as long as the VM: a
        // `MicroVm` drops vCPUs and VM before its memory.
        unsafe { self.fd.set_user_memory_region(region) }.during("set memory region")
    }

    /// Registers an ioeventfd: KVM writes to `event` when the guest writes `value` to the 32-bit
    /// register at `address`.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn register_ioeventfd(
        &self,
        event: &EventFd,
        address: GuestAddress,
        value: u32,
    ) -> Result<(), KvmError> {
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(address.0), value)
            .during("register ioeventfd")
    }

    /// Registers an irqfd: KVM raises an interrupt line, edge-triggered, when `event` is written
    /// to.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn register_irqfd(&self, event: &EventFd, line: u32) -> Result<(), KvmError> {
        self.fd.register_irqfd(event, line).during("register irqfd")
    }

    /// Creates a vCPU of a guest that boots. The first is ready to enter the kernel at `entry`; the
    /// others wait until the kernel starts them.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn create_boot_vcpu(
        &self,
        index: u8,
        vcpus: u8,
        entry: GuestAddress,
    ) -> Result<VcpuFd, KvmError> {
        let vcpu = self.create_vcpu(index, vcpus)?;
        msrs::write_msrs(&vcpu, &registers::ENTRY_MSRS)?;
        if index == 0 {
            let mut sregs = vcpu.get_sregs().during("get special registers")?;
            registers::enter_long_mode(&mut sregs);
            vcpu.set_sregs(&sregs).during("set special registers")?;
            vcpu.set_regs(&registers::entry_registers(entry)).during("set registers")?;
        }
        Ok(vcpu)
    }

    /// Creates the vCPU of the probe: in 64-bit mode, allowed to use SSE, with nothing else set up.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn create_probe_vcpu(&self, entry: GuestAddress) -> Result<VcpuFd, KvmError> {
        let vcpu = self.fd.create_vcpu(0).during("create vCPU")?;
        vcpu.set_cpuid2(&self.cpuid).during("set CPUID")?;
        let mut sregs = vcpu.get_sregs().during("get special registers")?;
        registers::enter_long_mode(&mut sregs);
        sregs.cr4 |= registers::CR4_OSFXSR;
        vcpu.set_sregs(&sregs).during("set special registers")?;
        vcpu.set_regs(&registers::entry_registers(entry)).during("set registers")?;
        Ok(vcpu)
    }

    /// Creates vCPU `index` of `vcpus`, with its CPUID.
    fn create_vcpu(&self, index: u8, vcpus: u8) -> Result<VcpuFd, KvmError> {
        let vcpu = self.fd.create_vcpu(index.into()).during("create vCPU")?;
        vcpu.set_cpuid2(&self.vcpu_cpuid(index, vcpus)).during("set CPUID")?;
        Ok(vcpu)
    }

    /// Returns the CPUID of vCPU `index` of `vcpus`.
    fn vcpu_cpuid(&self, index: u8, vcpus: u8) -> CpuId {
        cpuid::fit_to_vcpu(&self.cpuid, index, vcpus, self.has_tsc_deadline)
    }

    /// Returns the processor that a guest with so many vCPUs sees.
    pub fn processor(&self, vcpus: u8) -> Processor {
        Processor::from_cpuid(&self.vcpu_cpuid(0, vcpus))
    }
}

fn create_vm(kvm: &Kvm) -> Result<VmFd, KvmError> {
    let mut result = kvm.create_vm();
    for _ in 1..CREATE_ATTEMPTS {
        match &result {
            Err(error) if error.errno() == libc::EINTR => result = kvm.create_vm(),
            _ => break,
        }
    }
    result.during("create VM")
}
