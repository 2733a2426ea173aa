//! One vCPU: a thread that runs the guest until something ends it.
//!
//! A vCPU is told to stop by a flag, by `immediate_exit` in its `kvm_run`, and by a signal (`SIGRTMIN`) whose handler sets
//! the latter: a signal that arrives between the check of the flag and `KVM_RUN` would otherwise be lost, and the guest
//! would run on.

use std::cell::Cell;
use std::ops::ControlFlow::{self, Break, Continue};
use std::ptr;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_ioctls::{VcpuExit, VcpuFd};
use libc::{c_int, c_void, siginfo_t};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::{End, Notice};
use crate::arch::x86_64::saved::Timekeeping;
use crate::bus::Bus;
use crate::control::EndReason;
use crate::kvm::save::resume;
use crate::one_line;
use crate::seccomp::Filters;
use crate::seccomp::rules::ThreadRole;

/// How often a vCPU that was told to stop is reminded.
const KICK_INTERVAL: Duration = Duration::from_micros(100);

/// How long a vCPU may take to leave the guest. It is in the kernel for as long as one exit takes; past this, something is
/// wrong with the host, and whoever waits should not wait with it.
const KICK_LIMIT: Duration = Duration::from_secs(5);

/// The most pieces of one instruction that are finished for a vCPU that is to come to rest: KVM splits an access that
/// crosses a page, and no other.
const MAX_PIECES: usize = 16;

/// The stack of a vCPU's thread, which decodes exits and calls a device. The default is 2 MiB, of address space only.
const STACK_BYTES: usize = 256 * 1024;

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs, for the signal handler. No destructor and no lazy
    /// initialization: safe to use there.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

extern "C" fn on_kick(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    IMMEDIATE_EXIT.with(|cell| {
        let flag = cell.get();
        if !flag.is_null() {
            // SAFETY: set by this thread to a byte in its `kvm_run`, and reset before that is unmapped.
            unsafe { flag.write_volatile(1) };
        }
    });
}

/// Lets threads of this process be kicked out of a guest. The signal is `SIGRTMIN`; a program that embeds a monitor must
/// leave it alone.
///
/// # Errors
/// The handler cannot be installed.
pub fn install_kick_handler() -> std::io::Result<()> {
    register_signal_handler(SIGRTMIN(), on_kick).map_err(Into::into)
}

/// Runs `f`, during which a kick of this thread gets the vCPU out of the guest.
pub fn kickable<T>(fd: &mut VcpuFd, f: impl FnOnce(&mut VcpuFd) -> T) -> T {
    IMMEDIATE_EXIT.set(&raw mut fd.get_kvm_run().immediate_exit);
    let result = f(fd);
    IMMEDIATE_EXIT.set(ptr::null_mut());
    result
}

/// The VM's address spaces and counters, shared by its vCPUs.
#[derive(Default)]
pub struct Machine {
    /// Memory-mapped devices.
    pub mmio: Bus,
    /// Ports.
    pub ports: Bus,
    /// What the vCPUs are to do: a [`Pace`].
    pace: AtomicU8,
}

/// What vCPUs are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Pace {
    /// Run the guest.
    Run = 0,
    /// Leave it, wherever it is.
    Stop = 1,
    /// Leave it where all of its state can be read: not within an instruction that a device has answered, and whose
    /// answer KVM has not taken yet.
    Settle = 2,
}

/// Where vCPU threads wait until the guest is to run. Its lock is held for no longer than a look.
#[derive(Default)]
pub struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
struct GateState {
    open: bool,
    /// How many have come to it.
    arrived: usize,
}

impl Gate {
    /// Lets everybody through, from now on.
    pub fn open(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).open = true;
        self.changed.notify_all();
    }

    /// Waits until so many have come to it: none of them does anything more before it opens.
    pub fn await_arrivals(&self, count: usize) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.arrived < count {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn pass(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.arrived += 1;
        self.changed.notify_all();
        while !state.open {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// A vCPU that has not run yet, or runs no more.
pub struct Vcpu {
    /// Its number; 0 starts the others.
    pub index: u8,
    /// KVM's side.
    pub fd: VcpuFd,
    /// Where its time goes on, if it was restored.
    pub time: Option<Timekeeping>,
    /// What it can reach.
    pub machine: Arc<Machine>,
    /// Where its end is reported.
    pub notice: Arc<Notice>,
}

impl Vcpu {
    /// Starts its thread, which puts its filter on, waits at the gate, and then runs the guest.
    ///
    /// # Errors
    /// The host refuses a thread.
    pub fn start(
        mut self,
        gate: &Arc<Gate>,
        filters: Option<Filters>,
    ) -> std::io::Result<RunningVcpu> {
        let (machine, gate) = (Arc::clone(&self.machine), Arc::clone(gate));
        let builder =
            std::thread::Builder::new().name(format!("vcpu{}", self.index)).stack_size(STACK_BYTES);
        let thread = builder.spawn(move || {
            let filtered =
                filters.map_or(Ok(()), |filters| filters.install_filter(ThreadRole::Vcpu));
            // At its first run KVM starts a thread of its own, at the latest. It comes back at once, and says that it was
            // interrupted; whatever else is wrong is found when the guest is to run.
            self.fd.set_kvm_immediate_exit(1);
            let _ = self.fd.run();
            self.fd.set_kvm_immediate_exit(0);
            gate.pass();
            let end = match filtered {
                Ok(()) => self.run(),
                Err(error) => End::because(
                    EndReason::Kvm,
                    format!("filter the system calls of a vCPU: {error}"),
                ),
            };
            self.notice.ended(end);
            self
        })?;
        Ok(RunningVcpu { thread, machine })
    }

    fn run(&mut self) -> End {
        let Vcpu { fd, machine, notice, index, time } = self;
        if let Some(time) = time.take()
            && let Err(error) = resume(fd, time)
        {
            return End::because(EndReason::Kvm, one_line(&error));
        }
        if *index == 0 {
            notice.entered();
        }
        kickable(fd, |fd| run(fd, *index, machine))
    }
}

/// The guest: out of it, do what it asks for, back in.
fn run(fd: &mut VcpuFd, index: u8, machine: &Machine) -> End {
    loop {
        match machine.pace.load(Ordering::Acquire) {
            RUN => {
                if let Break(end) = step(fd, index, machine) {
                    return end;
                }
            }
            SETTLE => return settle(fd, index, machine),
            _ => return End::new(EndReason::Stopped),
        }
    }
}

const RUN: u8 = Pace::Run as u8;
const SETTLE: u8 = Pace::Settle as u8;

/// Has KVM finish the instruction it is in: told to exit immediately it does that, and does not enter the guest.
fn settle(fd: &mut VcpuFd, index: u8, machine: &Machine) -> End {
    for _ in 0..MAX_PIECES {
        fd.set_kvm_immediate_exit(1);
        if let Break(end) = step(fd, index, machine) {
            return end;
        }
        // Taken back when KVM has obeyed. Otherwise the instruction had another piece.
        if fd.get_kvm_run().immediate_exit == 0 {
            return End::new(EndReason::Stopped);
        }
    }
    End::because(EndReason::Kvm, format!("vCPU {index} does not come to rest"))
}

fn step(fd: &mut VcpuFd, index: u8, machine: &Machine) -> ControlFlow<End> {
    let Machine { mmio, ports, .. } = machine;
    let failed = |why: String| Break(End::because(EndReason::Kvm, why));
    match fd.run() {
        Ok(VcpuExit::MmioRead(address, data)) => mmio.read(address, data),
        Ok(VcpuExit::MmioWrite(address, data)) => mmio.write(address, data),
        Ok(VcpuExit::IoIn(port, data)) => ports.read(port.into(), data),
        Ok(VcpuExit::IoOut(port, data)) => ports.write(port.into(), data),
        Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) => {}
        Ok(VcpuExit::Shutdown) => return Break(End::new(EndReason::Reset)),
        Ok(VcpuExit::SystemEvent(kind, _)) => {
            return Break(End::because(EndReason::Reset, format!("system event {kind}")));
        }
        Ok(VcpuExit::FailEntry(reason, _)) => {
            return failed(format!("the processor refused the guest's state: {reason:#x}"));
        }
        Ok(VcpuExit::InternalError) => {
            return failed("KVM failed to emulate an instruction: see `chitin doctor`".into());
        }
        Ok(exit) => return failed(format!("unexpected exit {exit:?}")),
        // A kick that was not for us to stop must not keep the guest out for ever.
        Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
            fd.set_kvm_immediate_exit(0)
        }
        Err(error) => return failed(format!("run vCPU {index}: {error}")),
    }
    Continue(())
}

/// A vCPU in its thread.
pub struct RunningVcpu {
    thread: JoinHandle<Vcpu>,
    machine: Arc<Machine>,
}

impl RunningVcpu {
    /// Gets all vCPUs out of the guest and waits for their threads. If one does not come back it is left behind, and this
    /// is `None`.
    pub fn stop_all(vcpus: Vec<RunningVcpu>, pace: Pace) -> Option<Vec<Vcpu>> {
        for vcpu in &vcpus {
            vcpu.machine.pace.store(pace as u8, Ordering::Release);
        }
        let deadline = Instant::now() + KICK_LIMIT;
        // The first reminder comes at once; a thread that is between guest and flag sees the flag.
        while vcpus.iter().any(|vcpu| !vcpu.thread.is_finished()) {
            if Instant::now() > deadline {
                return None;
            }
            for vcpu in vcpus.iter().filter(|vcpu| !vcpu.thread.is_finished()) {
                // A thread that ends meanwhile cannot be signalled, and need not be.
                let _ = vcpu.thread.kill(SIGRTMIN());
            }
            std::thread::sleep(KICK_INTERVAL);
        }
        vcpus.into_iter().map(|vcpu| vcpu.thread.join().ok()).collect()
    }
}
