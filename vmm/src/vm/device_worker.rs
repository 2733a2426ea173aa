//! The worker of one device: calls its running half when a queue or another descriptor is ready.

use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::EventFd;

use super::end::End;
use super::loop_signals::LoopSignals;
use crate::control::EndReason;
use crate::virtio::mmio::SharedRegisters;
use crate::virtio::{Flow, GuestFault, QueueHandler, Ready};

/// Event data of a notification of the driver. The sources of the device follow.
const KICK: u32 = 0;
const FIRST_SOURCE: u32 = 1;

/// Serves the queues and descriptors of one device.
pub(super) struct DeviceWorker {
    handler: Box<dyn QueueHandler>,
    kick: Arc<EventFd>,
    shared: Arc<SharedRegisters>,
    signals: Rc<LoopSignals>,
    /// If set, the sources are watched for output as well.
    blocked: bool,
    /// Set by a fault. Nothing is served until the driver resets the device, which makes a new
    /// worker.
    broken: bool,
}

impl DeviceWorker {
    /// Creates the worker of a device that the driver has enabled.
    pub fn new(
        handler: Box<dyn QueueHandler>,
        kick: Arc<EventFd>,
        shared: Arc<SharedRegisters>,
        signals: Rc<LoopSignals>,
    ) -> Self {
        Self { handler, kick, shared, signals, blocked: false, broken: false }
    }

    /// Returns the running half of the device, unless it has failed.
    pub fn handler(&self) -> Option<&dyn QueueHandler> {
        (!self.broken).then_some(&*self.handler)
    }

    /// Processes the queues as if the driver had notified them. Returns the sources whose events
    /// have to be modified.
    pub fn process_queues(&mut self) -> Vec<Events> {
        if !self.broken {
            let result = self.handler.on_kick();
            self.handle_result(result);
        }
        self.changed_events()
    }

    /// Returns true if everything that the guest has sent was delivered.
    pub fn is_drained(&self) -> bool {
        self.broken || self.handler.is_drained()
    }

    /// Returns the sources with the events to watch them for.
    fn source_events(&self) -> impl Iterator<Item = Events> {
        let output = if self.blocked { EventSet::OUT } else { EventSet::empty() };
        let interest = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED | output;
        let sources = (FIRST_SOURCE..).zip(self.handler.sources());
        sources.map(move |(data, fd)| Events::with_data_raw(fd, data, interest))
    }

    /// Returns the sources if they are to be watched for other events from now on.
    fn changed_events(&mut self) -> Vec<Events> {
        let blocked = self.handler.is_blocked();
        if std::mem::replace(&mut self.blocked, blocked) == blocked {
            return Vec::new();
        }
        self.source_events().collect()
    }

    fn handle_result(&mut self, result: Result<Flow, GuestFault>) {
        match result {
            Ok(Flow::Continue) => {}
            Ok(Flow::AwaitSnapshot) => self.signals.set_frozen(),
            Ok(Flow::Stop(why)) => {
                self.signals.set_end(End::with_detail(EndReason::Stopped, why.to_string()));
            }
            Err(fault) => {
                self.broken = true;
                self.shared.set_needs_reset(fault);
                if !self.handler.survives_reset() {
                    self.signals.set_end(End::with_detail(EndReason::Fault, fault.to_string()));
                }
            }
        }
    }
}

impl MutEventSubscriber for DeviceWorker {
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
        self.handle_result(result);
        modify_events(self.changed_events(), ops);
    }

    fn init(&mut self, ops: &mut EventOps) {
        // Edge-triggered: an eventfd need not be read, and the handler of a channel remembers what
        // the channel is ready for.
        let interest = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let kick = Events::with_data_raw(self.kick.as_raw_fd(), KICK, interest);
        for events in [kick].into_iter().chain(self.source_events()) {
            if let Err(error) = ops.add(events) {
                let detail = format!("watch a device's descriptor: {error}");
                self.signals.set_end(End::with_detail(EndReason::Stopped, detail));
            }
        }
    }
}

/// Watches descriptors for other events. A descriptor that is ready at this moment causes a new
/// event, so that nothing is missed; one that is gone needs no watching.
pub(super) fn modify_events(changed: Vec<Events>, ops: &mut EventOps) {
    for events in changed {
        let _ = ops.modify(events);
    }
}
