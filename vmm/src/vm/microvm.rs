//! A microVM whose guest has not been entered yet, or has ended.

use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::Arc;

use kvm_ioctls::Kvm;
use vm_memory::MmapRegion;

use super::device_requests::DeviceRequests;
use super::devices::VirtioSlot;
use super::error::MonitorError;
use super::vcpu::{Vcpu, VcpuContext};
use crate::HostError;
use crate::arch::x86_64::layout;
use crate::kvm::Vm;
use crate::memory::GuestRam;
use crate::ramoops;
use crate::spec::VmSpec;
use crate::virtio::GuestFault;
use crate::virtio::vsock::ChannelSlot;

/// A complete microVM. [`boot`](super::boot) and [`restore`](super::restore) make one.
pub(super) struct MicroVm {
    // Dropped in this order: vCPUs and VM before the memory they use.
    /// The vCPUs, until their threads take them.
    pub vcpus: Vec<Vcpu>,
    pub context: Arc<VcpuContext>,
    /// The virtio devices, in the order of their addresses.
    pub devices: Vec<VirtioSlot>,
    /// The place of the channel, which a prepared guest gets later.
    pub channel: ChannelSlot,
    pub requests: Rc<DeviceRequests>,
    /// KVM, to make a template with. `None` for a guest that is not to become one.
    pub kvm: Option<Kvm>,
    pub vm: Vm,
    pub memory: MappedMemory,
    pub spec: VmSpec,
}

/// Mappings that KVM gives to the guest. They outlive everything that can run it.
pub(super) struct MappedMemory {
    pub ram: Arc<GuestRam>,
    pub image: MmapRegion<()>,
}

impl MicroVm {
    /// Joins the guest's connection to a byte stream of the host.
    pub fn attach_channel(&self, channel: UnixStream) -> Result<(), MonitorError> {
        channel
            .set_nonblocking(true)
            .map_err(HostError::during("make the channel non-blocking"))?;
        self.channel.set(Arc::new(channel)).map_err(|_| MonitorError::Untimely {
            request: "go",
            reason: "the guest has a channel already",
        })
    }

    /// Reads the tail of the guest kernel's messages.
    pub fn read_log(&self) -> String {
        ramoops::read_log(&self.memory.ram, layout::LOG, layout::LOG_BYTES)
    }

    /// Returns the number of device rules that the guest broke, and the first of them.
    pub fn device_faults(&self) -> (u64, Option<GuestFault>) {
        let faults = || self.devices.iter().map(|device| &device.shared.faults);
        let first = faults().find_map(|faults| faults.first());
        (faults().map(|faults| faults.total()).sum(), first)
    }

    /// Releases the VM, then its memory. If a vCPU is stuck in the host kernel it still uses the
    /// memory, which is then leaked: otherwise the guest would reach whatever is mapped there next.
    pub fn release(self, vcpu_stuck: bool) {
        let Self { vm, memory, .. } = self;
        drop(vm);
        if vcpu_stuck {
            std::mem::forget(memory);
        }
    }
}
