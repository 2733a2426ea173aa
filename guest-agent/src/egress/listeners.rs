//! Listeners on the ports of the allowed endpoints, and connections to ports of the workload.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use chitin_protocol::Failure;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrAny, SocketFlags, SocketType, ipproto, sockopt};

use super::BATCH;
use crate::error::make_failure;
use crate::io::poll::{EventFlags, Poll, Token};

/// Connections per port that wait to be accepted. Those above [`chitin_protocol::MAX_DIALS`] wait
/// here until others end.
const BACKLOG: i32 = 128;

/// The size of each kernel buffer of a connection, in bytes; the kernel doubles it. These buffers
/// are charged to no cgroup, and would grow to megabytes for a workload that does not read. A
/// window's worth keeps both sides busy.
const BUFFER_LEN: usize = 64 * 1024;

/// A connection of the workload and the endpoint that it is meant for.
pub struct DialRequest {
    pub socket: OwnedFd,
    pub host: String,
    pub port: u16,
}

pub struct Listeners {
    sockets: BTreeMap<u16, OwnedFd>,
    /// Ports at which a connection may wait.
    ready: BTreeSet<u16>,
}

impl Listeners {
    pub fn open(poll: &Poll, ports: impl IntoIterator<Item = u16>) -> Result<Listeners, Failure> {
        let mut sockets = BTreeMap::new();
        for port in ports {
            let address = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port);
            let socket = open_socket(poll, SocketType::STREAM, address, Token::Port(port))?;
            sockets.insert(port, socket);
        }
        Ok(Listeners { sockets, ready: BTreeSet::new() })
    }

    /// Records that a connection waits at a port.
    pub fn wake(&mut self, port: u16) {
        self.ready.insert(port);
    }

    /// Returns whether a connection may wait.
    pub fn may_accept(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Accepts a connection, if one waits. `find_host` returns the host at an address and a port; a
    /// connection to any other is reset.
    pub fn accept<'a>(
        &mut self,
        find_host: impl Fn(Ipv4Addr, u16) -> Option<&'a str>,
    ) -> Option<DialRequest> {
        for _ in 0..BATCH {
            let port = *self.ready.first()?;
            let Some(listener) = self.sockets.get(&port) else {
                self.ready.remove(&port);
                continue;
            };
            match rustix::net::accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(socket) => {
                    let address = rustix::net::getsockname(&socket).ok().and_then(to_v4);
                    match address.and_then(|address| find_host(*address.ip(), port)) {
                        Some(host) => {
                            return Some(DialRequest { host: host.to_owned(), socket, port });
                        }
                        None => reset_on_close(&socket),
                    }
                }
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                // No connection waits, or no descriptor is free. The next connection is an event.
                Err(_) => {
                    self.ready.remove(&port);
                }
            }
        }
        None
    }
}

/// Opens a non-blocking socket at this address and watches it. A TCP socket listens.
pub fn open_socket(
    poll: &Poll,
    kind: SocketType,
    address: SocketAddrV4,
    token: Token,
) -> Result<OwnedFd, Failure> {
    bind_socket(kind, address)
        .and_then(|socket| {
            poll.add(&socket, token, EventFlags::IN | EventFlags::ET).map(|()| socket)
        })
        .map_err(|errno| make_failure("listen on", address.to_string().as_bytes(), errno))
}

fn bind_socket(kind: SocketType, address: SocketAddrV4) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::INET, kind, flags, None)?;
    if kind == SocketType::STREAM {
        // Connections from before a freeze may still occupy the address.
        sockopt::set_socket_reuseaddr(&socket, true)?;
        // Accepted sockets inherit the buffer sizes.
        sockopt::set_socket_recv_buffer_size(&socket, BUFFER_LEN)?;
        sockopt::set_socket_send_buffer_size(&socket, BUFFER_LEN)?;
    }
    rustix::net::bind(&socket, &address)?;
    if kind == SocketType::STREAM {
        rustix::net::listen(&socket, BACKLOG)?;
    }
    Ok(socket)
}

/// Starts to connect to a port of the workload.
pub fn connect_to_port(port: u16) -> Result<OwnedFd, Errno> {
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

/// Lets the peer see a reset when the socket is closed.
fn reset_on_close(socket: impl AsFd) {
    let _ = sockopt::set_socket_linger(socket, Some(Duration::ZERO));
}

fn to_v4(address: SocketAddrAny) -> Option<SocketAddrV4> {
    address.try_into().ok()
}
