//! The host's end of the channel: a task that moves bytes, and streams for tokio.
//!
//! One lock guards the protocol's state machine and every stream's inbox. It is held for memory
//! copies only, never across I/O or an await. The driver task alone reads and writes the socket;
//! readers and writers wake it when they have queued something.

mod driver;
mod frame_rate;
mod state;
mod streams;

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use chitin_protocol::{Direction, Failure, Start, StreamId, ToGuest, TooLarge};
use tokio::sync::{mpsc, oneshot};

use crate::deadline::{self, DeadlineGuard, Expire};
use driver::drive_channel;
pub(crate) use state::{CloseReason, GuestDial, Timestamps};
use state::{ProcessEnd, Shared, Stream};
pub use streams::{StreamReader, StreamWriter, Tunnel};

/// Requests that wait for the broker, which takes each at once. A guest that sends more between two
/// of its turns floods.
const MAX_DIAL_REQUESTS: usize = 256;

/// A handle on the channel; clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Channel {
    shared: Arc<Shared>,
}

impl Channel {
    /// Takes over a connected socket and starts to drive it. Must be called within a tokio runtime.
    pub fn new(socket: UnixStream) -> Channel {
        let shared = Arc::new(Shared::new(socket));
        let channel = Channel { shared: shared.clone() };
        tokio::spawn(async move {
            let reason = drive_channel(&shared).await;
            shared.close(reason);
        });
        channel
    }

    /// Waits for the agent's first message.
    pub async fn wait_until_ready(&self) -> Result<(), CloseReason> {
        let mut status = self.shared.status.subscribe();
        match status.wait_for(|status| status.ready || status.closed.is_some()).await {
            Ok(status) => match &status.closed {
                Some(reason) => Err(reason.clone()),
                None => Ok(()),
            },
            Err(_) => Err(CloseReason::Local),
        }
    }

    /// Waits until the channel is closed, and returns the reason.
    pub async fn wait_until_closed(&self) -> CloseReason {
        let mut status = self.shared.status.subscribe();
        match status.wait_for(|status| status.closed.is_some()).await {
            Ok(status) => status.closed.clone().unwrap_or(CloseReason::Local),
            Err(_) => CloseReason::Local,
        }
    }

    /// Closes the channel from this side. Everything that waits on it fails.
    pub fn close(&self) {
        self.shared.close(CloseReason::Local);
    }

    /// Closes the channel at this time, whatever the async runtime does meanwhile, unless the guard
    /// is dropped first.
    pub fn close_at(&self, at: Instant) -> DeadlineGuard {
        let shared: Arc<dyn Expire> = self.shared.clone();
        deadline::watch(at, &shared)
    }

    pub fn timestamps(&self) -> Timestamps {
        self.shared.lock().timestamps
    }

    /// Returns an id for a process or a request that was never used before.
    pub fn next_id(&self) -> u32 {
        let mut state = self.shared.lock();
        state.last_id += 1;
        state.last_id
    }

    /// Opens a stream on which this side sends. Returns `None` if too many are open.
    pub fn open_writer(&self) -> Option<StreamWriter> {
        let id = self.open_stream(Direction::Send)?;
        Some(StreamWriter::new(self.shared.clone(), id))
    }

    /// Opens a stream on which this side receives. Returns `None` if too many are open.
    pub fn open_reader(&self) -> Option<StreamReader> {
        let id = self.open_stream(Direction::Receive)?;
        Some(StreamReader::new(self.shared.clone(), id))
    }

    /// Opens a stream in both directions. Returns `None` if too many are open.
    pub fn open_tunnel(&self) -> Option<Tunnel> {
        self.open_stream(Direction::Both).map(|id| self.adopt_stream(id))
    }

    /// Takes over a stream that the agent has opened, from a [`GuestDial`]. Must be called once a
    /// stream.
    pub fn adopt_stream(&self, id: StreamId) -> Tunnel {
        Tunnel::new(self.shared.clone(), id)
    }

    fn open_stream(&self, direction: Direction) -> Option<StreamId> {
        let mut state = self.shared.lock();
        let id = state.connection.open_stream(direction)?;
        state.streams.insert(id, Stream::default());
        Some(id)
    }

    /// Returns the workload's connection requests from now on. Until this is called, a request is a
    /// breach of the protocol.
    pub fn dial_requests(&self) -> mpsc::Receiver<GuestDial> {
        let (sender, receiver) = mpsc::channel(MAX_DIAL_REQUESTS);
        let mut state = self.shared.lock();
        if !state.closed {
            state.dial_requests = Some(sender);
        }
        receiver
    }

    /// Returns the number of requests that were dropped before the broker saw them, since the last
    /// call.
    pub fn take_dropped_dials(&self) -> u64 {
        std::mem::take(&mut self.shared.lock().dropped_dials)
    }

    /// Sends `start`. The receiver resolves when the process has ended, and fails when the channel
    /// is closed.
    pub fn start_process(&self, start: Start) -> Result<oneshot::Receiver<ProcessEnd>, TooLarge> {
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

    /// Sends a request. The receiver resolves with the agent's reply, and fails when the channel is
    /// closed.
    pub fn send_request(
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
    pub fn send_signal(&self, process: u32, signal: u8) {
        // A few bytes always fit a frame.
        let sent = self.shared.lock().connection.send_message(&ToGuest::Signal { process, signal });
        debug_assert_eq!(sent, Ok(()));
        self.shared.driver.notify_one();
    }
}

#[cfg(test)]
#[path = "channel_test.rs"]
mod tests;
