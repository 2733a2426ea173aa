//! The control socket, over which the host and a monitor exchange requests and events.
//!
//! The socket is a `SOCK_SEQPACKET` pair, and the monitor inherits its end as standard input. The
//! host's first packet is a [`VmSpec`](crate::VmSpec) as JSON, with descriptors attached; each
//! later packet is a [`Request`]. The monitor sends one [`Event`] as JSON in each packet. The host
//! stops a monitor by closing its end, which its death does as well.
//!
//! ```text
//! host                                                  monitor
//!  spec                  [channel]                     ──▶
//!                                                      ◀── entered … ended     a booted guest
//!
//!  spec{template}        [channel]                     ──▶
//!                                                      ◀── entered, frozen     a guest to save
//!  snapshot{binding}     [memory, state, key]          ──▶
//!                                                      ◀── saved
//!
//!  spec{restore}         [channel, memory, state, key] ──▶
//!                                                      ◀── entered … ended     a restored guest
//!
//!  spec{…, prepared}     as above, without the channel ──▶
//!                                                      ◀── prepared            for a pool
//!  go                    [channel]                     ──▶
//!                                                      ◀── entered … ended
//!
//!  spec{restore, record} [channel, memory, state, key] ──▶                     used once, then:
//!  record                [state, key]                  ──▶
//!                                                      ◀── recorded
//! ```
//!
//! Any failure, also of a request, ends the monitor with `failed`.

mod failure;
mod message;
mod socket;

pub use failure::FailureCode;
pub use message::{EndReason, Event, MAX_LOG_BYTES, Request};
pub use socket::{Command, ControlError, ControlSocket, ReceivedSpec, TemplateFiles};
