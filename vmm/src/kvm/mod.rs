//! KVM, as far as a microVM needs it.

pub mod vm_state;

use std::path::Path;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MEM_READONLY, Msrs, kvm_msr_entry,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MmapRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::x86_64::cpuid::Processor;
use crate::arch::x86_64::{cpuid, layout, registers};
use crate::memory::GuestRam;

/// The one version of the API there has been since 2007.
const API_VERSION: i32 = 12;

/// Creating a VM sets up kernel threads and is interrupted by any signal, a stray one included; more often than this in a
/// row is something else.
const CREATE_ATTEMPTS: usize = 8;

/// Room for CPUID entries in the first try.
const CPUID_ENTRIES: usize = 96;

/// KVM cannot be used, or refused something.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// There is no `/dev/kvm`.
    #[error(
        "open /dev/kvm: it does not exist: enable virtualization in the firmware (or nested virtualization for this machine) and load `kvm_intel` or `kvm_amd`"
    )]
    Missing,
    /// This user may not.
    #[error(
        "open /dev/kvm: permission denied: add your user to the group `kvm` (`sudo usermod -aG kvm $USER`, then log in again)"
    )]
    Permission,
    /// Another error.
    #[error("open /dev/kvm")]
    Open(#[source] kvm_ioctls::Error),
    /// Something is there that is not KVM as we know it.
    #[error("/dev/kvm speaks version {version} of its interface, this monitor {API_VERSION}")]
    Version {
        /// What it speaks.
        version: i32,
    },
    /// The kernel is too old or lacks an option.
    #[error("KVM lacks {0}: Linux 4.12 or newer has it")]
    Lacks(&'static str),
    /// A request failed.
    #[error("KVM: {operation}")]
    Call {
        /// What was asked for.
        operation: &'static str,
        /// Why not.
        source: kvm_ioctls::Error,
    },
    /// KVM took fewer registers than it was given.
    #[error("KVM set {done} of {asked} model-specific registers")]
    Msrs {
        /// How many it took.
        done: usize,
        /// How many it was given.
        asked: usize,
    },
}

impl KvmError {
    /// Classifies an error of opening `/dev/kvm`.
    pub(crate) fn from_open(error: kvm_ioctls::Error) -> Self {
        match error.errno() {
            libc::ENOENT | libc::ENODEV | libc::ENXIO if !Path::new("/dev/kvm").exists() => {
                Self::Missing
            }
            libc::EACCES | libc::EPERM => Self::Permission,
            _ => Self::Open(error),
        }
    }
}

/// Gives an error of KVM its operation.
trait During<T> {
    fn during(self, operation: &'static str) -> Result<T, KvmError>;
}

impl<T> During<T> for Result<T, kvm_ioctls::Error> {
    fn during(self, operation: &'static str) -> Result<T, KvmError> {
        self.map_err(|source| KvmError::Call { operation, source })
    }
}

/// Opens `/dev/kvm` and checks that it can do what a microVM needs.
///
/// # Errors
/// Tells a missing device, missing permission and missing abilities apart.
pub fn open() -> Result<Kvm, KvmError> {
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

/// The version of the interface, for the probe's report.
pub fn api_version(kvm: &Kvm) -> i32 {
    kvm.get_api_version()
}

/// A VM with memory, interrupt controllers, and no vCPUs yet.
pub struct Vm {
    fd: VmFd,
    /// What KVM supports, before it is fitted to each vCPU.
    cpuid: CpuId,
    /// Whether KVM emulates the TSC deadline timer.
    deadline: bool,
    slots: u32,
}

impl Vm {
    /// Creates an empty VM.
    ///
    /// # Errors
    /// KVM refuses; [`KvmError::Call`] says what.
    pub fn new(kvm: &Kvm) -> Result<Self, KvmError> {
        let fd = create(kvm)?;
        // Twice as many as any processor has; most of the longest list there can be would be zeroed, and copied, for nothing.
        let cpuid = kvm
            .get_supported_cpuid(CPUID_ENTRIES)
            .or_else(|error| match error.errno() {
                libc::E2BIG => kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES),
                _ => Err(error),
            })
            .during("get supported CPUID")?;
        let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        fd.set_tss_address(layout::KVM_TSS).during("set TSS address")?;
        Ok(Self { fd, cpuid, deadline, slots: 0 })
    }

    /// Gives the VM interrupt controllers (PIC, I/O APIC, local APICs). There is no timer chip: guests use the TSC deadline
    /// timer of the local APIC.
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
            self.add_memory(region.start_addr(), region.as_ptr(), region.len(), 0)?;
        }
        Ok(())
    }

    /// Gives the VM memory it cannot write to. `region` must live as long as the VM.
    ///
    /// # Errors
    /// KVM refuses the range.
    pub fn add_read_only(
        &mut self,
        at: GuestAddress,
        region: &MmapRegion<()>,
    ) -> Result<(), KvmError> {
        self.add_memory(at, region.as_ptr(), region.size() as u64, KVM_MEM_READONLY)
    }

    fn add_memory(
        &mut self,
        at: GuestAddress,
        host: *mut u8,
        bytes: u64,
        flags: u32,
    ) -> Result<(), KvmError> {
        let region = kvm_userspace_memory_region {
            slot: self.slots,
            flags,
            guest_phys_addr: at.0,
            memory_size: bytes,
            userspace_addr: host as u64,
        };
        self.slots += 1;
        // SAFETY: the range is one whole mapping, which its owner keeps as long as the VM: a `Monitor` drops vCPUs and VM
        // before memory.
        unsafe { self.fd.set_user_memory_region(region) }.during("set memory region")
    }

    /// Makes KVM write to `event` when the guest writes `value` to the 32-bit register at `address`.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn notify(
        &self,
        event: &EventFd,
        address: GuestAddress,
        value: u32,
    ) -> Result<(), KvmError> {
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(address.0), value)
            .during("register ioeventfd")
    }

    /// Makes KVM raise an interrupt line, edge-triggered, when `event` is written to.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn interrupt(&self, event: &EventFd, line: u32) -> Result<(), KvmError> {
        self.fd.register_irqfd(event, line).during("register irqfd")
    }

    /// Creates a vCPU. The first is ready to enter the kernel at `entry`; the others wait to be started by it.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn add_vcpu(&self, index: u8, vcpus: u8, entry: GuestAddress) -> Result<VcpuFd, KvmError> {
        let vcpu = self.fd.create_vcpu(index.into()).during("create vCPU")?;
        vcpu.set_cpuid2(&self.cpuid_of(index, vcpus)).during("set CPUID")?;
        set_msrs(&vcpu, &registers::entry_msrs())?;
        if index == 0 {
            let mut sregs = vcpu.get_sregs().during("get special registers")?;
            registers::enter_long_mode(&mut sregs);
            vcpu.set_sregs(&sregs).during("set special registers")?;
            vcpu.set_regs(&registers::entry_registers(entry)).during("set registers")?;
        }
        Ok(vcpu)
    }

    /// What vCPU `index` of `vcpus` is told about its processor.
    fn cpuid_of(&self, index: u8, vcpus: u8) -> CpuId {
        cpuid::for_vcpu(&self.cpuid, index, vcpus, self.deadline)
    }

    /// The processor that a guest with so many vCPUs sees.
    pub fn processor(&self, vcpus: u8) -> Processor {
        Processor::of(&self.cpuid_of(0, vcpus))
    }

    /// Creates the vCPU of the probe: in 64-bit mode, allowed to use SSE, with nothing else set up.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn add_probe_vcpu(&self, entry: GuestAddress) -> Result<VcpuFd, KvmError> {
        let vcpu = self.fd.create_vcpu(0).during("create vCPU")?;
        vcpu.set_cpuid2(&self.cpuid).during("set CPUID")?;
        let mut sregs = vcpu.get_sregs().during("get special registers")?;
        registers::enter_long_mode(&mut sregs);
        sregs.cr4 |= registers::CR4_OSFXSR;
        vcpu.set_sregs(&sregs).during("set special registers")?;
        vcpu.set_regs(&registers::entry_registers(entry)).during("set registers")?;
        Ok(vcpu)
    }
}

/// Sets registers; all of them, or it is an error.
fn set_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), KvmError> {
    let asked = entries.len();
    let msrs = Msrs::from_entries(entries).map_err(|_| KvmError::Msrs { done: 0, asked })?;
    let done = vcpu.set_msrs(&msrs).during("set model-specific registers")?;
    if done == asked { Ok(()) } else { Err(KvmError::Msrs { done, asked }) }
}

fn create(kvm: &Kvm) -> Result<VmFd, KvmError> {
    let mut result = kvm.create_vm();
    for _ in 1..CREATE_ATTEMPTS {
        match &result {
            Err(error) if error.errno() == libc::EINTR => result = kvm.create_vm(),
            _ => break,
        }
    }
    result.during("create VM")
}
