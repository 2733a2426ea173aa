//! The host's end of the channel: a task that moves bytes, and streams that look like any other to tokio.
//!
//! One lock guards the protocol's state machine and every stream's inbox. It is held for memory copies only, never
//! across I/O or an await. The driver task alone reads and writes the socket; readers and writers wake it when they
//! have queued something.

mod driver;
mod state;
mod streams;

use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use chitin_protocol::{Connection, Direction, Failure, Start, StreamId, ToGuest, TooLarge};
use tokio::sync::{Notify, mpsc, oneshot, watch};

use driver::drive;
pub(crate) use state::{Closed, Dial, Seen};
use state::{Ended, Shared, State, Status, Stream};
pub use streams::{StreamReader, StreamWriter, Tunnel};

/// Attempts that wait for the broker, which takes each at once. A guest that sends more between two of its turns floods.
const MAX_DIAL_REQUESTS: usize = 256;

/// A handle on the channel; clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Channel {
    shared: Arc<Shared>,
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

#[cfg(test)]
#[path = "channel_test.rs"]
mod tests;
