//! The threads of a guest's vCPUs.
//!
//! ```text
//!   start ──▶ filter ──▶ KVM worker ──▶ StartBarrier ──▶ guest ──▶ stop ──▶ Vcpu, to be saved
//! ```

use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vmm_sys_util::signal::{Killable, SIGRTMIN};

use super::end::End;
use super::start_barrier::StartBarrier;
use super::vcpu::{Vcpu, VcpuContext, VcpuRequest};
use crate::control::EndReason;
use crate::seccomp::Filters;
use crate::seccomp::rules::ThreadRole;

/// The interval between two kicks of a vCPU that is to stop.
const KICK_INTERVAL: Duration = Duration::from_micros(100);

/// The most time a vCPU may take to leave the guest. It is in the kernel for as long as one exit
/// takes; past this, something is wrong with the host, and the caller should not wait with it.
const KICK_LIMIT: Duration = Duration::from_secs(5);

/// The stack of a vCPU's thread, which decodes exits and calls a device. The default is 2 MiB, of
/// address space only.
const STACK_BYTES: usize = 256 * 1024;

/// The threads of all vCPUs of one guest.
pub struct VcpuThreads {
    context: Arc<VcpuContext>,
    barrier: Arc<StartBarrier>,
    handles: Vec<JoinHandle<Vcpu>>,
}

impl VcpuThreads {
    /// Creates a set without threads.
    pub fn new(context: Arc<VcpuContext>) -> Self {
        Self { context, barrier: Arc::default(), handles: Vec::new() }
    }

    /// Returns the number of threads.
    pub fn len(&self) -> usize {
        self.handles.len()
    }

    /// Starts the thread of a vCPU. It installs its filter and waits for
    /// [`enter_guest`](Self::enter_guest).
    ///
    /// # Errors
    /// The host refuses a thread.
    pub fn start(&mut self, mut vcpu: Vcpu, filters: Option<Filters>) -> io::Result<()> {
        let (context, barrier) = (Arc::clone(&self.context), Arc::clone(&self.barrier));
        let builder =
            thread::Builder::new().name(format!("vcpu{}", vcpu.index)).stack_size(STACK_BYTES);
        self.handles.push(builder.spawn(move || {
            let filtered =
                filters.map_or(Ok(()), |filters| filters.install_filter(ThreadRole::Vcpu));
            vcpu.start_kvm_worker();
            barrier.wait();
            let end = match filtered {
                Ok(()) => vcpu.run(&context),
                Err(error) => End::with_detail(
                    EndReason::Kvm,
                    format!("filter the system calls of a vCPU: {error}"),
                ),
            };
            context.events.record_end(end);
            vcpu
        })?);
        Ok(())
    }

    /// Waits until no thread can run the guest without its filter. A single vCPU needs no wait: it
    /// enters no guest before its filter is installed. Of several, each must have its own.
    pub fn wait_until_filtered(&self) {
        if self.handles.len() > 1 {
            self.barrier.await_arrivals(self.handles.len());
        }
    }

    /// Lets all threads enter the guest.
    pub fn enter_guest(&self) {
        self.barrier.open();
    }

    /// Gets all vCPUs out of the guest and joins their threads. Returns `None` if a vCPU does not
    /// come back; its thread is then left running.
    pub fn stop(&mut self, request: VcpuRequest) -> Option<Vec<Vcpu>> {
        self.context.set_request(request);
        self.barrier.open();
        let handles = std::mem::take(&mut self.handles);
        let deadline = Instant::now() + KICK_LIMIT;
        // The first kick is sent at once; a thread that is outside the guest sees the request.
        while handles.iter().any(|handle| !handle.is_finished()) {
            if Instant::now() > deadline {
                return None;
            }
            for handle in handles.iter().filter(|handle| !handle.is_finished()) {
                // A thread that ends meanwhile cannot be signalled, and need not be.
                let _ = handle.kill(SIGRTMIN());
            }
            thread::sleep(KICK_INTERVAL);
        }
        handles.into_iter().map(|handle| handle.join().ok()).collect()
    }
}
