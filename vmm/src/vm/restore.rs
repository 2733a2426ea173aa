//! The restore recipe: from the files of a template to vCPUs in their saved state.
//!
//! Devices and the clock are restored later, by [`run`](super::run), just before the guest
//! continues.

use std::fs::File;

use kvm_ioctls::Kvm;
use vm_memory::{GuestAddress, GuestMemoryRegion};

use super::error::MonitorError;
use super::init::{VmInit, map_root_image};
use super::microvm::MicroVm;
use super::vcpu::Vcpu;
use crate::control::TemplateFiles;
use crate::kvm::KvmError;
use crate::kvm::vm_state::prefault_memory;
use crate::memory::memory_file::{check_memory_file, map_parts};
use crate::memory::page_run::{PageRun, WorkingSet};
use crate::memory::recorder::Recorder;
use crate::memory::working_set::{for_each_run, populate_written};
use crate::memory::{FileSharing, PAGE_BYTES};
use crate::spec::VmSpec;
use crate::state::processor::Processor;
use crate::state::vcpu::Timekeeping;
use crate::state::{MachineState, StateError, read_state_file, verify_state};

/// The saved state of a restored guest.
pub(super) struct Restored {
    pub state: MachineState,
    /// The recording of the pages it uses, if the specification requests one.
    pub recording: Option<Recording>,
}

/// A recording of the pages that a restored guest uses.
pub(super) struct Recording {
    pub recorder: Recorder,
    /// The memory file that the guest was restored from.
    pub memory: File,
}

/// Makes a microVM in the state of a template.
pub(super) fn restore(
    spec: VmSpec,
    files: TemplateFiles,
    image: File,
    mut recorder: Option<Recorder>,
    kvm: Result<Kvm, KvmError>,
) -> Result<(MicroVm, Restored), MonitorError> {
    // An error in the files is reported before one of KVM.
    let image = map_root_image(&spec, image)?;
    let template = Template::verify(&spec, files, image.size() as u64)?;

    let mut init = VmInit::new(spec, kvm?, image)?;
    init.check_processor(&template)?;
    match &mut recorder {
        Some(recorder) => init.map_memory_to_record(&template, recorder)?,
        None => init.map_memory(&template)?,
    }
    init.add_interrupt_controllers()?;
    init.add_memory()?;
    init.add_vsock()?;
    init.add_root_image()?;
    init.restore_vcpus(&template.state)?;
    init.restore_interrupt_controllers(&template.state)?;
    if recorder.is_none() {
        init.prefault_working_set(&template.state.working_set);
    }
    let Template { memory, state, .. } = template;
    let recording = recorder.map(|recorder| Recording { recorder, memory });
    Ok((init.finish()?, Restored { state: *state, recording }))
}

/// A template whose state was verified.
struct Template {
    memory: File,
    /// The processor that the template was made on.
    processor: Processor,
    state: Box<MachineState>,
}

impl Template {
    /// Verifies a template and compares it with the specification. The key is wiped when this
    /// returns.
    fn verify(spec: &VmSpec, files: TemplateFiles, image_bytes: u64) -> Result<Self, MonitorError> {
        let TemplateFiles { memory, state, key } = files;
        let bytes = read_state_file(&state)?;
        let (header, payload) = verify_state(&bytes, &key)?;
        if header.memory_mib != spec.memory_mib {
            let (made_mib, requested_mib) = (header.memory_mib, spec.memory_mib);
            return Err(StateError::MemorySize { made_mib, requested_mib }.into());
        }
        if header.vcpus != spec.vcpus {
            let (made, requested) = (header.vcpus, spec.vcpus);
            return Err(StateError::VcpuCount { made, requested }.into());
        }
        let state = MachineState::decode(payload, spec.vcpus, spec.memory_bytes(), image_bytes)
            .map_err(StateError::from)?;
        if state.binding != spec.binding {
            let (made, requested) = (state.binding, spec.binding.clone());
            return Err(StateError::Binding { made, requested }.into());
        }
        check_memory_file(&memory, spec.memory_bytes())?;
        Ok(Self { memory, processor: header.processor, state: Box::new(state) })
    }
}

impl VmInit {
    /// Checks that the guest sees the processor that the template was made on.
    fn check_processor(&self, template: &Template) -> Result<(), MonitorError> {
        let (made, here) = (template.processor, self.vm.processor(self.spec.vcpus));
        if made == here { Ok(()) } else { Err(StateError::Processor { made, here }.into()) }
    }

    /// Maps or copies the memory file, and copies the pages that the guest is going to write to.
    fn map_memory(&self, template: &Template) -> Result<(), MonitorError> {
        let MachineState { parts, working_set, .. } = &*template.state;
        map_parts(&self.memory.ram, &template.memory, parts, self.spec.file_sharing())?;
        populate_written(&self.memory.ram, &working_set.written);
        Ok(())
    }

    /// Maps the memory file and the root image page by page, so that the pages in use can be told
    /// apart.
    fn map_memory_to_record(
        &self,
        template: &Template,
        recorder: &mut Recorder,
    ) -> Result<(), MonitorError> {
        let parts = &template.state.parts;
        if recorder.can_split(parts) {
            recorder.map_split_parts(&self.memory.ram, &template.memory, parts)?;
        } else {
            map_parts(&self.memory.ram, &template.memory, parts, FileSharing::Shared)?;
        }
        Ok(recorder.split_image(&self.memory.image)?)
    }

    /// Creates the vCPUs in their saved state. They continue with the time stamp counter of the
    /// first, which was read when all of them stood still.
    fn restore_vcpus(&mut self, state: &MachineState) -> Result<(), MonitorError> {
        let tsc = state.vcpus.first().map_or(0, |vcpu| vcpu.time.tsc);
        for (index, saved) in (0..self.spec.vcpus).zip(&state.vcpus) {
            let fd = self.vm.restore_vcpu(index, self.spec.vcpus, saved)?;
            let time = Timekeeping { tsc, ..saved.time };
            self.vcpus.push(Vcpu { index, fd, time: Some(time) });
        }
        Ok(())
    }

    /// Restores the interrupt controllers.
    fn restore_interrupt_controllers(&self, state: &MachineState) -> Result<(), MonitorError> {
        Ok(self.vm.restore_chips(&state.chips)?)
    }

    /// Maps the pages that the guest uses first, all at once, as far as KVM can.
    fn prefault_working_set(&self, set: &WorkingSet) {
        let Some(Vcpu { fd, .. }) = self.vcpus.first() else { return };
        let mut supported = true;
        let mut prefault = |address, bytes| {
            supported = supported && prefault_memory(fd, address, bytes);
        };
        for runs in [&set.written, &set.read] {
            for_each_run(&self.memory.ram, runs, |region, start, bytes| {
                prefault(GuestAddress(region.start_addr().0 + start.0), bytes);
            });
        }
        for PageRun { first, count } in &set.image {
            let address = GuestAddress(self.image_address.0 + u64::from(*first) * PAGE_BYTES);
            prefault(address, u64::from(*count) * PAGE_BYTES);
        }
    }
}
