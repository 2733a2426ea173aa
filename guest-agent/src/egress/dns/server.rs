//! The sockets of the resolver, over UDP and TCP.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::OwnedFd;

use chitin_protocol::Failure;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags, SocketType};

use super::message::{self, Lookup, MAX_QUERY};
use crate::egress::BATCH;
use crate::egress::listeners::open_socket;
use crate::io::poll::{EventFlags, Poll, Token};

const ADDRESS: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, 53), 53);

/// The most TCP clients at the same time. Resolvers use TCP after a truncated answer, and none of
/// these is ever truncated.
const MAX_TCP_CLIENTS: usize = 8;

pub struct DnsServer {
    udp: OwnedFd,
    udp_ready: bool,
    tcp: OwnedFd,
    tcp_ready: bool,
    /// TCP clients by number; numbers ascend with age.
    clients: BTreeMap<u64, TcpClient>,
    next_client: u64,
}

struct TcpClient {
    socket: OwnedFd,
    ready: bool,
    /// The received part of a question: two bytes of length, and that many bytes.
    received: Vec<u8>,
}

impl DnsServer {
    pub fn open(poll: &Poll) -> Result<DnsServer, Failure> {
        Ok(DnsServer {
            udp: open_socket(poll, SocketType::DGRAM, ADDRESS, Token::DnsUdp)?,
            udp_ready: false,
            tcp: open_socket(poll, SocketType::STREAM, ADDRESS, Token::DnsTcp)?,
            tcp_ready: false,
            clients: BTreeMap::new(),
            next_client: 0,
        })
    }

    /// Records an event.
    pub fn wake(&mut self, token: Token) {
        match token {
            Token::DnsUdp => self.udp_ready = true,
            Token::DnsTcp => self.tcp_ready = true,
            Token::DnsClient(number) => {
                if let Some(client) = self.clients.get_mut(&number) {
                    client.ready = true;
                }
            }
            _ => {}
        }
    }

    /// Answers questions, and returns whether anything was done. `look_up` resolves a name.
    pub fn answer(
        &mut self,
        poll: &Poll,
        scratch: &mut [u8],
        look_up: &mut impl FnMut(&str) -> Lookup,
    ) -> bool {
        let mut moved = self.answer_datagrams(scratch, look_up);
        moved |= self.accept_clients(poll);
        moved |= self.answer_clients(scratch, look_up);
        moved
    }

    fn answer_datagrams(
        &mut self,
        scratch: &mut [u8],
        look_up: &mut impl FnMut(&str) -> Lookup,
    ) -> bool {
        for _ in 0..BATCH {
            if !self.udp_ready {
                return false;
            }
            let (count, from) =
                match rustix::net::recvfrom(&self.udp, &mut *scratch, RecvFlags::empty()) {
                    Ok((_, count, Some(from))) => (count, from),
                    Ok(_) | Err(Errno::INTR) => continue,
                    Err(_) => {
                        self.udp_ready = false;
                        return false;
                    }
                };
            let query = &scratch[..count.min(MAX_QUERY)];
            if let Some(reply) = message::answer_query(query, &mut *look_up) {
                // A client whose buffer is full loses the answer.
                let _ = rustix::net::sendto(&self.udp, &reply, SendFlags::NOSIGNAL, &from);
            }
        }
        true
    }

    fn accept_clients(&mut self, poll: &Poll) -> bool {
        for _ in 0..BATCH {
            if !self.tcp_ready {
                return false;
            }
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = match rustix::net::accept_with(&self.tcp, flags) {
                Ok(socket) => socket,
                Err(Errno::INTR | Errno::CONNABORTED) => continue,
                Err(_) => {
                    self.tcp_ready = false;
                    return false;
                }
            };
            if self.clients.len() >= MAX_TCP_CLIENTS {
                // Drops the oldest.
                self.clients.pop_first();
            }
            self.next_client += 1;
            let token = Token::DnsClient(self.next_client);
            if poll.add(&socket, token, EventFlags::IN | EventFlags::ET).is_ok() {
                let client = TcpClient { socket, ready: true, received: Vec::new() };
                self.clients.insert(self.next_client, client);
            }
        }
        true
    }

    fn answer_clients(
        &mut self,
        scratch: &mut [u8],
        look_up: &mut impl FnMut(&str) -> Lookup,
    ) -> bool {
        let mut moved = false;
        self.clients.retain(|_, client| {
            if !client.ready {
                return true;
            }
            match client.answer(scratch, look_up) {
                Some(more) => {
                    client.ready = more;
                    moved |= more;
                    true
                }
                None => false,
            }
        });
        moved
    }
}

impl TcpClient {
    /// Reads once, and answers all complete questions. Returns whether there may be more to read,
    /// or `None` if the client can be dropped.
    fn answer(
        &mut self,
        scratch: &mut [u8],
        look_up: &mut impl FnMut(&str) -> Lookup,
    ) -> Option<bool> {
        match rustix::io::read(&self.socket, &mut scratch[..MAX_QUERY]) {
            Ok(0) => return None,
            Ok(count) => self.received.extend_from_slice(&scratch[..count]),
            Err(Errno::AGAIN) => return Some(false),
            Err(Errno::INTR) => return Some(true),
            Err(_) => return None,
        }
        while let Some((length, rest)) = self.received.split_first_chunk() {
            let length = usize::from(u16::from_be_bytes(*length));
            if length > MAX_QUERY {
                return None;
            }
            let Some(query) = rest.get(..length) else { break };
            let reply = message::answer_query(query, &mut *look_up)?;
            let mut framed = u16::try_from(reply.len()).ok()?.to_be_bytes().to_vec();
            framed.extend(reply);
            // The answer fits an empty buffer. A client that leaves answers unread is dropped.
            let sent = rustix::net::send(&self.socket, &framed, SendFlags::NOSIGNAL).ok()?;
            if sent < framed.len() {
                return None;
            }
            self.received.drain(..2 + length);
        }
        Some(true)
    }
}
