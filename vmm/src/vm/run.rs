//! The run of a guest, from the start of its vCPU threads to its end.
//!
//! ```text
//!  start_vcpus ─▶ install_filters ─▶ restore_devices ─▶ enter_guest ─▶ stop_vcpus ─▶ finish
//!                   └─ if prepared: wait_for_channel     event loop       └─ handle_exit
//! ```
//!
//! A guest that is not prepared gets its devices before the filters: without filters, that needs
//! no rule.

use super::end::{End, Ended};
use super::error::MonitorError;
use super::event_loop::{EventLoop, HostInterface, LoopExit};
use super::microvm::MicroVm;
use super::restore::Restored;
use super::snapshot::Snapshotter;
use super::vcpu::{Vcpu, VcpuRequest};
use super::vcpu_threads::VcpuThreads;
use crate::HostError;
use crate::control::{Command, EndReason, Event};
use crate::seccomp::rules::ThreadRole;
use crate::seccomp::{self, Filters};
use crate::state::StateError;

/// A run in progress.
pub(super) struct Run {
    event_loop: EventLoop,
    threads: VcpuThreads,
    /// The filters of the threads' system calls, if they are to be filtered.
    filters: Option<Filters>,
    restored: Option<Restored>,
    microvm: MicroVm,
}

impl Run {
    /// Gets ready to run a guest.
    pub fn new(
        microvm: MicroVm,
        restored: Option<Restored>,
        host: HostInterface,
        filters: bool,
    ) -> Result<Self, MonitorError> {
        let shared = microvm.devices.iter().map(|device| device.shared.clone()).collect();
        let (requests, context) = (microvm.requests.clone(), microvm.context.clone());
        Ok(Self {
            event_loop: EventLoop::new(host, shared, requests, context.clone())?,
            threads: VcpuThreads::new(context),
            filters: filters.then(|| Filters::for_spec(&microvm.spec)),
            restored,
            microvm,
        })
    }

    /// Runs the guest to its end.
    pub fn run_to_end(mut self) -> Result<Ended, MonitorError> {
        let exit = self.serve_guest();
        let vcpus = self.stop_vcpus(&exit);
        let result = exit.and_then(|exit| self.handle_exit(exit, vcpus.as_deref()));
        self.finish(result, vcpus)
    }

    /// Makes everything ready, enters the guest, and serves it until the loop is left.
    fn serve_guest(&mut self) -> Result<LoopExit, MonitorError> {
        self.start_vcpus()?;
        if self.microvm.spec.prepared {
            // Install the filters before waiting: once the channel arrives, start-up latency
            // counts.
            self.install_filters()?;
            if let Some(end) = self.wait_for_channel()? {
                return Ok(LoopExit::End(end));
            }
            self.restore_devices()?;
        } else {
            self.restore_devices()?;
            self.install_filters()?;
        }
        // From here on the guest runs, and this thread only serves it.
        self.threads.enter_guest();
        self.event_loop.run()
    }

    /// Starts the threads of all vCPUs, which wait until the guest is entered.
    fn start_vcpus(&mut self) -> Result<(), MonitorError> {
        for vcpu in std::mem::take(&mut self.microvm.vcpus) {
            self.threads
                .start(vcpu, self.filters)
                .map_err(HostError::during("start the thread of a vCPU"))?;
        }
        Ok(())
    }

    /// Filters the system calls of this thread, once no vCPU thread can run without its own filter.
    fn install_filters(&self) -> Result<(), MonitorError> {
        let Some(filters) = self.filters else { return Ok(()) };
        self.threads.wait_until_filtered();
        seccomp::limit_threads(self.threads.len() + 1)
            .map_err(HostError::during("limit the number of threads"))?;
        filters
            .install_filter(ThreadRole::Vmm)
            .map_err(HostError::during("filter system calls"))?;
        Ok(())
    }

    /// Waits for the channel of a prepared guest. Returns an end if the guest is not to run.
    fn wait_for_channel(&mut self) -> Result<Option<End>, MonitorError> {
        self.event_loop.report(Event::Prepared);
        match self.event_loop.run()? {
            LoopExit::End(end) => Ok(Some(end)),
            LoopExit::Command(Command::Go(channel)) => {
                self.microvm.attach_channel(channel)?;
                Ok(None)
            }
            LoopExit::Command(command) => Err(MonitorError::Untimely {
                request: command.name(),
                reason: "the guest has not run yet",
            }),
        }
    }

    /// Restores the devices and the clock of a restored guest. This comes last, so that the
    /// devices' first interrupts are on their way before the guest runs.
    fn restore_devices(&mut self) -> Result<(), MonitorError> {
        let Some(Restored { state, .. }) = &self.restored else { return Ok(()) };
        for (device, saved) in self.microvm.devices.iter().zip(&state.devices) {
            device.lock_transport().restore(saved).map_err(StateError::from)?;
        }
        self.event_loop.handle_requests();
        self.event_loop.process_queues();
        Ok(self.microvm.vm.set_clock(state.clock_ns)?)
    }

    /// Stops all vCPUs. Returns `None` if one is stuck.
    fn stop_vcpus(&mut self, exit: &Result<LoopExit, MonitorError>) -> Option<Vec<Vcpu>> {
        self.event_loop.close_requests();
        let save = matches!(exit, Ok(LoopExit::Command(Command::Snapshot { .. })));
        self.threads.stop(if save { VcpuRequest::Quiesce } else { VcpuRequest::Stop })
    }

    /// Delivers the last bytes of a guest that ended itself, or handles the request that ended it.
    fn handle_exit(
        &mut self,
        exit: LoopExit,
        vcpus: Option<&[Vcpu]>,
    ) -> Result<(End, Option<Event>), MonitorError> {
        match exit {
            LoopExit::End(end) => {
                if end.reason == EndReason::Reset {
                    self.event_loop.drain_queues()?;
                }
                Ok((end, None))
            }
            LoopExit::Command(command) => {
                let vcpus = vcpus.ok_or(MonitorError::Untimely {
                    request: command.name(),
                    reason: "a vCPU does not stop",
                })?;
                let restored = self.restored.as_ref();
                let snapshotter =
                    Snapshotter::new(&self.microvm, restored, vcpus, &mut self.event_loop);
                let template = snapshotter.handle(command)?;
                Ok((End::new(EndReason::Stopped), Some(template)))
            }
        }
    }

    /// Releases the microVM and returns the record of its guest.
    fn finish(
        self,
        result: Result<(End, Option<Event>), MonitorError>,
        vcpus: Option<Vec<Vcpu>>,
    ) -> Result<Ended, MonitorError> {
        let Self { event_loop, microvm, .. } = self;
        let vcpu_stuck = vcpus.is_none();
        drop((event_loop, vcpus));
        let log = microvm.read_log();
        let (faults, fault) = microvm.device_faults();
        microvm.release(vcpu_stuck);
        let (end, template) = result?;
        Ok(Ended { end, log, faults, fault, template })
    }
}
