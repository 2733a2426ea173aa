//! The packets of the control socket, as JSON.

use serde::{Deserialize, Serialize};

use crate::jail::Jail;
use crate::virtio::GuestFault;

/// What a monitor tells its host, one JSON object per packet (or per line, when it runs standalone).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The guest is about to execute its first instruction.
    Entered {
        /// `CLOCK_MONOTONIC` in nanoseconds, just before the first `KVM_RUN`.
        at_ns: u64,
        /// The jail around its monitor; none for one that was told to do without.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        jail: Option<Jail>,
    },
    /// The guest is gone. Always the last event of a monitor that had started.
    Ended {
        /// Who ended it.
        reason: EndReason,
        /// What happened, in words, where there is more to say than the reason.
        detail: Option<String>,
        /// The tail of the guest kernel's messages: at most [`MAX_LOG_BYTES`], lossy UTF-8. Untrusted.
        log: String,
        /// How often the guest broke a rule of a device, whether or not that was the end of it.
        #[serde(default)]
        faults: u64,
        /// The first rule that it broke.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        fault: Option<GuestFault>,
    },
    /// The guest never started, or what was asked for could not be done. The last event.
    Failed {
        /// The chain of errors as one line, with the remedy.
        error: String,
    },
}

/// What a monitor tells a host that makes or uses templates, beside [`Event`]s and told apart by the same tag.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum TemplateEvent {
    /// Everything that can be done without a channel is done.
    Prepared,
    /// The guest has closed its connection and waits for another one: now it can be saved. Better still a few
    /// milliseconds later, when it has nothing left to do.
    Frozen,
    /// The guest was saved, and is gone. The last event.
    Saved {
        /// Bytes of memory that are not zero, which is what the memory file takes.
        memory_bytes: u64,
        /// Bytes of the state file.
        state_bytes: u64,
    },
    /// What the guest uses is in the new state file, and the guest is gone. The last event.
    Recorded {
        /// Pages of memory that it writes to.
        written: u32,
        /// Pages of memory that it only reads.
        read: u32,
        /// Pages of the root image.
        image: u32,
    },
}

/// Any packet of a monitor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Message {
    /// One that every host gets.
    Event(Event),
    /// One that a host gets who asked for it.
    Template(TemplateEvent),
}

impl From<Event> for Message {
    fn from(event: Event) -> Self {
        Self::Event(event)
    }
}

impl From<TemplateEvent> for Message {
    fn from(event: TemplateEvent) -> Self {
        Self::Template(event)
    }
}

/// What a host asks for after the specification.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Run the guest that was prepared. With the channel.
    Go {},
    /// Save the guest. With a file for its memory and one for its state, both open for writing, and a file or pipe with
    /// the key of 32 bytes.
    Snapshot {
        /// What the files are identified by that belong to the guest; see [`VmSpec::binding`](crate::VmSpec::binding).
        #[serde(default)]
        binding: String,
    },
    /// Write down what the guest has used so far. With a file for the new state and the key, as for a snapshot.
    Record {},
}

/// Who ended a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndReason {
    /// The guest itself: a reboot, a panic or a triple fault, which look alike from outside.
    Reset,
    /// We were told to stop: a signal, the control socket closed, or the channel's host end closed.
    Stopped,
    /// The guest broke the rules of a device beyond repair.
    Fault,
    /// KVM refused to run the guest any further.
    Kvm,
}

/// The most bytes of guest kernel messages in [`Event::Ended`]. A panic with its backtrace takes some 4 KiB; the rest is
/// what led to it.
pub const MAX_LOG_BYTES: usize = 32 * 1024;
