//! The state of a channel, and the lock that guards it.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;

use chitin_protocol::{
    Connection, Direction, Event, Exit, Failure, Fault, Host, StreamId, ToHost, Unexpected, Usage,
};
use chitin_spec::MAX_HOST;
use chitin_tiers::clock::monotonic_ns;
use tokio::sync::{Notify, mpsc, oneshot, watch};

use crate::deadline::Expire;

/// The reason why a channel no longer works.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum CloseReason {
    /// The other end is closed.
    Eof,
    /// Reading or writing failed.
    Io(io::ErrorKind),
    /// The agent broke the protocol.
    Fault(Fault),
    /// This side closed it: the sandbox was stopped, or its time limit was reached.
    Local,
}

/// The times of events on the channel, `CLOCK_MONOTONIC` nanoseconds of the host.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Timestamps {
    /// The agent's first message was read.
    pub ready: Option<u64>,
    /// The agent's own measure of the time from its first instruction to that message, in
    /// nanoseconds.
    pub agent_start_ns: u64,
    /// The first byte of any workload's output was read.
    pub first_output: Option<u64>,
    /// The end of a workload was read, the latest one.
    pub last_exit: Option<u64>,
}

/// The exit of a process and the resources that it used.
pub(super) type ProcessEnd = (Exit, Usage);

/// A connection request of the workload. All of it is untrusted.
#[derive(Debug)]
pub(crate) enum GuestDial {
    /// A connection, and its stream: see [`Channel::adopt_stream`](super::Channel::adopt_stream).
    Connection { host: String, port: u16, stream: StreamId },
    /// A name that the agent has refused.
    Denied { host: String },
}

/// The part of a channel that its handle, its streams and its driver share.
#[derive(Debug)]
pub(super) struct Shared {
    state: Mutex<State>,
    pub socket: Arc<UnixStream>,
    /// Wakes the driver: there is output to write, or the channel was closed.
    pub driver: Notify,
    pub status: watch::Sender<Status>,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Status {
    pub ready: bool,
    pub closed: Option<CloseReason>,
}

#[derive(Debug)]
pub(super) struct State {
    pub connection: Connection<Host>,
    pub streams: HashMap<StreamId, Stream>,
    pub processes: HashMap<u32, oneshot::Sender<ProcessEnd>>,
    pub requests: HashMap<u32, oneshot::Sender<Result<(), Failure>>>,
    /// Receives the workload's connection requests, if egress is enabled.
    pub dial_requests: Option<mpsc::Sender<GuestDial>>,
    /// Requests that were dropped because too many waited.
    pub dropped_dials: u64,
    /// The last id given to a process or a request.
    pub last_id: u32,
    pub timestamps: Timestamps,
    pub closed: bool,
}

#[derive(Debug, Default)]
pub(super) struct Stream {
    /// Bytes received and not yet read; bounded by the protocol's window.
    pub inbox: VecDeque<u8>,
    pub ended: bool,
    pub reset: bool,
    pub reader: Option<Waker>,
    pub writer: Option<Waker>,
}

impl Stream {
    fn wake(&mut self) {
        for waker in [self.reader.take(), self.writer.take()].into_iter().flatten() {
            waker.wake();
        }
    }
}

impl Shared {
    pub fn new(socket: UnixStream) -> Shared {
        Shared {
            socket: Arc::new(socket),
            state: Mutex::new(State {
                connection: Connection::new(),
                streams: HashMap::new(),
                processes: HashMap::new(),
                requests: HashMap::new(),
                dial_requests: None,
                dropped_dials: 0,
                last_id: 0,
                timestamps: Timestamps::default(),
                closed: false,
            }),
            driver: Notify::new(),
            status: watch::Sender::new(Status::default()),
        }
    }

    pub fn lock(&self) -> MutexGuard<'_, State> {
        // A panic under the lock would be a bug of this module; the state machine stays consistent
        // between calls.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes the channel, unless it is closed already, and wakes everything that waits on it.
    pub fn close(&self, reason: CloseReason) {
        let mut state = self.lock();
        if std::mem::replace(&mut state.closed, true) {
            return;
        }
        // Dropping the senders fails their receivers.
        state.processes.clear();
        state.requests.clear();
        state.dial_requests = None;
        state.streams.values_mut().for_each(Stream::wake);
        drop(state);
        self.status.send_modify(|status| status.closed = Some(reason));
        self.driver.notify_one();
    }
}

impl Expire for Shared {
    fn expire(&self) {
        // First, because it takes no lock: a guest that keeps the lock busy is cut off by it.
        let _ = self.socket.shutdown(Shutdown::Both);
        self.close(CloseReason::Local);
    }
}

impl State {
    /// Handles one event. Returns false if there is none.
    pub fn handle_event(&mut self, shared: &Shared) -> Result<bool, Fault> {
        match self.connection.next_event()? {
            None => return Ok(false),
            Some(Event::Established { .. }) => {}
            Some(Event::Message(message)) => self.handle_message(message, shared)?,
            Some(Event::Data { stream, bytes }) => {
                // Streams that the host opened have even ids: only those carry a workload's output.
                if stream % 2 == 0 {
                    self.timestamps.first_output.get_or_insert_with(monotonic_ns);
                }
                if let Some(stream) = self.streams.get_mut(&stream) {
                    stream.inbox.extend(bytes);
                    stream.wake();
                }
            }
            Some(Event::End { stream }) => {
                if let Some(stream) = self.streams.get_mut(&stream) {
                    stream.ended = true;
                    stream.wake();
                }
            }
            Some(Event::Reset { stream }) => {
                if let Some(stream) = self.streams.get_mut(&stream) {
                    stream.reset = true;
                    stream.wake();
                }
            }
            Some(Event::Credit { stream }) => {
                if let Some(stream) = self.streams.get_mut(&stream) {
                    stream.wake();
                }
            }
        }
        Ok(true)
    }

    fn handle_message(&mut self, message: ToHost, shared: &Shared) -> Result<(), Fault> {
        match message {
            ToHost::Ready { started_ns, ready_ns } => {
                if self.timestamps.ready.is_some() {
                    return Err(Fault::Unexpected(Unexpected::DuplicateReady));
                }
                self.timestamps.ready = Some(monotonic_ns());
                self.timestamps.agent_start_ns = ready_ns.saturating_sub(started_ns);
                shared.status.send_modify(|status| status.ready = true);
            }
            ToHost::Exited { process, exit, usage } => {
                let Some(sender) = self.processes.remove(&process) else {
                    return Err(Fault::Unexpected(Unexpected::UnknownProcess(process)));
                };
                self.timestamps.last_exit = Some(monotonic_ns());
                // The caller may have dropped the process.
                let _ = sender.send((exit, usage));
            }
            ToHost::Done { request, result } => {
                let Some(sender) = self.requests.remove(&request) else {
                    return Err(Fault::Unexpected(Unexpected::UnknownRequest(request)));
                };
                let _ = sender.send(result);
            }
            ToHost::Dial { host, port, stream } => {
                self.connection.accept_stream(stream, Direction::Both)?;
                self.streams.insert(stream, Stream::default());
                let host = truncate_host(host);
                if !self.queue_dial(GuestDial::Connection { host, port, stream })? {
                    self.streams.remove(&stream);
                    self.connection.reset_stream(stream);
                }
            }
            ToHost::Denied { host } => {
                self.queue_dial(GuestDial::Denied { host: truncate_host(host) })?;
            }
        }
        Ok(())
    }

    /// Queues a request for the broker. Returns false if too many wait already.
    fn queue_dial(&mut self, dial: GuestDial) -> Result<bool, Fault> {
        let Some(dial_requests) = &self.dial_requests else {
            return Err(Fault::Unexpected(Unexpected::EgressNotEnabled));
        };
        let queued = dial_requests.try_send(dial).is_ok();
        self.dropped_dials += u64::from(!queued);
        Ok(queued)
    }
}

/// Bounds the memory of a waiting request. A truncated name is still too long to be valid.
fn truncate_host(host: String) -> String {
    if host.len() > MAX_HOST { host.chars().take(MAX_HOST + 1).collect() } else { host }
}
