//! What host and monitor say to each other over the control socket.
//!
//! The control socket is a `SOCK_SEQPACKET` pair, inherited as standard input. The host's first packet is a
//! [`VmSpec`](crate::VmSpec) as JSON, with descriptors attached; the monitor answers with one event as JSON per packet. The
//! host stops a monitor by closing its end, which its death does as well.
//!
//! ```text
//! host                                              monitor
//!  spec                 [channel]               ──▶
//!                                               ◀── entered … ended                     a guest, booted
//!
//!  spec{template}       [channel]               ──▶
//!                                               ◀── entered, frozen                     the guest waits to be saved
//!  snapshot{binding}    [memory, state, key]    ──▶
//!                                               ◀── saved
//!
//!  spec{restore}        [channel, memory, state, key] ──▶
//!                                               ◀── entered … ended                     a guest, restored
//!
//!  spec{…, prepared}    the same without channel ──▶
//!                                               ◀── prepared                            a monitor in a pool
//!  go                   [channel]               ──▶
//!                                               ◀── entered … ended
//!
//!  spec{restore, record} [channel, memory, state, key] ──▶                              and used once, then:
//!  record               [state, key]            ──▶
//!                                               ◀── recorded
//! ```
//!
//! Whatever goes wrong, also with a request, ends the monitor with `failed`.

mod message;
mod socket;

pub use message::{EndReason, Event, MAX_LOG_BYTES, Message, Request, TemplateEvent};
pub use socket::{Command, Control, ControlError, TemplateFiles};
