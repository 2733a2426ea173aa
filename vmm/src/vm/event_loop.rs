//! The VMM thread's loop, and what it serves.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::os::fd::{AsRawFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::time::{Duration, Instant};

use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberId, SubscriberOps,
};
use vmm_sys_util::eventfd::EventFd;

use super::{End, MonitorError, Notice};
use crate::control::{Command, Control, ControlError, EndReason, Event, Message, TemplateEvent};
use crate::virtio::mmio::{Shared, Worker};
use crate::virtio::{Flow, GuestFault, QueueHandler, Ready};

/// How long the host may take to read what a guest said last. After that it is lost: the guest is gone and somebody waits
/// for the end.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

/// What a vCPU asks of the VMM thread.
pub(super) enum Request {
    Start {
        device: usize,
        handler: Box<dyn QueueHandler>,
        kick: Arc<EventFd>,
    },
    Stop {
        device: usize,
        done: SyncSender<()>,
    },
    #[cfg(feature = "seccomp-tests")]
    Trial(u8),
}

/// One device's way to the VMM thread.
pub(super) struct Mailbox {
    pub(super) device: usize,
    pub(super) requests: Sender<Request>,
    pub(super) event: Arc<EventFd>,
}

impl Mailbox {
    /// Nobody takes a request once the guest is being ended; then nothing is served either.
    pub(super) fn send(&self, request: Request) {
        if self.requests.send(request).is_ok() {
            let _ = self.event.write(1);
        }
    }
}

impl Worker for Mailbox {
    fn start(&self, handler: Box<dyn QueueHandler>, kick: Arc<EventFd>) {
        self.send(Request::Start { device: self.device, handler, kick });
    }

    fn stop(&self) {
        let (done, wait) = mpsc::sync_channel(1);
        self.send(Request::Stop { device: self.device, done });
        // An error means that the request was dropped with the VMM thread's end of it.
        let _ = wait.recv();
    }
}

/// What the subscribers of the loop have found out.
#[derive(Default)]
pub(super) struct Outcome {
    stop: Cell<bool>,
    /// The host may have asked for something.
    asked: Cell<bool>,
    end: RefCell<Option<End>>,
    /// The guest waits to be saved, which is told once.
    frozen: Cell<Option<Frozen>>,
}

#[derive(Clone, Copy)]
enum Frozen {
    Untold,
    Told,
}

/// Why the loop was left.
pub(super) enum Turn {
    /// The guest has ended, or is to.
    End(End),
    /// The host asks for something.
    Command(Command),
}

/// The VMM thread's loop and what it serves.
pub(super) struct Desk<'a> {
    pub(super) manager: EventManager<Subscriber>,
    pub(super) requests: Receiver<Request>,
    pub(super) shared: &'a [Arc<Shared>],
    pub(super) active: HashMap<usize, SubscriberId>,
    pub(super) outcome: Rc<Outcome>,
    pub(super) control: Option<Rc<Control>>,
    pub(super) on_event: Box<dyn FnMut(Message)>,
    /// Whether the host has been told that the guest runs.
    pub(super) entered: bool,
}

impl Desk<'_> {
    /// Serves until the guest ends, or the host asks for something.
    pub(super) fn serve(&mut self, notice: &Notice) -> Result<Turn, MonitorError> {
        loop {
            // Until there is nothing: requests that come together are one event.
            if let Some(control) = &self.control
                && self.outcome.asked.get()
            {
                match control.command() {
                    Ok(command) => return Ok(Turn::Command(command)),
                    Err(ControlError::Nothing) => self.outcome.asked.set(false),
                    // Closing the socket is how a host stops a guest.
                    Err(ControlError::Closed) => {
                        return Ok(Turn::End(End::new(EndReason::Stopped)));
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            self.manager.run().map_err(MonitorError::EventLoop)?;
            self.grant_all();
            let at_ns = notice.entered_at.load(Ordering::Acquire);
            if at_ns != 0 && !self.entered {
                self.entered = true;
                (self.on_event)(Event::Entered { at_ns, jail: None }.into());
            }
            if self.outcome.stop.get() {
                return Ok(Turn::End(End::new(EndReason::Stopped)));
            }
            // A guest that ended itself is first seen here, so that no device reports a consequence of it as the cause.
            if let Some(end) = notice.end.get() {
                return Ok(Turn::End(end.clone()));
            }
            if let Some(end) = self.outcome.end.take() {
                return Ok(Turn::End(end));
            }
            if let Some(Frozen::Untold) = self.outcome.frozen.get() {
                self.outcome.frozen.set(Some(Frozen::Told));
                (self.on_event)(TemplateEvent::Frozen.into());
            }
        }
    }

    /// Does what vCPUs, and whoever restores devices, have asked for.
    pub(super) fn grant_all(&mut self) {
        while let Ok(request) = self.requests.try_recv() {
            self.grant(request);
        }
    }

    /// Looks into all queues, as if their drivers had notified them.
    pub(super) fn serve_all(&mut self) {
        for id in self.active.values() {
            let interest = match self.manager.subscriber_mut(*id) {
                Ok(Subscriber::Runner(runner)) => {
                    runner.serve_all();
                    runner.new_interest()
                }
                _ => continue,
            };
            if let Ok(mut ops) = self.manager.event_ops(*id) {
                interest.into_iter().for_each(|events| watch_anew(events, &mut ops));
            }
        }
    }

    /// The running half of a device, unless it is not there or has failed.
    pub(super) fn handler(&mut self, device: usize) -> Option<&dyn QueueHandler> {
        match self.manager.subscriber_mut(*self.active.get(&device)?) {
            Ok(Subscriber::Runner(runner)) if !runner.broken => Some(&*runner.handler),
            _ => None,
        }
    }

    fn grant(&mut self, request: Request) {
        match request {
            Request::Start { device, handler, kick } => {
                let Some(shared) = self.shared.get(device) else { return };
                let (shared, outcome) = (Arc::clone(shared), Rc::clone(&self.outcome));
                let runner =
                    Runner { handler, kick, shared, outcome, blocked: false, broken: false };
                let id = self.manager.add_subscriber(Subscriber::Runner(runner));
                self.active.insert(device, id);
            }
            Request::Stop { device, done } => {
                if let Some(id) = self.active.remove(&device) {
                    // It is there: only this method adds and removes.
                    let _ = self.manager.remove_subscriber(id);
                }
                let _ = done.send(());
            }
            #[cfg(feature = "seccomp-tests")]
            Request::Trial(letter) => super::seccomp_test_port::forbidden(letter),
        }
    }

    /// Takes what a guest that is gone has left in its queues, and waits, but not for long, until the host has it.
    pub(super) fn deliver(&mut self) -> Result<(), MonitorError> {
        let deadline = Instant::now() + DRAIN_LIMIT;
        self.serve_all();
        loop {
            let active = self.active.values();
            let drained = active.copied().collect::<Vec<_>>().into_iter().all(|id| {
                !matches!(self.manager.subscriber_mut(id), Ok(Subscriber::Runner(runner)) if !runner.is_drained())
            });
            let left = deadline.saturating_duration_since(Instant::now());
            if drained || left.is_zero() || self.outcome.stop.get() {
                return Ok(());
            }
            let left_ms = i32::try_from(left.as_millis()).unwrap_or(i32::MAX).saturating_add(1);
            self.manager.run_with_timeout(left_ms).map_err(MonitorError::EventLoop)?;
        }
    }
}

/// Whoever waits for descriptors.
pub(super) enum Subscriber {
    Watch(Watch),
    Runner(Runner),
}

impl MutEventSubscriber for Subscriber {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match self {
            Subscriber::Watch(watch) => watch.process(events, ops),
            Subscriber::Runner(runner) => runner.process(events, ops),
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        match self {
            Subscriber::Watch(watch) => watch.init(ops),
            Subscriber::Runner(runner) => runner.init(ops),
        }
    }
}

/// Waits for vCPUs, and for whatever stops the guest.
pub(super) struct Watch {
    /// Only wake the loop, which looks for itself.
    pub(super) watched: Vec<RawFd>,
    /// The control socket.
    pub(super) asked: Option<RawFd>,
    pub(super) stops: Vec<RawFd>,
    pub(super) outcome: Rc<Outcome>,
}

const WAKE: u32 = 0;
const STOP: u32 = 1;
const ASKED: u32 = 2;

impl MutEventSubscriber for Watch {
    fn process(&mut self, events: Events, _: &mut EventOps) {
        match events.data() {
            STOP => self.outcome.stop.set(true),
            ASKED => self.outcome.asked.set(true),
            _ => {}
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        // Edge-triggered, so that an eventfd needs not be read: every write is another event.
        let wake = self.watched.iter().map(|fd| (*fd, WAKE));
        let stop = self.stops.iter().map(|fd| (*fd, STOP));
        let asked = self.asked.iter().map(|fd| (*fd, ASKED));
        for (fd, data) in wake.chain(stop).chain(asked) {
            let interest = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
            if ops.add(Events::with_data_raw(fd, data, interest)).is_err() {
                // What cannot be watched cannot stop the guest; that must not go unnoticed.
                self.outcome.stop.set(true);
            }
        }
    }
}

/// Serves one device's queues and descriptors.
pub(super) struct Runner {
    handler: Box<dyn QueueHandler>,
    kick: Arc<EventFd>,
    shared: Arc<Shared>,
    outcome: Rc<Outcome>,
    /// Whether its sources are watched for output too.
    blocked: bool,
    /// After a fault nothing is served until the driver resets the device, which makes a new runner.
    broken: bool,
}

/// Event data: a notification is zero, sources count from here.
const FIRST_SOURCE: u32 = 1;

impl Runner {
    fn serve_all(&mut self) {
        if !self.broken {
            let result = self.handler.on_kick();
            self.settle(result);
        }
    }

    fn is_drained(&self) -> bool {
        self.broken || self.handler.is_drained()
    }

    fn sources(&self) -> impl Iterator<Item = Events> {
        let output = if self.blocked { EventSet::OUT } else { EventSet::empty() };
        let interest = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED | output;
        let sources = (FIRST_SOURCE..).zip(self.handler.sources());
        sources.map(move |(data, fd)| Events::with_data_raw(fd, data, interest))
    }

    /// Its sources, if they are to be watched for something else from now on.
    fn new_interest(&mut self) -> Vec<Events> {
        if std::mem::replace(&mut self.blocked, self.handler.is_blocked()) == self.blocked {
            return Vec::new();
        }
        self.sources().collect()
    }

    fn settle(&mut self, result: Result<Flow, GuestFault>) {
        match result {
            Ok(Flow::Continue) => {}
            Ok(Flow::Waiting) => {
                if self.outcome.frozen.get().is_none() {
                    self.outcome.frozen.set(Some(Frozen::Untold));
                }
            }
            Ok(Flow::Stop(why)) => self.end(End::because(EndReason::Stopped, why.to_owned())),
            Err(fault) => {
                self.broken = true;
                self.shared.needs_reset(fault);
                if !self.handler.survives_reset() {
                    self.end(End::because(EndReason::Fault, fault.to_string()));
                }
            }
        }
    }

    fn end(&self, end: End) {
        self.outcome.end.borrow_mut().get_or_insert(end);
    }
}

impl MutEventSubscriber for Runner {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if self.broken {
            return;
        }
        let set = events.event_set();
        let result = match events.data().checked_sub(FIRST_SOURCE) {
            None => self.handler.on_kick(),
            Some(source) => {
                let hung_up = set.intersects(EventSet::HANG_UP | EventSet::ERROR);
                let ready = Ready {
                    readable: set.intersects(EventSet::IN | EventSet::READ_HANG_UP) || hung_up,
                    writable: set.contains(EventSet::OUT),
                    hung_up,
                };
                self.handler.on_source(usize::try_from(source).unwrap_or(usize::MAX), ready)
            }
        };
        self.settle(result);
        self.new_interest().into_iter().for_each(|events| watch_anew(events, ops));
    }

    fn init(&mut self, ops: &mut EventOps) {
        // Edge-triggered: an eventfd need not be read, and a channel's handler remembers what it is ready for.
        let kick = Events::with_data_raw(
            self.kick.as_raw_fd(),
            0,
            EventSet::IN | EventSet::EDGE_TRIGGERED,
        );
        for events in [kick].into_iter().chain(self.sources()) {
            if let Err(error) = ops.add(events) {
                self.end(End::because(
                    EndReason::Stopped,
                    format!("watch a device's descriptor: {error}"),
                ));
            }
        }
    }
}

/// What it is ready for at this moment is an event of its own, so that nothing is missed. A descriptor that is gone needs no
/// watching.
fn watch_anew(events: Events, ops: &mut EventOps) {
    let _ = ops.modify(events);
}
