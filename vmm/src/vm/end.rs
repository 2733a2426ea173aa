//! The end of a guest.

use crate::control::{EndReason, Event};
use crate::virtio::GuestFault;

/// The end of a guest: the party that ended it, and an explanation where there is one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// The party that ended the guest.
    pub reason: EndReason,
    /// An explanation, where there is more to say than the reason.
    pub detail: Option<String>,
}

impl End {
    /// An end without further explanation.
    pub fn new(reason: EndReason) -> Self {
        Self { reason, detail: None }
    }

    /// An end with an explanation.
    pub fn with_detail(reason: EndReason, detail: String) -> Self {
        Self { reason, detail: Some(detail) }
    }
}

/// The result of a monitor whose guest has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// The end of the guest.
    pub end: End,
    /// The tail of the guest kernel's messages; see
    /// [`MAX_LOG_BYTES`](crate::control::MAX_LOG_BYTES). Untrusted.
    pub log: String,
    /// The number of device rules that the guest broke.
    pub faults: u64,
    /// The first rule that the guest broke.
    pub fault: Option<GuestFault>,
    /// [`Event::Saved`] or [`Event::Recorded`], if the guest ended because the host asked for that.
    pub template: Option<Event>,
}

impl Ended {
    /// Returns the last event of the monitor.
    pub fn into_event(self) -> Event {
        let Self { end: End { reason, detail }, log, faults, fault, template } = self;
        template.unwrap_or(Event::Ended { reason, detail, log, faults, fault })
    }
}
