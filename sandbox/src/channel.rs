//! The host's end of the channel: a task that moves bytes, and streams that look like any other to tokio.
//!
//! One lock guards the protocol's state machine and every stream's inbox. It is held for memory copies only, never
//! across I/O or an await. The driver task alone reads and writes the socket; readers and writers wake it when they
//! have queued something.

use std::collections::{HashMap, VecDeque};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use chitin_protocol::{
    Connection, Direction, Event, Exit, Failure, Fault, Host, Start, StreamId, ToGuest, ToHost,
    TooLarge, Unexpected, Usage,
};
use chitin_spec::MAX_HOST;
use chitin_tiers::clock::now_ns;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
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

type Ended = (Exit, Usage);

/// Attempts that wait for the broker, which takes each at once. A guest that sends more between two of its turns floods.
const MAX_DIAL_REQUESTS: usize = 256;

/// What a workload has tried to reach. All of it is the guest's word.
#[derive(Debug)]
pub(crate) enum Dial {
    /// A connection, and the stream that is to be it: see [`Channel::adopt`].
    Connection { host: String, port: u16, stream: StreamId },
    /// A name that the agent has refused.
    Denied { host: String },
}

/// A handle on the channel; clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Channel {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Wakes the driver: there is output to write, or the channel was closed.
    driver: Notify,
    status: watch::Sender<Status>,
}

#[derive(Debug, Clone, Default)]
struct Status {
    ready: bool,
    closed: Option<Closed>,
}

#[derive(Debug)]
struct State {
    connection: Connection<Host>,
    streams: HashMap<StreamId, Stream>,
    processes: HashMap<u32, oneshot::Sender<Ended>>,
    requests: HashMap<u32, oneshot::Sender<Result<(), Failure>>>,
    /// Who is told what the workload tries to reach, if it may reach anything.
    dial_requests: Option<mpsc::Sender<Dial>>,
    /// Attempts that the broker was not told of.
    missed: u64,
    /// The last name given to a process or a request.
    last_name: u32,
    seen: Seen,
    closed: bool,
}

#[derive(Debug, Default)]
struct Stream {
    /// Received and not yet read; bounded by the protocol's window.
    inbox: VecDeque<u8>,
    ended: bool,
    reset: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl Stream {
    fn wake(&mut self) {
        for waker in [self.reader.take(), self.writer.take()].into_iter().flatten() {
            waker.wake();
        }
    }
}

impl Channel {
    /// Takes over a connected socket and starts to drive it. Must be called within a tokio runtime.
    pub fn new(socket: UnixStream) -> Channel {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                connection: Connection::new(),
                streams: HashMap::new(),
                processes: HashMap::new(),
                requests: HashMap::new(),
                dial_requests: None,
                missed: 0,
                last_name: 0,
                seen: Seen::default(),
                closed: false,
            }),
            driver: Notify::new(),
            status: watch::Sender::new(Status::default()),
        });
        let channel = Channel { shared: shared.clone() };
        tokio::spawn(async move {
            let why = drive(&shared, socket).await;
            shared.close(why);
        });
        channel
    }

    /// Waits for the agent's first message.
    pub async fn ready(&self) -> Result<(), Closed> {
        let mut status = self.shared.status.subscribe();
        match status.wait_for(|status| status.ready || status.closed.is_some()).await {
            Ok(status) => match &status.closed {
                Some(why) => Err(why.clone()),
                None => Ok(()),
            },
            Err(_) => Err(Closed::Local),
        }
    }

    /// Why the channel was closed. Waits until it is.
    pub async fn closed(&self) -> Closed {
        let mut status = self.shared.status.subscribe();
        match status.wait_for(|status| status.closed.is_some()).await {
            Ok(status) => status.closed.clone().unwrap_or(Closed::Local),
            Err(_) => Closed::Local,
        }
    }

    /// Ends the channel from this side. Everything that waits on it fails.
    pub fn close(&self) {
        self.shared.close(Closed::Local);
    }

    pub fn seen(&self) -> Seen {
        self.shared.lock().seen
    }

    /// A name for a process or a request, never given before.
    pub fn name(&self) -> u32 {
        let mut state = self.shared.lock();
        state.last_name += 1;
        state.last_name
    }

    /// Opens a stream on which this side sends.
    pub fn open_writer(&self) -> Option<StreamWriter> {
        self.open(Direction::Send).map(|id| StreamWriter { channel: self.clone(), id })
    }

    /// Opens a stream on which this side receives.
    pub fn open_reader(&self) -> Option<StreamReader> {
        self.open(Direction::Receive).map(|id| StreamReader { channel: self.clone(), id })
    }

    /// How many attempts were turned away before the broker heard of them, since this was last asked.
    pub fn missed(&self) -> u64 {
        std::mem::take(&mut self.shared.lock().missed)
    }

    /// Opens a stream both ways.
    pub fn open_tunnel(&self) -> Option<Tunnel> {
        self.open(Direction::Both).map(|id| self.adopt(id))
    }

    /// Takes a stream over that the agent has opened, from a [`Dial`]. To be called once a stream.
    pub fn adopt(&self, id: StreamId) -> Tunnel {
        let reader = StreamReader { channel: self.clone(), id };
        Tunnel { reader, writer: StreamWriter { channel: self.clone(), id } }
    }

    /// What the workload tries to reach, from now on; until then the agent may not report any.
    pub fn dial_requests(&self) -> mpsc::Receiver<Dial> {
        let (sender, receiver) = mpsc::channel(MAX_DIAL_REQUESTS);
        let mut state = self.shared.lock();
        if !state.closed {
            state.dial_requests = Some(sender);
        }
        receiver
    }

    fn open(&self, direction: Direction) -> Option<StreamId> {
        let mut state = self.shared.lock();
        let id = state.connection.open_stream(direction)?;
        state.streams.insert(id, Stream::default());
        Some(id)
    }

    /// Sends `start`; what comes back resolves when the process has ended, or fails when the channel has.
    pub fn start(&self, start: Start) -> Result<oneshot::Receiver<Ended>, TooLarge> {
        let (sender, receiver) = oneshot::channel();
        let process = start.process;
        let mut state = self.shared.lock();
        state.connection.send_message(&ToGuest::Start(start))?;
        if !state.closed {
            state.processes.insert(process, sender);
        }
        drop(state);
        self.shared.driver.notify_one();
        Ok(receiver)
    }

    /// Sends a request; what comes back resolves with the agent's answer.
    pub fn request(
        &self,
        request: u32,
        message: &ToGuest,
    ) -> Result<oneshot::Receiver<Result<(), Failure>>, TooLarge> {
        let (sender, receiver) = oneshot::channel();
        let mut state = self.shared.lock();
        state.connection.send_message(message)?;
        if !state.closed {
            state.requests.insert(request, sender);
        }
        drop(state);
        self.shared.driver.notify_one();
        Ok(receiver)
    }

    /// Sends a signal to a process.
    pub fn signal(&self, process: u32, signal: u8) {
        // A few bytes always fit a frame.
        let sent = self.shared.lock().connection.send_message(&ToGuest::Signal { process, signal });
        debug_assert_eq!(sent, Ok(()));
        self.shared.driver.notify_one();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic under the lock would be a bug in this file; the state machine stays consistent between calls.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self, why: Closed) {
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

/// Moves bytes until the channel ends, and says why it did.
async fn drive(shared: &Shared, socket: UnixStream) -> Closed {
    move_all(shared, socket).await.unwrap_or_else(|error| Closed::Io(error.kind()))
}

async fn move_all(shared: &Shared, socket: UnixStream) -> io::Result<Closed> {
    socket.set_nonblocking(true)?;
    let incoming = watch(socket, Interest::READABLE)?;
    // There only while the socket takes nothing more: otherwise we would be woken each time that the other side has read.
    let mut outgoing = None;
    // A peer that no longer listens may have said why: what it wrote last is read before the channel is given up.
    let mut listens = true;
    loop {
        listens = listens && write_out(shared, incoming.get_ref()).is_ok();
        let blocked = match shared.lock() {
            state if state.closed => return Ok(Closed::Local),
            state => listens && !state.connection.pending_output().is_empty(),
        };
        if !blocked {
            outgoing = None;
        } else if outgoing.is_none() {
            outgoing = Some(watch(incoming.get_ref().try_clone()?, Interest::WRITABLE)?);
        }
        let writable = async {
            match &outgoing {
                Some(outgoing) => outgoing.writable().await.map(|mut ready| ready.clear_ready()),
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            ready = incoming.readable() => {
                let mut ready = ready?;
                match read_in(shared, incoming.get_ref()) {
                    Ok(true) => {}
                    Ok(false) => ready.clear_ready(),
                    Err(why) => return Ok(why),
                }
            }
            ready = writable => ready?,
            () = shared.driver.notified() => {}
        }
    }
}

#[expect(
    deprecated,
    reason = "its successor is unsafe, because of types whose descriptor changes: this one's does not"
)]
fn watch(socket: UnixStream, interest: Interest) -> io::Result<AsyncFd<UnixStream>> {
    AsyncFd::with_interest(socket, interest)
}

fn write_out(shared: &Shared, mut socket: &UnixStream) -> io::Result<()> {
    let mut state = shared.lock();
    let mut wrote = false;
    while !state.connection.pending_output().is_empty() {
        match socket.write(state.connection.pending_output()) {
            Ok(count) => {
                state.connection.consume_output(count);
                wrote = true;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    if wrote {
        // Writers may have been stopped by a full output buffer.
        for stream in state.streams.values_mut() {
            if let Some(waker) = stream.writer.take() {
                waker.wake();
            }
        }
    }
    Ok(())
}

/// Reads once; false when there was no more.
fn read_in(shared: &Shared, mut socket: &UnixStream) -> Result<bool, Closed> {
    let mut state = shared.lock();
    let space = state.connection.input_buffer();
    let room = space.len();
    let count = match socket.read(space) {
        Ok(0) => return Err(Closed::Eof),
        Ok(count) => count,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(true),
        Err(error) => return Err(Closed::Io(error.kind())),
    };
    state.connection.commit_input(count);
    while state.handle_event(shared).map_err(Closed::Fault)? {}
    // That it has ended is an event of its own.
    Ok(count == room)
}

impl State {
    /// Handles one event; false when there is none.
    fn handle_event(&mut self, shared: &Shared) -> Result<bool, Fault> {
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

/// Receives what the sandbox sends on one stream. Dropping it tells the sender to stop (a workload gets `SIGPIPE`).
#[derive(Debug)]
pub struct StreamReader {
    channel: Channel,
    id: StreamId,
}

impl StreamReader {
    pub(crate) fn id(&self) -> StreamId {
        self.id
    }
}

impl AsyncRead for StreamReader {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut state = self.channel.shared.lock();
        let state = &mut *state;
        let Some(stream) = state.streams.get_mut(&self.id) else { return Poll::Ready(Ok(())) };
        if stream.inbox.is_empty() {
            return if stream.ended {
                Poll::Ready(Ok(()))
            } else if stream.reset || state.closed {
                Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()))
            } else {
                stream.reader = Some(cx.waker().clone());
                Poll::Pending
            };
        }
        let mut taken = 0;
        while buf.remaining() > 0 && !stream.inbox.is_empty() {
            let (front, _) = stream.inbox.as_slices();
            let count = front.len().min(buf.remaining());
            buf.put_slice(&front[..count]);
            stream.inbox.drain(..count);
            taken += count;
        }
        state.connection.return_credit(self.id, taken);
        if !state.connection.pending_output().is_empty() {
            self.channel.shared.driver.notify_one();
        }
        Poll::Ready(Ok(()))
    }
}

impl Drop for StreamReader {
    fn drop(&mut self) {
        let mut state = self.channel.shared.lock();
        state.streams.remove(&self.id);
        state.connection.reset_stream(self.id);
        drop(state);
        self.channel.shared.driver.notify_one();
    }
}

/// Sends to the sandbox on one stream. Shutting it down or dropping it is the end of file at the other side.
#[derive(Debug)]
pub struct StreamWriter {
    channel: Channel,
    id: StreamId,
}

impl StreamWriter {
    pub(crate) fn id(&self) -> StreamId {
        self.id
    }

    /// Tells the other side that what was sent is not to be used: an end that is not an end of file.
    pub(crate) fn abort(&self) {
        self.channel.shared.lock().connection.reset_stream(self.id);
        self.channel.shared.driver.notify_one();
    }

    fn end(&self) {
        self.channel.shared.lock().connection.end_stream(self.id);
        self.channel.shared.driver.notify_one();
    }
}

impl AsyncWrite for StreamWriter {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut state = self.channel.shared.lock();
        let state = &mut *state;
        if state.closed || !state.connection.is_sending(self.id) {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let count = state.connection.send_data(self.id, bytes);
        if count == 0 && !bytes.is_empty() {
            if let Some(stream) = state.streams.get_mut(&self.id) {
                stream.writer = Some(cx.waker().clone());
            }
            return Poll::Pending;
        }
        self.channel.shared.driver.notify_one();
        Poll::Ready(Ok(count))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // What was taken is on its way, and the driver never holds it back.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.end();
        Poll::Ready(Ok(()))
    }
}

impl Drop for StreamWriter {
    fn drop(&mut self) {
        self.end();
        self.channel.shared.lock().streams.remove(&self.id);
    }
}

/// A connection with something in the sandbox, or of something in it: bytes both ways. Shutting it down ends this side's
/// half; dropping it before both have ended resets it.
#[derive(Debug)]
pub struct Tunnel {
    // Dropped first: its reset is none if both halves have ended.
    reader: StreamReader,
    writer: StreamWriter,
}

impl Tunnel {
    pub(crate) fn id(&self) -> StreamId {
        self.reader.id
    }
}

impl AsyncRead for Tunnel {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.reader).poll_read(cx, buf)
    }
}

impl AsyncWrite for Tunnel {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.writer).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.writer).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.writer).poll_shutdown(cx)
    }
}

#[cfg(test)]
#[path = "channel_test.rs"]
mod tests;
