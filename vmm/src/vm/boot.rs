//! The boot recipe: from kernel and root image to vCPUs at the kernel's entry point.

use std::fs::File;

use kvm_ioctls::Kvm;
use vm_memory::GuestAddress;

use super::error::MonitorError;
use super::init::{VmInit, map_root_image};
use super::microvm::MicroVm;
use super::vcpu::Vcpu;
use crate::arch::x86_64::{boot, cmdline, layout, registers};
use crate::kernel::{KernelError, KernelImage};
use crate::kvm::KvmError;
use crate::spec::VmSpec;

/// Makes a microVM that boots a kernel.
pub(super) fn boot(
    spec: VmSpec,
    kernel: &File,
    image: File,
    kvm: Result<Kvm, KvmError>,
) -> Result<MicroVm, MonitorError> {
    // An error in the files is reported before one of KVM.
    let headers = read_kernel_headers(&spec, kernel)?;
    let image = map_root_image(&spec, image)?;

    let mut init = VmInit::new(spec, kvm?, image)?;
    init.load_kernel(kernel, &headers)?;
    init.add_interrupt_controllers()?;
    init.add_memory()?;
    init.add_vsock()?;
    init.add_root_image()?;
    init.add_console()?;
    #[cfg(feature = "seccomp-tests")]
    init.devices.add_seccomp_test_port();
    init.write_page_tables()?;
    init.write_boot_parameters()?;
    init.create_vcpus(headers.entry())?;
    init.finish()
}

/// Reads the kernel's headers and checks them against the file and the guest's memory.
fn read_kernel_headers(spec: &VmSpec, kernel: &File) -> Result<KernelImage, MonitorError> {
    let low_end = GuestAddress(spec.memory_bytes().min(layout::DEVICE_HOLE.0));
    KernelImage::read_headers(kernel, layout::HIGH_START, low_end).map_err(kernel_error(spec))
}

fn kernel_error(spec: &VmSpec) -> impl FnOnce(KernelError) -> MonitorError {
    |source| MonitorError::Kernel { path: spec.kernel.clone(), source }
}

impl VmInit {
    /// Maps the kernel into RAM. Its pages are not copied, unless the memory is private: they stay
    /// the host's page cache.
    fn load_kernel(&self, kernel: &File, headers: &KernelImage) -> Result<(), MonitorError> {
        let sharing = self.spec.file_sharing();
        let mapped = headers.map_segments(kernel, &self.memory.ram, sharing);
        mapped.map_err(kernel_error(&self.spec))
    }

    /// Writes the descriptor table and the page tables that the kernel starts with.
    fn write_page_tables(&self) -> Result<(), MonitorError> {
        registers::write_page_tables(&self.memory.ram).map_err(MonitorError::Tables)
    }

    /// Writes the command line, the MP table, the entropy seed and `struct boot_params`.
    fn write_boot_parameters(&self) -> Result<(), MonitorError> {
        let virtio_devices: Vec<_> = self.devices.slots.iter().map(|slot| slot.info).collect();
        let cmdline = cmdline::build_command_line(&virtio_devices, self.spec.console)
            .map_err(MonitorError::CommandLine)?;
        let (ram_bytes, vcpus) = (self.spec.memory_bytes(), self.spec.vcpus);
        Ok(boot::write_boot_parameters(&self.memory.ram, ram_bytes, vcpus, &cmdline)?)
    }

    /// Creates the vCPUs. The first starts at `entry`, the others when the kernel starts them.
    fn create_vcpus(&mut self, entry: GuestAddress) -> Result<(), MonitorError> {
        for index in 0..self.spec.vcpus {
            let fd = self.vm.create_boot_vcpu(index, self.spec.vcpus, entry)?;
            self.vcpus.push(Vcpu { index, fd, time: None });
        }
        Ok(())
    }
}
