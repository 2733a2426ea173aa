//! An open connection: the bytes of both directions, their ends, and the credit.

use std::io;
use std::net::Shutdown;

use super::credit::{BUFFER_BYTES, Credit};
use super::host_channel::HostChannel;
use super::packet::{
    CHANNEL_ADDR, Header, MAX_PAYLOAD_BYTES, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
    VsockAddr,
};
use crate::virtio::PacketFault;
use crate::virtio::chain::Buffers;

/// An open connection.
pub struct Stream {
    pub channel: HostChannel,
    /// The guest's end.
    pub guest: VsockAddr,
    pub credit: Credit,
    to_host: ToHost,
    to_guest: ToGuest,
    /// Set while the guest owes an answer to a CREDIT_REQUEST.
    credit_requested: bool,
}

/// The direction from the guest to the host.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ToHost {
    Open,
    /// The guest has sent its last byte, and the host does not have it yet.
    Ending,
    /// The host has read, or can read, the end of the stream.
    Ended,
}

/// The direction from the host to the guest.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ToGuest {
    Open,
    /// The host has ended its stream, and the guest knows.
    EndedByHost,
    /// The guest receives no more, and the host knows.
    EndedByGuest,
}

impl Stream {
    /// Makes the connection of the channel to an address of the guest.
    pub fn new(channel: HostChannel, guest: VsockAddr) -> Self {
        Self {
            channel,
            guest,
            credit: Credit::default(),
            to_host: ToHost::Open,
            to_guest: ToGuest::Open,
            credit_requested: false,
        }
    }

    /// Records the credit that the guest announces.
    pub fn record_announcement(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.credit.record_announcement(buf_alloc, fwd_cnt);
        // A guest that answers a CREDIT_REQUEST without giving any space is not asked again, or
        // both sides would go on asking and answering.
        self.credit_requested &= self.credit.guest_space() == 0;
    }

    /// Checks the payload of a packet and returns it.
    pub fn check_payload<'m>(
        &mut self,
        header: &Header,
        buffers: &mut Buffers<'m>,
    ) -> Result<Buffers<'m>, PacketFault> {
        let len = usize::try_from(header.len).unwrap_or(usize::MAX);
        if len > buffers.len() {
            return Err(PacketFault::LengthBeyondBuffers);
        }
        if len > MAX_PAYLOAD_BYTES {
            return Err(PacketFault::PayloadTooLong);
        }
        if self.to_host != ToHost::Open {
            return Err(PacketFault::PayloadAfterShutdown);
        }
        self.credit.record_received(header.len).map_err(|_| PacketFault::CreditExceeded)?;
        Ok(buffers.split_front(len))
    }

    /// Records the directions that the guest ends.
    pub fn shut_down(&mut self, flags: u32) {
        if flags & SHUTDOWN_SEND != 0 && self.to_host == ToHost::Open {
            self.to_host = ToHost::Ending;
        }
        if flags & SHUTDOWN_RECEIVE != 0 && self.to_guest != ToGuest::EndedByGuest {
            self.to_guest = ToGuest::EndedByGuest;
            self.channel.shut_down(Shutdown::Read);
        }
    }

    /// Returns whether the guest has ended both directions.
    pub fn is_closed_by_guest(&self) -> bool {
        self.to_host != ToHost::Open && self.to_guest == ToGuest::EndedByGuest
    }

    /// Returns whether the channel's write half is shut down.
    pub fn is_write_half_shut(&self) -> bool {
        self.to_host == ToHost::Ended
    }

    /// Ends the host's input when it has all bytes before the end.
    pub fn finish_to_host(&mut self) {
        if self.to_host == ToHost::Ending && self.channel.is_drained() {
            self.to_host = ToHost::Ended;
            self.channel.shut_down(Shutdown::Write);
        }
    }

    /// Returns whether there may be a packet to send that is not a reply.
    pub fn has_output(&self) -> bool {
        self.credit.owes_update() || self.wants_input()
    }

    /// Returns whether to read from the channel, or to ask the guest for the credit to do so.
    fn wants_input(&self) -> bool {
        self.to_guest == ToGuest::Open
            && self.channel.is_readable()
            && (self.credit.guest_space() > 0 || !self.credit_requested)
    }

    /// Returns the header of the next packet that is not a reply, whose payload is in
    /// `payload_space` then.
    ///
    /// # Errors
    /// The host has closed its end of the channel.
    pub fn next_packet(&mut self, payload_space: &mut Buffers<'_>) -> io::Result<Option<Header>> {
        if self.wants_input() {
            let guest_space = usize::try_from(self.credit.guest_space()).unwrap_or(usize::MAX);
            if guest_space == 0 {
                self.credit_requested = true;
                return Ok(Some(self.make_header(Op::CreditRequest)));
            }
            let mut space = payload_space.split_front(guest_space.min(MAX_PAYLOAD_BYTES));
            match self.channel.receive(&mut space)? {
                Some(0) => {
                    self.to_guest = ToGuest::EndedByHost;
                    let end = self.make_header(Op::Shutdown);
                    return Ok(Some(Header { flags: SHUTDOWN_SEND, ..end }));
                }
                Some(len) => {
                    self.credit.record_sent(len);
                    return Ok(Some(Header { len, ..self.make_header(Op::Rw) }));
                }
                None => {}
            }
        }
        Ok(self.credit.owes_update().then(|| self.make_header(Op::CreditUpdate)))
    }

    /// Makes a header to the guest, with the latest announcement of the device's credit.
    pub fn make_header(&mut self, op: Op) -> Header {
        Header {
            source: CHANNEL_ADDR,
            destination: self.guest,
            len: 0,
            socket_type: TYPE_STREAM,
            op: Some(op),
            flags: 0,
            buf_alloc: BUFFER_BYTES,
            fwd_cnt: self.credit.announce(),
        }
    }
}
