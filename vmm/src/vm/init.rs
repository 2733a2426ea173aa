//! A microVM under construction: the steps that [`boot`](super::boot) and
//! [`restore`](super::restore) have in common.

use std::fs::File;
use std::sync::Arc;

use kvm_ioctls::Kvm;
use vm_memory::{GuestAddress, MmapRegion};

use super::devices::Devices;
use super::error::MonitorError;
use super::microvm::{MappedMemory, MicroVm};
use super::vcpu::{Vcpu, VcpuContext};
use super::vcpu_events::VcpuEvents;
use crate::arch::x86_64::layout;
use crate::image;
use crate::kvm::Vm;
use crate::memory;
use crate::spec::VmSpec;
use crate::virtio::pmem::Pmem;
use crate::virtio::vsock::{ChannelSlot, Vsock};

/// A microVM under construction.
pub(super) struct VmInit {
    // Dropped in this order: vCPUs and VM before the memory they use.
    pub vcpus: Vec<Vcpu>,
    pub devices: Devices,
    pub channel: ChannelSlot,
    pub kvm: Kvm,
    pub vm: Vm,
    pub memory: MappedMemory,
    pub image_address: GuestAddress,
    pub spec: VmSpec,
}

impl VmInit {
    /// Creates a VM without vCPUs and devices, and RAM that holds nothing.
    pub fn new(spec: VmSpec, kvm: Kvm, image: MmapRegion<()>) -> Result<Self, MonitorError> {
        let ram = Arc::new(memory::create_ram(&layout::ram_ranges(spec.memory_bytes()))?);
        let vm = Vm::new(&kvm)?;
        vm.disable_counters();
        Ok(Self {
            vcpus: Vec::new(),
            devices: Devices::new()?,
            channel: ChannelSlot::default(),
            vm,
            kvm,
            memory: MappedMemory { ram, image },
            image_address: layout::image_address(spec.memory_bytes()),
            spec,
        })
    }

    /// Adds the interrupt controllers that KVM emulates.
    pub fn add_interrupt_controllers(&self) -> Result<(), MonitorError> {
        Ok(self.vm.add_interrupt_controllers()?)
    }

    /// Gives the VM its RAM, and the root image as read-only memory.
    pub fn add_memory(&mut self) -> Result<(), MonitorError> {
        self.vm.add_ram(&self.memory.ram)?;
        Ok(self.vm.add_read_only_memory(self.image_address, &self.memory.image)?)
    }

    /// Adds the device of the guest's one connection.
    pub fn add_vsock(&mut self) -> Result<(), MonitorError> {
        let vsock = Vsock::new(Arc::clone(&self.channel), self.spec.template);
        self.devices.add_virtio(Box::new(vsock), &self.vm, &self.memory.ram)
    }

    /// Adds the device of the root image.
    pub fn add_root_image(&mut self) -> Result<(), MonitorError> {
        let pmem = Pmem::new(self.image_address, self.memory.image.size() as u64);
        self.devices.add_virtio(Box::new(pmem), &self.vm, &self.memory.ram)
    }

    /// Adds the serial console, if the specification has one.
    pub fn add_console(&mut self) -> Result<(), MonitorError> {
        if self.spec.console { self.devices.add_console(&self.vm) } else { Ok(()) }
    }

    /// Returns the complete microVM.
    pub fn finish(self) -> Result<MicroVm, MonitorError> {
        let Devices { buses, slots, requests } = self.devices;
        let events = VcpuEvents::new(!self.spec.restore)?;
        Ok(MicroVm {
            vcpus: self.vcpus,
            context: VcpuContext::new(buses, events),
            devices: slots,
            channel: self.channel,
            requests,
            kvm: self.spec.template.then_some(self.kvm),
            vm: self.vm,
            memory: self.memory,
            spec: self.spec,
        })
    }
}

/// Checks the root image and maps it.
pub(super) fn map_root_image(spec: &VmSpec, file: File) -> Result<MmapRegion<()>, MonitorError> {
    image::map_image(&Arc::new(file), spec.file_sharing())
        .map_err(|source| MonitorError::Image { path: spec.root_image.clone(), source })
}
