//! One microVM, from files to its end.
//!
//! ```text
//!   MonitorBuilder ──build()──▶ Monitor ──run()──▶ Running ──────────────▶ Draining ─────────▶ Ended
//!    spec, channel,              memory, kernel      vCPU threads, and       the guest ended     reason and
//!    what stops it               or saved state,     this thread's loop      itself: deliver     kernel log
//!                                devices, vCPUs           │                  its last words          ▲
//!                                                         ├── stopped, fault, KVM error ─────────────┤
//!                                                         └── saved: made into a template ───────────┘
//! ```
//!
//! One thread serves devices (the VMM thread: whoever calls [`Monitor::run`]), one runs each vCPU. They share device
//! registers, behind one lock per device, and nothing else: a vCPU that changes what the VMM thread serves sends it a
//! request.

mod builder;
mod error;
mod event_loop;
#[cfg(feature = "seccomp-tests")]
mod seccomp_test_port;
mod snapshot;
pub mod vcpu;

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, OnceLock, PoisonError};

use event_manager::{EventManager, SubscriberOps};
use kvm_ioctls::Kvm;
use vmm_sys_util::eventfd::EventFd;

use builder::{Memory, Transport};
pub use builder::{MonitorBuilder, Parts};
pub use error::MonitorError;
use error::host;
use event_loop::{Desk, Outcome, Request, Subscriber, Turn, Watch};
use vcpu::{Gate, Pace, RunningVcpu, Vcpu};

use crate::arch::x86_64::layout;
use crate::control::{Command, Control, EndReason, Message, TemplateEvent};
use crate::kvm::Vm;
use crate::memory::working_set::Recorder;
use crate::ramoops;
use crate::seccomp::rules::ThreadRole;
use crate::seccomp::{self, Filters};
use crate::spec::VmSpec;
use crate::state::{MachineState, StateError};
use crate::virtio::mmio::Shared;
use crate::virtio::vsock::ChannelSlot;

/// Ready descriptors taken at a time. There are some ten: queues, the channel, and what stops the guest.
const READY_EVENTS: usize = 16;

/// How a guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// Who ended it.
    pub reason: EndReason,
    /// What there is to say beyond that.
    pub detail: Option<String>,
}

impl End {
    /// An end that speaks for itself.
    pub fn new(reason: EndReason) -> Self {
        Self { reason, detail: None }
    }

    /// An end with an explanation.
    pub fn because(reason: EndReason, detail: String) -> Self {
        Self { reason, detail: Some(detail) }
    }
}

/// What is known once a guest is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Who ended it, and why.
    pub end: End,
    /// The tail of its kernel's messages; see [`MAX_LOG_BYTES`](crate::control::MAX_LOG_BYTES). Untrusted.
    pub log: String,
    /// How often it broke a rule of a device.
    pub faults: u64,
    /// The first of these rules, in words.
    pub fault: Option<String>,
    /// What was made of it instead of letting it go on, if the host asked for that.
    pub made: Option<TemplateEvent>,
}

/// What vCPU threads tell the VMM thread. The first end counts.
pub struct Notice {
    event: EventFd,
    /// Whether the VMM thread is woken when the guest is entered. For one that is restored it is told later, with the
    /// first thing that happens: the guest's first steps have the processor to themselves.
    wake: bool,
    entered_at: AtomicU64,
    end: OnceLock<End>,
}

impl Notice {
    fn new(wake: bool) -> io::Result<Arc<Self>> {
        let (entered_at, end) = Default::default();
        Ok(Arc::new(Self { event: event_fd()?, wake, entered_at, end }))
    }

    /// The first vCPU is about to run.
    pub fn entered(&self) {
        self.entered_at.store(monotonic_ns(), Ordering::Release);
        if self.wake {
            let _ = self.event.write(1);
        }
    }

    /// A vCPU will not run again.
    pub fn ended(&self, end: End) {
        // A later end is a consequence of the first.
        let _ = self.end.set(end);
        let _ = self.event.write(1);
    }
}

/// Ends a guest from another thread. Cheap to clone.
#[derive(Clone)]
pub struct Stopper(Arc<EventFd>);

impl Stopper {
    /// Asks the guest's monitor to end it; [`Monitor::run`] returns soon after.
    pub fn stop(&self) {
        let _ = self.0.write(1);
    }
}

/// A microVM that is ready to run.
///
/// ```no_run
/// use chitin_vmm::{Monitor, VmSpec};
///
/// let (channel, _ours) = std::os::unix::net::UnixStream::pair()?;
/// let monitor = Monitor::builder()
///     .spec(VmSpec::new("target/artifacts/vmlinux", "target/artifacts/root.img"))
///     .channel(channel)
///     .build()?;
/// let stopper = monitor.stopper(); // ends the guest from any thread
/// let ended = monitor.run()?;
/// println!("{:?}\n{}", ended.end.reason, ended.log);
/// # drop(stopper);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Monitor {
    // Dropped in this order: vCPUs and VM before the memory they use.
    vcpus: Vec<Vcpu>,
    notice: Arc<Notice>,
    stopper: Stopper,
    stop_on: Vec<OwnedFd>,
    control: Option<Rc<Control>>,
    on_event: Box<dyn FnMut(Message)>,
    requests: Receiver<Request>,
    mailbox: Arc<EventFd>,
    shared: Vec<Arc<Shared>>,
    transports: Vec<Transport>,
    slot: ChannelSlot,
    /// What is left to be restored when the guest goes on.
    restored: Option<Restored>,
    /// Whether the threads' system calls are filtered.
    filters: bool,
    /// To make a template with.
    kvm: Option<Kvm>,
    vm: Vm,
    memory: Memory,
    spec: VmSpec,
}

/// What a guest was restored from.
struct Restored {
    state: MachineState,
    /// What it uses of its memory file is being found out.
    recording: Option<(Recorder, File)>,
}

impl Monitor {
    /// Starts with nothing.
    pub fn builder() -> MonitorBuilder {
        MonitorBuilder::default()
    }

    /// A handle that ends the guest.
    pub fn stopper(&self) -> Stopper {
        self.stopper.clone()
    }

    /// Gives a guest that was prepared its channel.
    ///
    /// # Errors
    /// The channel cannot be used.
    pub fn attach(&mut self, channel: UnixStream) -> Result<(), MonitorError> {
        attach(&self.slot, channel)
    }

    /// Runs the guest to its end, on this thread and one for each vCPU. A guest that was prepared waits until the host
    /// says [`go`](crate::control::Request::Go).
    ///
    /// # Errors
    /// The host refuses a thread or a descriptor, or asked for what cannot be done. What happens to the guest itself is no
    /// error but an [`Ended`].
    pub fn run(self) -> Result<Ended, MonitorError> {
        let Self { vcpus, notice, stopper, stop_on, control, on_event, requests, mailbox, .. } =
            self;
        let Self { shared, transports, slot, restored, filters, kvm, vm, memory, spec, .. } = self;
        vcpu::install_kick_handler().map_err(host("install the signal handler of vCPUs"))?;
        let outcome = Rc::new(Outcome::default());
        let mut manager =
            EventManager::new_with_capacity(READY_EVENTS).map_err(MonitorError::EventLoop)?;
        let watched = vec![notice.event.as_raw_fd(), mailbox.as_raw_fd()];
        let asked = control.as_deref().map(AsRawFd::as_raw_fd);
        let stops = stop_on.iter().map(AsRawFd::as_raw_fd).chain([stopper.0.as_raw_fd()]).collect();
        let watch = Watch { watched, asked, stops, outcome: Rc::clone(&outcome) };
        manager.add_subscriber(Subscriber::Watch(watch));
        let mut desk = Desk {
            manager,
            requests,
            shared: &shared,
            active: HashMap::new(),
            outcome,
            control,
            on_event,
            entered: false,
        };

        // Devices are restored last, and their first interrupts are on their way before the guest runs.
        let go = |desk: &mut Desk<'_>| {
            if let Some(Restored { state: MachineState { clock_ns, devices, .. }, .. }) = &restored
            {
                for (transport, state) in transports.iter().zip(devices) {
                    let mut transport = transport.lock().unwrap_or_else(PoisonError::into_inner);
                    transport.restore(state).map_err(StateError::from)?;
                }
                desk.grant_all();
                desk.serve_all();
                vm.set_clock(*clock_ns)?;
            }
            Ok::<_, MonitorError>(())
        };
        let gate = Arc::new(Gate::default());
        let filters = filters.then(|| Filters::for_spec(&spec));
        let filter = |vcpus: usize| {
            let Some(filters) = filters else { return Ok(()) };
            // The only one runs no guest before it has its filter on; of several, each must.
            gate.await_arrivals(if vcpus > 1 { vcpus } else { 0 });
            seccomp::limit_threads(vcpus + 1).map_err(host("limit the number of threads"))?;
            filters.install_filter(ThreadRole::Vmm).map_err(host("filter system calls"))
        };
        // From here on the guest may do what it wants: whatever is not needed to serve it has been done.
        let enter = |desk: &mut Desk<'_>| {
            gate.open();
            desk.serve(&notice)
        };
        let mut running = Vec::with_capacity(vcpus.len());
        let mut refused = None;
        for vcpu in vcpus {
            match vcpu.start(&gate, filters) {
                Ok(vcpu) => running.push(vcpu),
                Err(error) => refused = Some(host("start the thread of a vCPU")(error)),
            }
        }
        let served = match refused {
            Some(error) => Err(error),
            // Before it waits, because somebody waits for it afterwards.
            None if spec.prepared => filter(running.len())
                .and_then(|()| wait_for_go(&mut desk, &notice, &slot))
                .and_then(|end| match end {
                    Some(end) => Ok(Turn::End(end)),
                    None => go(&mut desk).and_then(|()| enter(&mut desk)),
                }),
            // No rule is needed for what goes before it.
            None => {
                go(&mut desk).and_then(|()| filter(running.len())).and_then(|()| enter(&mut desk))
            }
        };

        // A vCPU may be waiting for an answer to a request: it gets none, and goes on to see that it is to stop.
        let orphans = std::mem::replace(&mut desk.requests, mpsc::channel().1);
        drop(orphans);
        let saving = matches!(served, Ok(Turn::Command(Command::Snapshot { .. })));
        let pace = if saving { Pace::Settle } else { Pace::Stop };
        gate.open();
        let stopped = RunningVcpu::stop_all(running, pace);
        let (end, made) = match served {
            Err(error) => (Err(error), None),
            Ok(Turn::End(end)) => {
                let delivered =
                    if end.reason == EndReason::Reset { desk.deliver() } else { Ok(()) };
                (delivered.map(|()| end), None)
            }
            Ok(Turn::Command(command)) => {
                let subject = snapshot::Subject {
                    spec: &spec,
                    kvm: kvm.as_ref(),
                    vm: &vm,
                    memory: &memory,
                    transports: &transports,
                    restored: restored.as_ref(),
                    notice: &notice,
                };
                let made = stopped
                    .as_deref()
                    .ok_or(MonitorError::Untimely {
                        request: "snapshot",
                        when: "a vCPU that does not stop",
                    })
                    .and_then(|vcpus| subject.obey(command, vcpus, &mut desk));
                match made {
                    Ok(made) => (Ok(End::new(EndReason::Stopped)), Some(made)),
                    Err(error) => (Err(error), None),
                }
            }
        };
        let stuck = stopped.is_none();
        drop((desk, stopped));
        let log = ramoops::read(&memory.ram, layout::LOG, layout::LOG_BYTES);
        drop(vm);
        if stuck {
            // A vCPU is stuck in the host kernel and still has this memory: better to keep it than to let the guest into
            // whatever is mapped there next.
            std::mem::forget(memory);
        }
        let faults = shared.iter().map(|shared| shared.faults.total()).sum();
        let fault =
            shared.iter().find_map(|shared| shared.faults.first()).map(|fault| fault.to_string());
        Ok(Ended { end: end?, log, faults, fault, made })
    }
}

/// Waits for the channel of a guest that was prepared; an end means that it is not to run.
fn wait_for_go(
    desk: &mut Desk<'_>,
    notice: &Notice,
    slot: &ChannelSlot,
) -> Result<Option<End>, MonitorError> {
    (desk.on_event)(TemplateEvent::Prepared.into());
    match desk.serve(notice)? {
        Turn::End(end) => Ok(Some(end)),
        Turn::Command(Command::Go(channel)) => attach(slot, channel).map(|()| None),
        Turn::Command(_) => {
            Err(MonitorError::Untimely { request: "snapshot", when: "a guest that has not run" })
        }
    }
}

fn attach(slot: &ChannelSlot, channel: UnixStream) -> Result<(), MonitorError> {
    channel.set_nonblocking(true).map_err(host("make the channel non-blocking"))?;
    slot.set(Arc::new(channel))
        .map_err(|_| MonitorError::Untimely { request: "go", when: "a guest that has a channel" })
}

fn event_fd() -> io::Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
}

fn monotonic_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is valid for writing; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, Write};
    use std::path::Path;

    use super::*;
    /// What a user is told about a specification that cannot be built, on any host.
    fn complaint(spec: VmSpec) -> String {
        crate::one_line(&Monitor::builder().spec(spec).build().err().unwrap())
    }

    fn file(contents: &[u8], length: u64) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(contents).unwrap();
        file.as_file().set_len(length).unwrap();
        file.rewind().unwrap();
        file
    }

    /// Passes every check: one byte at 1 MiB, and the entry point there.
    fn kernel() -> tempfile::NamedTempFile {
        let mut elf = vec![0; 128];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        for (at, value) in
            [(18, 62u64), (24, 1 << 20), (32, 64), (64, 1), (88, 1 << 20), (96, 1), (104, 1)]
        {
            elf[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        (elf[54], elf[56]) = (56, 1);
        file(&elf, 128)
    }

    #[test]
    fn each_bad_file_is_named_with_its_remedy() {
        let good = kernel();
        let text = file(b"#!/bin/sh\n", 4096);
        for (kernel, image, words) in [
            (Path::new("/nonexistent"), text.path(), ["open kernel /nonexistent", "No such file"]),
            (
                good.path(),
                Path::new("/nonexistent"),
                ["open root image /nonexistent", "No such file"],
            ),
            (text.path(), text.path(), ["not an ELF file", "`vmlinux`"]),
            (good.path(), text.path(), ["not an EROFS image", "cargo xtask rootfs"]),
        ] {
            let complaint = complaint(VmSpec::new(kernel, image));
            assert!(words.iter().all(|word| complaint.contains(word)), "{complaint}");
            assert!(!complaint.contains('\n'));
        }
    }

    #[test]
    fn a_specification_out_of_range_is_refused_before_any_file_is_opened() {
        let spec = VmSpec { vcpus: 200, ..VmSpec::new("/nonexistent", "/nonexistent") };
        assert_eq!(complaint(spec), "specification: 200 vCPUs asked for: a microVM has 1 to 8");
        assert!(complaint(VmSpec::new("", "")).contains("`kernel` is empty"));
    }
}
