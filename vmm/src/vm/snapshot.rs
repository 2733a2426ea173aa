//! Making a template out of a guest: what is asked for when its vCPUs stand still.

use std::fs::File;
use std::sync::PoisonError;

use super::builder::{Memory, Transport};
use super::event_loop::Desk;
use super::vcpu::Vcpu;
use super::{MonitorError, Notice, Restored};
use crate::control::{Command, EndReason, TemplateEvent};
use crate::kvm::{Vm, save};
use crate::memory::{file, working_set};
use crate::spec::VmSpec;
use crate::state::machine::{DeviceState, PageRun, WorkingSet};
use crate::state::{self, Header, Key, MachineState, StateError};
use crate::virtio::NotQuiescent;

/// A guest whose vCPUs have left it for good.
pub(super) struct Subject<'a> {
    pub spec: &'a VmSpec,
    pub kvm: Option<&'a kvm_ioctls::Kvm>,
    pub vm: &'a Vm,
    pub memory: &'a Memory,
    pub transports: &'a [Transport],
    pub restored: Option<&'a Restored>,
    pub notice: &'a Notice,
}

impl Subject<'_> {
    /// Does what the host asks for.
    pub fn obey(
        &self,
        command: Command,
        vcpus: &[Vcpu],
        desk: &mut Desk<'_>,
    ) -> Result<TemplateEvent, MonitorError> {
        match command {
            Command::Go(_) => {
                Err(MonitorError::Untimely { request: "go", when: "a guest that runs" })
            }
            Command::Snapshot { binding, memory, state, key } => {
                self.save(binding, &memory, state, &key, vcpus, desk)
            }
            Command::Record { state, key } => self.record(state, &key),
        }
    }

    /// Writes the state that the guest was restored from once more, with what it has used since.
    fn record(&self, mut file: File, key: &Key) -> Result<TemplateEvent, MonitorError> {
        let Some(Restored { state, recording: Some((recorder, memory)) }) = self.restored else {
            return Err(MonitorError::Untimely {
                request: "record",
                when: "a guest that is not being recorded",
            });
        };
        let mut working_set = recorder.collect(&self.memory.ram, &self.memory.image)?;
        let count = |runs: &[PageRun]| runs.iter().map(|run| run.count).sum();
        let WorkingSet { written, read, image } = &working_set;
        let event = TemplateEvent::Recorded {
            written: count(written),
            read: count(read),
            image: count(image),
        };
        working_set::gather(memory, &mut working_set, self.spec.memory_bytes());
        let machine = MachineState { working_set, ..state.clone() };
        self.write(&machine, &mut file, key)?;
        Ok(event)
    }

    /// Writes a state file. Returns its length.
    fn write(
        &self,
        machine: &MachineState,
        file: &mut File,
        key: &Key,
    ) -> Result<u64, MonitorError> {
        let header = Header {
            processor: self.vm.processor(self.spec.vcpus),
            memory_mib: self.spec.memory_mib,
            vcpus: self.spec.vcpus,
        };
        let sealed = state::seal(&header, &machine.encode(), key)?;
        state::write(file, &sealed)?;
        Ok(sealed.len() as u64)
    }

    /// Saves the guest: devices first, because they may raise interrupts, then what KVM holds, then memory.
    fn save(
        &self,
        binding: String,
        memory: &File,
        mut state: File,
        key: &Key,
        vcpus: &[Vcpu],
        desk: &mut Desk<'_>,
    ) -> Result<TemplateEvent, MonitorError> {
        let kvm = self.kvm.ok_or(MonitorError::Untimely {
            request: "snapshot",
            when: "a guest that is to be no template",
        })?;
        if self.notice.end.get().is_some_and(|end| end.reason != EndReason::Stopped) {
            return Err(NotQuiescent("the guest has ended").into());
        }
        // What it has notified us of and we have not looked at yet.
        desk.serve_all();
        let devices = self
            .transports
            .iter()
            .enumerate()
            .map(|(device, transport)| {
                let transport = transport.lock().unwrap_or_else(PoisonError::into_inner);
                transport.save(desk.handler(device))
            })
            .collect::<Result<Vec<DeviceState>, _>>()?;
        let (vcpus, save::Shared { clock_ns, chips }) =
            self.vm.save(kvm, vcpus.iter().map(|vcpu| &vcpu.fd))?;
        let failed = |source| StateError::File { operation: "write the memory of", source };
        let (parts, memory_bytes) = file::write(&self.memory.ram, memory).map_err(failed)?;
        let machine = MachineState {
            binding,
            clock_ns,
            chips,
            vcpus,
            devices,
            parts,
            working_set: WorkingSet::default(),
        };
        let state_bytes = self.write(&machine, &mut state, key)?;
        Ok(TemplateEvent::Saved { memory_bytes, state_bytes })
    }
}
