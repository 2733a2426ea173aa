//! The packets of the control socket, as JSON.

use serde::{Deserialize, Serialize};

use super::failure::FailureCode;
use crate::jail::Jail;
use crate::virtio::GuestFault;

/// The most bytes of guest kernel messages in [`Event::Ended`]. A panic with its backtrace takes
/// some 4 KiB; the rest is what led to it.
pub const MAX_LOG_BYTES: usize = 32 * 1024;

/// An event that a monitor reports: one JSON object in each packet, or in each line if it runs
/// standalone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A prepared guest waits for its channel; everything that needs none is done.
    Prepared,
    /// The guest is about to execute its first instruction.
    Entered {
        /// `CLOCK_MONOTONIC` in nanoseconds, just before the first `KVM_RUN`.
        at_ns: u64,
        /// The jail of the monitor; `None` if it runs without one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        jail: Option<Jail>,
    },
    /// The guest has closed its connection and waits for another one: now it can be saved. A few
    /// milliseconds later, when it has nothing left to do, is better still.
    Frozen,
    /// The guest was saved, and has ended. The last event.
    Saved {
        /// Bytes of memory that are not zero, which is the size of the memory file on disk.
        memory_bytes: u64,
        /// Bytes of the state file.
        state_bytes: u64,
    },
    /// The pages that the guest uses were written to the new state file, and the guest has ended.
    /// The last event.
    Recorded {
        /// Pages of memory that the guest writes to.
        written: u32,
        /// Pages of memory that it only reads.
        read: u32,
        /// Pages of the root image.
        image: u32,
    },
    /// The guest has ended. The last event of a monitor that had started it.
    Ended {
        /// The party that ended the guest.
        reason: EndReason,
        /// An explanation, where there is more to say than the reason.
        detail: Option<String>,
        /// The tail of the guest kernel's messages: at most [`MAX_LOG_BYTES`], lossy UTF-8.
        /// Untrusted.
        log: String,
        /// The number of device rules that the guest broke, whether or not one of them ended it.
        #[serde(default)]
        faults: u64,
        /// The first rule that the guest broke.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        fault: Option<GuestFault>,
    },
    /// The guest never started, or a request could not be carried out. The last event.
    Failed {
        /// The cause, for programs.
        code: FailureCode,
        /// The chain of errors in one line, with the remedy.
        error: String,
    },
}

/// The party that ended a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndReason {
    /// The guest itself: a reboot, a panic or a triple fault, which look alike from outside.
    Reset,
    /// The host: a signal, the control socket closed, or the host's end of the channel closed.
    Stopped,
    /// The monitor, because the guest broke the rules of a device beyond repair.
    Fault,
    /// KVM, which refused to run the guest any further.
    Kvm,
}

/// A request that a host sends after the specification.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Run the prepared guest. Comes with the channel.
    Go {},
    /// Save the guest. Comes with a file for its memory and one for its state, both open for
    /// writing, and a file or pipe with the key of 32 bytes.
    Snapshot {
        /// The identity of the files that belong to the guest; see
        /// [`VmSpec::binding`](crate::VmSpec::binding).
        #[serde(default)]
        binding: String,
    },
    /// Write the pages that the guest has used so far. Comes with a file for the new state and the
    /// key, as for a snapshot.
    Record {},
}

#[cfg(test)]
#[path = "message_test.rs"]
mod tests;
