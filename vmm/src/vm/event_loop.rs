//! The event loop of the VMM thread: serves devices, and reports and ends the guest for the host.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberId, SubscriberOps,
};

use super::device_requests::{DeviceRequest, DeviceRequests};
use super::device_worker::{DeviceWorker, modify_events};
use super::end::End;
use super::error::MonitorError;
use super::loop_signals::LoopSignals;
use super::stopper::Stopper;
use super::vcpu::VcpuContext;
use crate::control::{Command, ControlError, ControlSocket, EndReason, Event};
use crate::virtio::QueueHandler;
use crate::virtio::mmio::SharedRegisters;

/// The most ready descriptors that are taken at a time. There are some ten: queues, the channel,
/// and the reasons to stop.
const READY_EVENTS: usize = 16;

/// The most time the host may take to read the last bytes that a guest sent. After that they are
/// lost: the guest is gone, and the caller waits for its end.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

/// The host's side of a microVM: its requests, its reasons to stop the guest, and its reports.
pub(super) struct HostInterface {
    pub control: Option<Rc<ControlSocket>>,
    pub stop_on: Vec<OwnedFd>,
    pub stopper: Stopper,
    pub on_event: Box<dyn FnMut(Event)>,
}

/// The reason why the loop was left.
pub(super) enum LoopExit {
    /// The guest has ended, or is to be ended.
    End(End),
    /// The host has sent a request.
    Command(Command),
}

/// The event loop.
pub(super) struct EventLoop {
    manager: EventManager<Subscriber>,
    requests: Rc<DeviceRequests>,
    /// The devices, by index.
    devices: Vec<Arc<SharedRegisters>>,
    /// The workers of enabled devices, by the index of the device.
    workers: HashMap<usize, SubscriberId>,
    signals: Rc<LoopSignals>,
    vcpus: Arc<VcpuContext>,
    control: Option<Rc<ControlSocket>>,
    on_event: Box<dyn FnMut(Event)>,
    /// Set when the entry into the guest was reported to the host.
    entry_reported: bool,
}

impl EventLoop {
    /// Creates the loop of a guest whose devices are not enabled yet.
    pub fn new(
        host: HostInterface,
        devices: Vec<Arc<SharedRegisters>>,
        requests: Rc<DeviceRequests>,
        vcpus: Arc<VcpuContext>,
    ) -> Result<Self, MonitorError> {
        let HostInterface { control, stop_on, stopper, on_event } = host;
        let signals = Rc::new(LoopSignals::default());
        let mut manager =
            EventManager::new_with_capacity(READY_EVENTS).map_err(MonitorError::EventLoop)?;
        manager.add_subscriber(Subscriber::Wakeups(Wakeups {
            vcpus: Arc::clone(&vcpus),
            requests: Rc::clone(&requests),
            control: control.clone(),
            stop_on,
            stopper,
            signals: Rc::clone(&signals),
        }));
        Ok(Self {
            manager,
            requests,
            devices,
            workers: HashMap::new(),
            signals,
            vcpus,
            control,
            on_event,
            entry_reported: false,
        })
    }

    /// Reports an event to the host.
    pub fn report(&mut self, event: Event) {
        (self.on_event)(event);
    }

    /// Serves devices until the guest ends or the host sends a request.
    pub fn run(&mut self) -> Result<LoopExit, MonitorError> {
        loop {
            // Requests that arrive together are one event: the socket is read until it is empty.
            if let Some(exit) = self.receive_command()? {
                return Ok(exit);
            }
            self.manager.run().map_err(MonitorError::EventLoop)?;
            self.handle_requests();
            self.report_entry();
            if let Some(end) = self.find_end() {
                return Ok(LoopExit::End(end));
            }
            if self.signals.take_frozen() {
                self.report(Event::Frozen);
            }
        }
    }

    fn receive_command(&mut self) -> Result<Option<LoopExit>, MonitorError> {
        let Some(control) = self.control.as_ref().filter(|_| self.signals.control_ready.get())
        else {
            return Ok(None);
        };
        match control.try_receive_command() {
            Ok(command) => Ok(Some(LoopExit::Command(command))),
            Err(ControlError::WouldBlock) => {
                self.signals.control_ready.set(false);
                Ok(None)
            }
            // A host stops a guest by closing the socket.
            Err(ControlError::Closed) => Ok(Some(LoopExit::End(End::new(EndReason::Stopped)))),
            Err(error) => Err(error.into()),
        }
    }

    fn report_entry(&mut self) {
        if !self.entry_reported
            && let Some(at_ns) = self.vcpus.events.entered_at_ns()
        {
            self.entry_reported = true;
            self.report(Event::Entered { at_ns, jail: None });
        }
    }

    fn find_end(&self) -> Option<End> {
        if self.signals.stop.get() {
            return Some(End::new(EndReason::Stopped));
        }
        // The end of a vCPU comes first, so that no device reports a consequence of it as the
        // cause.
        self.vcpus.events.end().cloned().or_else(|| self.signals.take_end())
    }

    /// Handles the requests of vCPUs, and of a restore.
    pub fn handle_requests(&mut self) {
        while let Some(request) = self.requests.try_next() {
            self.handle_request(request);
        }
    }

    fn handle_request(&mut self, request: DeviceRequest) {
        match request {
            DeviceRequest::Start { device, handler, kick } => {
                let Some(shared) = self.devices.get(device).map(Arc::clone) else { return };
                let worker = DeviceWorker::new(handler, kick, shared, Rc::clone(&self.signals));
                let id = self.manager.add_subscriber(Subscriber::Device(worker));
                self.workers.insert(device, id);
            }
            DeviceRequest::Stop { device, done } => {
                if let Some(id) = self.workers.remove(&device) {
                    // The subscriber exists: only this method adds and removes workers.
                    let _ = self.manager.remove_subscriber(id);
                }
                let _ = done.send(());
            }
            #[cfg(feature = "seccomp-tests")]
            DeviceRequest::ForbiddenCall(letter) => {
                super::seccomp_test_port::make_forbidden_call(letter);
            }
        }
    }

    /// Drops the requests of vCPUs, now and later. A vCPU that waits for an answer sees that it is
    /// to stop.
    pub fn close_requests(&self) {
        self.requests.close();
    }

    /// Processes the queues of all devices, as if their drivers had notified them.
    pub fn process_queues(&mut self) {
        for id in self.workers.values() {
            let changed = match self.manager.subscriber_mut(*id) {
                Ok(Subscriber::Device(worker)) => worker.process_queues(),
                _ => continue,
            };
            if let Ok(mut ops) = self.manager.event_ops(*id) {
                modify_events(changed, &mut ops);
            }
        }
    }

    /// Returns the running half of a device, unless the device is not enabled or has failed.
    pub fn handler(&mut self, device: usize) -> Option<&dyn QueueHandler> {
        match self.manager.subscriber_mut(*self.workers.get(&device)?) {
            Ok(Subscriber::Device(worker)) => worker.handler(),
            _ => None,
        }
    }

    /// Processes the queues of a guest that has ended, and waits up to [`DRAIN_LIMIT`] until the
    /// host has read its last bytes.
    pub fn drain_queues(&mut self) -> Result<(), MonitorError> {
        let deadline = Instant::now() + DRAIN_LIMIT;
        self.process_queues();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if self.is_drained() || left.is_zero() || self.signals.stop.get() {
                return Ok(());
            }
            let left_ms = i32::try_from(left.as_millis()).unwrap_or(i32::MAX).saturating_add(1);
            self.manager.run_with_timeout(left_ms).map_err(MonitorError::EventLoop)?;
        }
    }

    fn is_drained(&mut self) -> bool {
        self.workers.values().all(|id| match self.manager.subscriber_mut(*id) {
            Ok(Subscriber::Device(worker)) => worker.is_drained(),
            _ => true,
        })
    }
}

/// A subscriber of the loop.
enum Subscriber {
    Wakeups(Wakeups),
    Device(DeviceWorker),
}

impl MutEventSubscriber for Subscriber {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match self {
            Subscriber::Wakeups(wakeups) => wakeups.process(events, ops),
            Subscriber::Device(worker) => worker.process(events, ops),
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        match self {
            Subscriber::Wakeups(wakeups) => wakeups.init(ops),
            Subscriber::Device(worker) => worker.init(ops),
        }
    }
}

/// The descriptors that wake the loop without being a device's.
struct Wakeups {
    vcpus: Arc<VcpuContext>,
    requests: Rc<DeviceRequests>,
    control: Option<Rc<ControlSocket>>,
    stop_on: Vec<OwnedFd>,
    stopper: Stopper,
    signals: Rc<LoopSignals>,
}

/// Only wakes the loop, which looks at vCPU events and device requests after each round.
const WAKE: u32 = 0;
const STOP: u32 = 1;
const CONTROL: u32 = 2;

impl MutEventSubscriber for Wakeups {
    fn process(&mut self, events: Events, _: &mut EventOps) {
        match events.data() {
            STOP => self.signals.stop.set(true),
            CONTROL => self.signals.control_ready.set(true),
            _ => {}
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        let wake = [self.vcpus.events.as_raw_fd(), self.requests.as_raw_fd()].map(|fd| (fd, WAKE));
        let stop = self.stop_on.iter().map(AsRawFd::as_raw_fd).chain([self.stopper.as_raw_fd()]);
        let control = self.control.as_deref().map(AsRawFd::as_raw_fd);
        let all = wake.into_iter().chain(stop.map(|fd| (fd, STOP)));
        for (fd, data) in all.chain(control.map(|fd| (fd, CONTROL))) {
            // Edge-triggered, so that an eventfd need not be read: every write is another event.
            let interest = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
            if ops.add(Events::with_data_raw(fd, data, interest)).is_err() {
                // A descriptor that is not watched cannot stop the guest: stop it now.
                self.signals.stop.set(true);
            }
        }
    }
}
