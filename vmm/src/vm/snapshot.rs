//! Makes a template of a guest whose vCPUs stand still.

use std::fs::File;

use super::end::End;
use super::error::MonitorError;
use super::event_loop::EventLoop;
use super::microvm::MicroVm;
use super::restore::{Recording, Restored};
use super::vcpu::Vcpu;
use crate::control::{Command, EndReason, Event};
use crate::kvm::vm_state::SavedVm;
use crate::memory::memory_file::write_memory;
use crate::memory::page_run::{PageRun, WorkingSet};
use crate::memory::working_set::collapse_read_pages;
use crate::state::machine::DeviceState;
use crate::state::{Header, Key, MachineState, sign_state, write_state_file};
use crate::virtio::NotQuiescent;

/// A guest whose vCPUs have left it permanently, and everything that belongs to its state.
pub(super) struct Snapshotter<'a> {
    microvm: &'a MicroVm,
    restored: Option<&'a Restored>,
    vcpus: &'a [Vcpu],
    event_loop: &'a mut EventLoop,
}

impl<'a> Snapshotter<'a> {
    /// Borrows everything that is saved.
    pub fn new(
        microvm: &'a MicroVm,
        restored: Option<&'a Restored>,
        vcpus: &'a [Vcpu],
        event_loop: &'a mut EventLoop,
    ) -> Self {
        Self { microvm, restored, vcpus, event_loop }
    }

    /// Handles a request of the host, which has ended the guest.
    pub fn handle(self, command: Command) -> Result<Event, MonitorError> {
        match command {
            Command::Go(_) => Err(MonitorError::Untimely {
                request: command.name(),
                reason: "the guest runs already",
            }),
            Command::Snapshot { binding, memory, mut state, key } => {
                self.save_guest(binding, &memory, &mut state, &key)
            }
            Command::Record { mut state, key } => self.write_recording(&mut state, &key),
        }
    }

    /// Saves the guest: devices first, because they may raise interrupts, then the state that KVM
    /// holds, then memory.
    fn save_guest(
        mut self,
        binding: String,
        memory: &File,
        state: &mut File,
        key: &Key,
    ) -> Result<Event, MonitorError> {
        let kvm = self.microvm.kvm.as_ref().ok_or(MonitorError::Untimely {
            request: "snapshot",
            reason: "the guest is not to become a template",
        })?;
        let end = self.microvm.context.events.end();
        if end.is_some_and(|End { reason, .. }| *reason != EndReason::Stopped) {
            return Err(NotQuiescent::GuestEnded.into());
        }
        let devices = self.save_devices()?;
        let fds = self.vcpus.iter().map(|vcpu| &vcpu.fd);
        let SavedVm { clock_ns, chips, vcpus } = self.microvm.vm.save(kvm, fds)?;
        let (parts, memory_bytes) = write_memory(&self.microvm.memory.ram, memory)?;
        let working_set = WorkingSet::default();
        let machine = MachineState { binding, clock_ns, chips, vcpus, devices, parts, working_set };
        let state_bytes = self.write_state(&machine, state, key)?;
        Ok(Event::Saved { memory_bytes, state_bytes })
    }

    /// Saves the devices, after they have processed the last notifications of the guest.
    fn save_devices(&mut self) -> Result<Vec<DeviceState>, NotQuiescent> {
        self.event_loop.process_queues();
        let devices = self.microvm.devices.iter().enumerate();
        devices
            .map(|(index, device)| device.lock_transport().save(self.event_loop.handler(index)))
            .collect()
    }

    /// Writes the state that the guest was restored from again, with the pages it has used since.
    fn write_recording(&self, file: &mut File, key: &Key) -> Result<Event, MonitorError> {
        let Some(Restored { state, recording: Some(recording) }) = self.restored else {
            return Err(MonitorError::Untimely {
                request: "record",
                reason: "the guest is not being recorded",
            });
        };
        let Recording { recorder, memory } = recording;
        let mapped = &self.microvm.memory;
        let mut working_set = recorder.collect_pages(&mapped.ram, &mapped.image)?;
        let count = |runs: &[PageRun]| runs.iter().map(|run| run.count).sum();
        let WorkingSet { written, read, image } = &working_set;
        let event =
            Event::Recorded { written: count(written), read: count(read), image: count(image) };
        collapse_read_pages(memory, &mut working_set, self.microvm.spec.memory_bytes());
        let machine = MachineState { working_set, ..state.clone() };
        self.write_state(&machine, file, key)?;
        Ok(event)
    }

    /// Writes a state file. Returns its length.
    fn write_state(
        &self,
        machine: &MachineState,
        file: &mut File,
        key: &Key,
    ) -> Result<u64, MonitorError> {
        let spec = &self.microvm.spec;
        let header = Header {
            processor: self.microvm.vm.processor(spec.vcpus),
            memory_mib: spec.memory_mib,
            vcpus: spec.vcpus,
        };
        let sealed = sign_state(&header, &machine.encode(), key)?;
        write_state_file(file, &sealed)?;
        Ok(sealed.len() as u64)
    }
}
