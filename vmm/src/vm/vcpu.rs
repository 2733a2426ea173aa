//! One vCPU: runs the guest, and serves the exits that need a device.

use std::ops::ControlFlow::{self, Break, Continue};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use chitin_text::error_chain;
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::end::End;
use super::kick::run_kickable;
use super::vcpu_events::VcpuEvents;
use crate::bus::Buses;
use crate::control::EndReason;
use crate::kvm::vcpu_state::resume_time;
use crate::state::vcpu::Timekeeping;

/// The most MMIO fragments of one instruction that are completed for a vCPU that is to be quiesced:
/// KVM splits an access that crosses a page, and no other.
const MAX_MMIO_FRAGMENTS: usize = 16;

/// A request to all vCPUs of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum VcpuRequest {
    /// Run the guest.
    Run = 0,
    /// Leave the guest at once.
    Stop = 1,
    /// Leave the guest in a state that can be saved: not within an instruction that a device has
    /// answered while KVM has not taken the answer yet.
    Quiesce = 2,
}

impl VcpuRequest {
    const fn from_u8(value: u8) -> Option<Self> {
        match value {
            0 => Some(Self::Run),
            1 => Some(Self::Stop),
            2 => Some(Self::Quiesce),
            _ => None,
        }
    }
}

/// The state that all vCPUs of a guest share.
pub struct VcpuContext {
    /// The devices that vCPUs reach.
    pub buses: Buses,
    /// The events that vCPUs report.
    pub events: VcpuEvents,
    /// A [`VcpuRequest`].
    request: AtomicU8,
}

impl VcpuContext {
    /// Creates the context of vCPUs that are to run the guest.
    pub fn new(buses: Buses, events: VcpuEvents) -> Arc<Self> {
        Arc::new(Self { buses, events, request: AtomicU8::new(VcpuRequest::Run as u8) })
    }

    /// Sets the request, which each vCPU looks at before it enters the guest again.
    pub fn set_request(&self, request: VcpuRequest) {
        self.request.store(request as u8, Ordering::Release);
    }
}

/// A vCPU that does not run: before its thread starts, or after it was stopped.
pub struct Vcpu {
    /// Its index; vCPU 0 starts the others.
    pub index: u8,
    /// KVM's vCPU.
    pub fd: VcpuFd,
    /// The time at which a restored vCPU continues. Taken when it runs.
    pub time: Option<Timekeeping>,
}

impl Vcpu {
    /// Makes KVM start its worker thread (Linux 6.13), which it does at the first `KVM_RUN` at the
    /// latest. The call returns at once with `EINTR`; any other error shows again when the guest is
    /// entered.
    pub fn start_kvm_worker(&mut self) {
        self.fd.set_kvm_immediate_exit(1);
        let _ = self.fd.run();
        self.fd.set_kvm_immediate_exit(0);
    }

    /// Runs the guest until it ends, or the context requests something else.
    pub fn run(&mut self, context: &VcpuContext) -> End {
        if let Some(time) = self.time.take()
            && let Err(error) = resume_time(&self.fd, time)
        {
            return End::with_detail(EndReason::Kvm, error_chain(&error));
        }
        if self.index == 0 {
            context.events.record_entry();
        }
        run_kickable(&mut self.fd, |fd| run_guest(fd, self.index, context))
    }
}

/// Enters the guest again and again, until it ends or a request ends it.
fn run_guest(fd: &mut VcpuFd, index: u8, context: &VcpuContext) -> End {
    loop {
        match VcpuRequest::from_u8(context.request.load(Ordering::Acquire)) {
            Some(VcpuRequest::Run) => {
                if let Break(end) = run_until_exit(fd, index, &context.buses) {
                    return end;
                }
            }
            Some(VcpuRequest::Stop) => return End::new(EndReason::Stopped),
            Some(VcpuRequest::Quiesce) => return complete_pending_io(fd, index, &context.buses),
            None => return End::with_detail(EndReason::Kvm, "invalid vCPU request".into()),
        }
    }
}

/// Completes the instruction that waits for a device: with `immediate_exit` set, KVM takes the
/// device's answer and does not enter the guest.
fn complete_pending_io(fd: &mut VcpuFd, index: u8, buses: &Buses) -> End {
    for _ in 0..MAX_MMIO_FRAGMENTS {
        fd.set_kvm_immediate_exit(1);
        if let Break(end) = run_until_exit(fd, index, buses) {
            return end;
        }
        // `run_until_exit` resets the flag when KVM has obeyed it. If it is still set, the
        // instruction had another fragment.
        if fd.get_kvm_run().immediate_exit == 0 {
            return End::new(EndReason::Stopped);
        }
    }
    End::with_detail(EndReason::Kvm, format!("vCPU {index} cannot be quiesced"))
}

/// Enters the guest once and serves its exit.
fn run_until_exit(fd: &mut VcpuFd, index: u8, buses: &Buses) -> ControlFlow<End> {
    let Buses { mmio, ports } = buses;
    let failed = |why: String| Break(End::with_detail(EndReason::Kvm, why));
    match fd.run() {
        Ok(VcpuExit::MmioRead(address, data)) => mmio.read(address, data),
        Ok(VcpuExit::MmioWrite(address, data)) => mmio.write(address, data),
        Ok(VcpuExit::IoIn(port, data)) => ports.read(port.into(), data),
        Ok(VcpuExit::IoOut(port, data)) => ports.write(port.into(), data),
        Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) => {}
        Ok(VcpuExit::Shutdown) => return Break(End::new(EndReason::Reset)),
        Ok(VcpuExit::SystemEvent(kind, _)) => {
            let detail = format!("system event {kind}");
            return Break(End::with_detail(EndReason::Reset, detail));
        }
        Ok(VcpuExit::FailEntry(reason, _)) => {
            return failed(format!("the processor refused the guest's state: {reason:#x}"));
        }
        Ok(VcpuExit::InternalError) => {
            return failed("KVM failed to emulate an instruction: see `chitin doctor`".into());
        }
        Ok(exit) => return failed(format!("unexpected exit {exit:?}")),
        // The flag is reset: a kick without a request must not keep the vCPU out of the guest.
        Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
            fd.set_kvm_immediate_exit(0)
        }
        Err(error) => return failed(format!("run vCPU {index}: {error}")),
    }
    Continue(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vcpu_request_survives_its_atomic() {
        for request in [VcpuRequest::Run, VcpuRequest::Stop, VcpuRequest::Quiesce] {
            assert_eq!(VcpuRequest::from_u8(request as u8), Some(request));
        }
        assert_eq!(VcpuRequest::from_u8(3), None);
    }
}
