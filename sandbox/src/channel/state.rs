//! The state of a channel behind its lock.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::Waker;

use chitin_protocol::{
    Connection, Direction, Event, Exit, Failure, Fault, Host, StreamId, ToHost, Unexpected, Usage,
};
use chitin_spec::MAX_HOST;
use chitin_tiers::clock::now_ns;
use tokio::sync::{Notify, mpsc, oneshot, watch};

/// Why a channel no longer works.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Closed {
    /// The other end is gone.
    Eof,
    /// Reading or writing failed.
    Io(io::ErrorKind),
    /// The agent broke the protocol.
    Fault(Fault),
    /// This side ended it: the sandbox was stopped, or its time was up.
    Local,
}

/// When things happened on the channel, `CLOCK_MONOTONIC` nanoseconds of the host.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Seen {
    /// The agent's first message was read.
    pub ready: Option<u64>,
    /// How long the agent took from its first instruction to that message, nanoseconds.
    pub agent_took: u64,
    /// The first byte of any workload's output was read.
    pub output: Option<u64>,
    /// A workload's end was read, the latest.
    pub exited: Option<u64>,
}

pub(super) type Ended = (Exit, Usage);

/// What a workload has tried to reach. All of it is the guest's word.
#[derive(Debug)]
pub(crate) enum Dial {
    /// A connection, and the stream that is to be it: see [`Channel::adopt`].
    Connection { host: String, port: u16, stream: StreamId },
    /// A name that the agent has refused.
    Denied { host: String },
}

#[derive(Debug)]
pub(super) struct Shared {
    pub state: Mutex<State>,
    /// Wakes the driver: there is output to write, or the channel was closed.
    pub driver: Notify,
    pub status: watch::Sender<Status>,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Status {
    pub ready: bool,
    pub closed: Option<Closed>,
}

#[derive(Debug)]
pub(super) struct State {
    pub connection: Connection<Host>,
    pub streams: HashMap<StreamId, Stream>,
    pub processes: HashMap<u32, oneshot::Sender<Ended>>,
    pub requests: HashMap<u32, oneshot::Sender<Result<(), Failure>>>,
    /// Who is told what the workload tries to reach, if it may reach anything.
    pub dial_requests: Option<mpsc::Sender<Dial>>,
    /// Attempts that the broker was not told of.
    pub missed: u64,
    /// The last name given to a process or a request.
    pub last_name: u32,
    pub seen: Seen,
    pub closed: bool,
}

#[derive(Debug, Default)]
pub(super) struct Stream {
    /// Received and not yet read; bounded by the protocol's window.
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
    pub fn lock(&self) -> MutexGuard<'_, State> {
        // A panic under the lock would be a bug in this file; the state machine stays consistent between calls.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn close(&self, why: Closed) {
        let mut state = self.lock();
        if std::mem::replace(&mut state.closed, true) {
            return;
        }
        // Dropping the senders is what tells those who wait.
        state.processes.clear();
        state.requests.clear();
        state.dial_requests = None;
        state.streams.values_mut().for_each(Stream::wake);
        drop(state);
        self.status.send_modify(|status| status.closed = Some(why));
        self.driver.notify_one();
    }
}

impl State {
    /// Handles one event; false when there is none.
    pub fn handle_event(&mut self, shared: &Shared) -> Result<bool, Fault> {
        match self.connection.next_event()? {
            None => return Ok(false),
            Some(Event::Established { .. }) => {}
            Some(Event::Message(message)) => self.handle_message(message, shared)?,
            Some(Event::Data { stream, bytes }) => {
                // The host's own streams are even: what a workload sends elsewhere is not its output.
                if stream % 2 == 0 {
                    self.seen.output.get_or_insert_with(now_ns);
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
                if self.seen.ready.is_some() {
                    return Err(Fault::Unexpected(Unexpected::DuplicateReady));
                }
                self.seen.ready = Some(now_ns());
                self.seen.agent_took = ready_ns.saturating_sub(started_ns);
                shared.status.send_modify(|status| status.ready = true);
            }
            ToHost::Exited { process, exit, usage } => {
                let Some(sender) = self.processes.remove(&process) else {
                    return Err(Fault::Unexpected(Unexpected::UnknownProcess(process)));
                };
                self.seen.exited = Some(now_ns());
                // Whoever started it may have stopped caring.
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
                if !self.report_dial(Dial::Connection { host: bounded(host), port, stream })? {
                    self.streams.remove(&stream);
                    self.connection.reset_stream(stream);
                }
            }
            ToHost::Denied { host } => {
                self.report_dial(Dial::Denied { host: bounded(host) })?;
            }
        }
        Ok(())
    }

    /// Tells the broker. `false`: it has too much to do already.
    fn report_dial(&mut self, dial: Dial) -> Result<bool, Fault> {
        let Some(dial_requests) = &self.dial_requests else {
            return Err(Fault::Unexpected(Unexpected::EgressNotEnabled));
        };
        let told = dial_requests.try_send(dial).is_ok();
        self.missed += u64::from(!told);
        Ok(told)
    }
}

/// What waits is bounded also in length. A name that is cut is still too long to be one.
fn bounded(host: String) -> String {
    if host.len() > MAX_HOST { host.chars().take(MAX_HOST + 1).collect() } else { host }
}
