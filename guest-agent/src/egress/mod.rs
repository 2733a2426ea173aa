//! Egress without a network, the sandbox's half: names are loopback addresses, and a connection to
//! one is passed to the host as a stream.
//!
//! ```text
//!   getaddrinfo ──▶ 127.0.0.53:53 ──▶ allowed?  127.64.x.y  /  NXDOMAIN, reported to the host
//!   connect ──▶ 127.64.x.y:port ──▶ accepted on 0.0.0.0:port; local address = name ──▶ Dial
//! ```
//!
//! None of this is a security boundary: a workload is kept from other hosts by the absence of a
//! route and by the broker, which checks each dial again. All that a workload can do to this code
//! is lose its own connections. Sockets are watched edge-triggered, as those of pumps are.

pub mod dns;
mod listeners;
mod names;

use chitin_protocol::{Direction, Endpoint, Failure, MAX_ENDPOINTS, ToHost};
use rustix::io::Errno;

use crate::error::make_failure;
use crate::io::poll::{Poll, Token};
use crate::io::socket_pump::SocketPump;
use crate::io::transport::Transport;
use crate::{log_line, loopback};
use dns::message::Lookup;
use dns::server::DnsServer;
use listeners::{DialRequest, Listeners};
use names::NameTable;

pub use listeners::connect_to_port;

/// Bytes of unsent output above which no connection is accepted: a workload may connect as fast as
/// it can, and a host that does not read must not be sent more and more.
const DIAL_BACKLOG: usize = 64 * 1024;

/// Connections and questions that are taken in one turn of the event loop, so that a flood of them
/// leaves time for other work.
const BATCH: usize = 16;

/// The resolver and the listeners, once the host has opened egress.
#[derive(Default)]
pub struct Egress {
    open: Option<OpenEgress>,
    /// Lives as long as the sandbox: see [`NameTable`].
    names: NameTable,
}

struct OpenEgress {
    listeners: Listeners,
    dns: DnsServer,
}

impl Egress {
    /// Starts to listen. After a failure nothing listens.
    pub fn open(&mut self, poll: &Poll, endpoints: Vec<Endpoint>) -> Result<(), Failure> {
        let opened = self.try_open(poll, endpoints);
        if opened.is_err() {
            self.close();
        }
        opened
    }

    fn try_open(&mut self, poll: &Poll, endpoints: Vec<Endpoint>) -> Result<(), Failure> {
        let refused = |operation, errno| Err(make_failure(operation, b"", errno));
        if self.open.is_some() {
            return refused("open egress twice", Errno::ALREADY);
        }
        if endpoints.len() > MAX_ENDPOINTS {
            return refused("allow more than 256 endpoints", Errno::TOOBIG);
        }
        // A container's runtime has done this, and may deny it to the agent: then the next steps
        // work anyway, or report their own failure.
        let _ = loopback::raise_interface();
        self.names.allow(endpoints);
        let dns = DnsServer::open(poll)?;
        let listeners = Listeners::open(poll, self.names.ports())?;
        self.open = Some(OpenEgress { listeners, dns });
        Ok(())
    }

    /// Stops listening. Names keep their addresses, because programs remember those.
    pub fn close(&mut self) {
        self.open = None;
        self.names.allow(Vec::new());
    }

    /// Records an event.
    pub fn wake(&mut self, token: Token) {
        let Some(open) = &mut self.open else { return };
        match token {
            Token::Port(port) => open.listeners.wake(port),
            _ => open.dns.wake(token),
        }
    }

    /// Answers questions for names, and passes new connections to the host, as many as there may
    /// be. Returns whether anything moved, or can move in the next turn.
    pub fn serve(&mut self, transport: &mut Transport) -> bool {
        let mut moved = self.answer_questions(transport);
        while transport.connection.can_open_stream()
            && transport.connection.pending_output().len() < DIAL_BACKLOG
            && let Some(dial) = self.accept_connection()
        {
            moved = true;
            pass_to_host(dial, transport);
        }
        moved
            || (transport.connection.can_open_stream()
                && self.open.as_ref().is_some_and(|open| open.listeners.may_accept())
                && transport.connection.pending_output().is_empty())
    }

    /// Answers questions, and reports names that were denied. Returns whether any were answered.
    fn answer_questions(&mut self, transport: &mut Transport) -> bool {
        let Some(open) = &mut self.open else { return false };
        let mut denied = Vec::new();
        let names = &mut self.names;
        let mut look_up = |name: &str| {
            let found = names.look_up(name);
            if found == Lookup::NoSuchName && names.record_denied(name) {
                denied.push(ToHost::Denied { host: name.to_owned() });
            }
            found
        };
        let moved = open.dns.answer(&transport.poll, &mut transport.buffers.scratch, &mut look_up);
        for message in denied {
            transport.send(&message);
        }
        moved
    }

    fn accept_connection(&mut self) -> Option<DialRequest> {
        let names = &self.names;
        self.open.as_mut()?.listeners.accept(|address, port| names.find_host(address, port))
    }
}

/// Opens a stream for an accepted connection. A connection that fails here is dropped, and the
/// workload notices.
fn pass_to_host(dial: DialRequest, transport: &mut Transport) {
    let DialRequest { socket, host, port } = dial;
    if let Ok(pump) = SocketPump::new(socket)
        && let Some(stream) = transport.connection.open_stream(Direction::Both)
    {
        transport.send(&ToHost::Dial { host, port, stream });
        if let Err(errno) = transport.pump_socket(stream, pump) {
            log_line(format_args!("cannot watch a connection: {errno}"));
            transport.connection.reset_stream(stream);
        }
    }
}
