//! Egress without a network, the sandbox's half: names are loopback addresses, and whatever connects to one is handed to
//! the host as a stream.
//!
//! ```text
//!   getaddrinfo ──▶ 127.0.0.53:53 ──▶ allowed?  127.64.x.y  /  no such name, and the host is told
//!   connect ──▶ 127.64.x.y:port ──▶ accepted on 0.0.0.0:port; the address it was made to is the name ──▶ Dial
//! ```
//!
//! Nothing here is what keeps a workload from other hosts: that there is no route does, and the broker that checks each
//! dial again. So the worst that a workload can do to all of it is to be without it. Sockets are watched edge-triggered, like
//! those of pumps.

mod dns;
mod names;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use chitin_protocol::{Endpoint, Failure, MAX_ENDPOINTS, ToHost};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrAny, SocketFlags, SocketType, ipproto, sockopt,
};

use crate::{failure, root_fs};
use dns::message::{self, Found, MAX_QUERY};
use names::Names;

/// Where `/etc/resolv.conf` of every root image points.
const RESOLVER: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, 53), 53);

/// Connections that wait to be accepted, a port: those beyond [`chitin_protocol::MAX_DIALS`] wait here for others to end.
const BACKLOG: i32 = 128;

/// Bytes of each of a connection's buffers in the kernel, which are on nobody's account: without this the kernel would grow
/// them to megabytes for a workload that does not read. It doubles the number; a window's worth keeps both sides busy.
const BUFFER: usize = 64 * 1024;

/// Connections and questions taken in one turn of the loop, so that a flood of them is not all there is to do.
const BATCH: usize = 16;

/// Questions over TCP at once. Resolvers use it where an answer was cut short, which none of ours is.
const MAX_TCP: usize = 8;

/// Names of event sources, below those of pumps: this, and a port or a number.
pub const EVENTS: u64 = 1 << 33;
const QUESTIONS: u64 = EVENTS | 1 << 16;
const TCP_QUESTIONS: u64 = EVENTS | 1 << 17;
const TCP_CLIENT: u64 = EVENTS | 1 << 18;

/// Everything that listens, and what it knows.
#[derive(Default)]
pub struct Egress {
    open: Option<Open>,
    /// Lives as long as the sandbox: see [`Names`].
    names: Names,
}

struct Open {
    ports: BTreeMap<u16, OwnedFd>,
    /// Ports at which somebody may wait.
    knocked: BTreeSet<u16>,
    questions: OwnedFd,
    asked: bool,
    tcp_questions: OwnedFd,
    tcp_asked: bool,
    clients: BTreeMap<u64, TcpClient>,
    next_client: u64,
}

/// Somebody who asks over TCP.
struct TcpClient {
    socket: OwnedFd,
    ready: bool,
    /// What has come of a question: two bytes of length, and so many more.
    read: Vec<u8>,
}

/// A connection of the workload's, and where it is meant to go.
pub struct Dialled {
    pub socket: OwnedFd,
    pub host: String,
    pub port: u16,
}

impl Egress {
    /// Listens.
    pub fn open(&mut self, poll: &OwnedFd, endpoints: Vec<Endpoint>) -> Result<(), Failure> {
        let refused = |what, errno| Err(failure(what, b"", errno));
        if self.open.is_some() {
            return refused("open egress twice", Errno::ALREADY);
        }
        if endpoints.len() > MAX_ENDPOINTS {
            return refused("allow more than 256 endpoints", Errno::TOOBIG);
        }
        // A container's runtime has done it, and may not let us: then what follows works, or says what does not.
        let _ = root_fs::raise_loopback();
        self.names.allow(endpoints);
        let watch = |socket: &OwnedFd, name| {
            let name = EventData::new_u64(name);
            epoll::add(poll, socket, name, EventFlags::IN | EventFlags::ET)
        };
        let bound = |kind, address: SocketAddrV4, name| {
            let opened =
                bind(kind, address).and_then(|socket| watch(&socket, name).map(|()| socket));
            opened.map_err(|errno| failure("listen on", address.to_string().as_bytes(), errno))
        };
        let questions = bound(SocketType::DGRAM, RESOLVER, QUESTIONS)?;
        let tcp_questions = bound(SocketType::STREAM, RESOLVER, TCP_QUESTIONS)?;
        let mut ports = BTreeMap::new();
        for port in self.names.ports() {
            let address = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port);
            ports.insert(port, bound(SocketType::STREAM, address, EVENTS | u64::from(port))?);
        }
        self.open = Some(Open {
            ports,
            knocked: BTreeSet::new(),
            questions,
            asked: false,
            tcp_questions,
            tcp_asked: false,
            clients: BTreeMap::new(),
            next_client: TCP_CLIENT,
        });
        Ok(())
    }

    /// Stops listening. Names keep their addresses, for programs remember those.
    pub fn close(&mut self) {
        self.open = None;
        self.names.allow(Vec::new());
    }

    /// Takes note of an event.
    pub fn wake(&mut self, name: u64) {
        let Some(open) = &mut self.open else { return };
        match name {
            QUESTIONS => open.asked = true,
            TCP_QUESTIONS => open.tcp_asked = true,
            client if client >= TCP_CLIENT => {
                if let Some(client) = open.clients.get_mut(&client) {
                    client.ready = true;
                }
            }
            port => {
                open.knocked.extend(u16::try_from(port & !EVENTS));
            }
        }
    }

    /// Answers questions. Gives what the host is to be told, and whether anything was done.
    pub fn answer(&mut self, poll: &OwnedFd, scratch: &mut [u8]) -> (Vec<ToHost>, bool) {
        let Some(open) = &mut self.open else { return (Vec::new(), false) };
        let mut denied = Vec::new();
        let names = &mut self.names;
        let mut find = |name: &str| {
            let found = names.find(name);
            if found == Found::Nothing && names.denied(name) {
                denied.push(ToHost::Denied { host: name.to_owned() });
            }
            found
        };
        let mut moved = open.answer_datagrams(scratch, &mut find);
        moved |= open.accept_clients(poll);
        moved |= open.answer_clients(scratch, &mut find);
        (denied, moved)
    }

    /// Accepts a connection, if one waits. A connection to an address or port of nobody's is reset.
    pub fn accept(&mut self) -> Option<Dialled> {
        let open = self.open.as_mut()?;
        for _ in 0..BATCH {
            let port = *open.knocked.first()?;
            let Some(listener) = open.ports.get(&port) else {
                open.knocked.remove(&port);
                continue;
            };
            match rustix::net::accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(socket) => {
                    let address = rustix::net::getsockname(&socket).ok().and_then(v4);
                    let host = address.and_then(|address| self.names.at(*address.ip(), port));
                    match host {
                        Some(host) => return Some(Dialled { host: host.to_owned(), socket, port }),
                        None => reset(&socket),
                    }
                }
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                // Nobody is there, or there are no descriptors: the next who comes wakes us again.
                Err(_) => {
                    open.knocked.remove(&port);
                }
            }
        }
        None
    }

    /// Whether somebody may wait to be accepted.
    pub fn is_knocked(&self) -> bool {
        self.open.as_ref().is_some_and(|open| !open.knocked.is_empty())
    }
}

impl Open {
    fn answer_datagrams(
        &mut self,
        scratch: &mut [u8],
        find: &mut impl FnMut(&str) -> Found,
    ) -> bool {
        for _ in 0..BATCH {
            if !self.asked {
                return false;
            }
            let (count, from) =
                match rustix::net::recvfrom(&self.questions, &mut *scratch, RecvFlags::empty()) {
                    Ok((_, count, Some(from))) => (count, from),
                    Ok(_) | Err(Errno::INTR) => continue,
                    Err(_) => {
                        self.asked = false;
                        return false;
                    }
                };
            if let Some(reply) = message::answer(&scratch[..count.min(MAX_QUERY)], &mut *find) {
                // A full buffer of the asker's is the asker's loss.
                let _ = rustix::net::sendto(&self.questions, &reply, SendFlags::NOSIGNAL, &from);
            }
        }
        true
    }

    fn accept_clients(&mut self, poll: &OwnedFd) -> bool {
        for _ in 0..BATCH {
            if !self.tcp_asked {
                return false;
            }
            let accepted = rustix::net::accept_with(
                &self.tcp_questions,
                SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            );
            let socket = match accepted {
                Ok(socket) => socket,
                Err(Errno::INTR | Errno::CONNABORTED) => continue,
                Err(_) => {
                    self.tcp_asked = false;
                    return false;
                }
            };
            if self.clients.len() >= MAX_TCP {
                // The oldest has had its time.
                self.clients.pop_first();
            }
            self.next_client += 1;
            let name = EventData::new_u64(self.next_client);
            if epoll::add(poll, &socket, name, EventFlags::IN | EventFlags::ET).is_ok() {
                let client = TcpClient { socket, ready: true, read: Vec::new() };
                self.clients.insert(self.next_client, client);
            }
        }
        true
    }

    fn answer_clients(&mut self, scratch: &mut [u8], find: &mut impl FnMut(&str) -> Found) -> bool {
        let mut moved = false;
        self.clients.retain(|_, client| {
            if !client.ready {
                return true;
            }
            match client.step(scratch, find) {
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
    /// Reads once, and answers what is complete. Whether there may be more; `None` when it is done with.
    fn step(&mut self, scratch: &mut [u8], find: &mut impl FnMut(&str) -> Found) -> Option<bool> {
        match rustix::io::read(&self.socket, &mut scratch[..MAX_QUERY]) {
            Ok(0) => return None,
            Ok(count) => self.read.extend_from_slice(&scratch[..count]),
            Err(Errno::AGAIN) => return Some(false),
            Err(Errno::INTR) => return Some(true),
            Err(_) => return None,
        }
        while let Some((length, rest)) = self.read.split_first_chunk() {
            let length = usize::from(u16::from_be_bytes(*length));
            if length > MAX_QUERY {
                return None;
            }
            let Some(query) = rest.get(..length) else { break };
            let reply = message::answer(query, &mut *find)?;
            let mut framed = u16::try_from(reply.len()).ok()?.to_be_bytes().to_vec();
            framed.extend(reply);
            // It fits an empty buffer; who leaves answers unread asks in vain.
            let sent = rustix::net::send(&self.socket, &framed, SendFlags::NOSIGNAL).ok()?;
            if sent < framed.len() {
                return None;
            }
            self.read.drain(..2 + length);
        }
        Some(true)
    }
}

/// A socket of this address that does not block; a stream's listens.
fn bind(kind: SocketType, address: SocketAddrV4) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::INET, kind, flags, None)?;
    if kind == SocketType::STREAM {
        // Connections of before a freeze may linger.
        sockopt::set_socket_reuseaddr(&socket, true)?;
        // Accepted sockets inherit them.
        sockopt::set_socket_recv_buffer_size(&socket, BUFFER)?;
        sockopt::set_socket_send_buffer_size(&socket, BUFFER)?;
    }
    rustix::net::bind(&socket, &address)?;
    if kind == SocketType::STREAM {
        rustix::net::listen(&socket, BACKLOG)?;
    }
    Ok(socket)
}

/// Begins a connection to a port of the workload's.
pub fn connect(port: u16) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(
        AddressFamily::INET,
        SocketType::STREAM,
        flags,
        Some(ipproto::TCP),
    )?;
    match rustix::net::connect(&socket, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, port)) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(errno) => Err(errno),
    }
}

/// Closes it so that the other side has an error of it.
fn reset(socket: impl AsFd) {
    let _ = sockopt::set_socket_linger(socket, Some(Duration::ZERO));
}

fn v4(address: SocketAddrAny) -> Option<SocketAddrV4> {
    address.try_into().ok()
}
