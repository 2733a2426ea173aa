//! The streams of a channel as tokio's readers and writers.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use chitin_protocol::StreamId;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::task::coop::poll_proceed;

use super::state::Shared;

/// Receives bytes that the sandbox sends on one stream. Dropping it makes the sender stop: a
/// workload gets `SIGPIPE`.
#[derive(Debug)]
pub struct StreamReader {
    shared: Arc<Shared>,
    id: StreamId,
}

impl StreamReader {
    pub(super) fn new(shared: Arc<Shared>, id: StreamId) -> StreamReader {
        StreamReader { shared, id }
    }

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
        // A guest that sends as fast as it is read must not keep the reading task from returning.
        let budget = ready!(poll_proceed(cx));
        let mut state = self.shared.lock();
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
        budget.made_progress();
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
            self.shared.driver.notify_one();
        }
        Poll::Ready(Ok(()))
    }
}

impl Drop for StreamReader {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.streams.remove(&self.id);
        state.connection.reset_stream(self.id);
        drop(state);
        self.shared.driver.notify_one();
    }
}

/// Sends bytes to the sandbox on one stream. Shutting it down or dropping it is the end of file at
/// the other side.
#[derive(Debug)]
pub struct StreamWriter {
    shared: Arc<Shared>,
    id: StreamId,
}

impl StreamWriter {
    pub(super) fn new(shared: Arc<Shared>, id: StreamId) -> StreamWriter {
        StreamWriter { shared, id }
    }

    pub(crate) fn id(&self) -> StreamId {
        self.id
    }

    /// Resets the stream, so that the other side discards it instead of seeing an end of file.
    pub(crate) fn reset(&self) {
        self.shared.lock().connection.reset_stream(self.id);
        self.shared.driver.notify_one();
    }

    fn end_stream(&self) {
        self.shared.lock().connection.end_stream(self.id);
        self.shared.driver.notify_one();
    }
}

impl AsyncWrite for StreamWriter {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let budget = ready!(poll_proceed(cx));
        let mut state = self.shared.lock();
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
        budget.made_progress();
        self.shared.driver.notify_one();
        Poll::Ready(Ok(count))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Accepted bytes are on their way: the driver never holds them back.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.end_stream();
        Poll::Ready(Ok(()))
    }
}

impl Drop for StreamWriter {
    fn drop(&mut self) {
        self.end_stream();
        self.shared.lock().streams.remove(&self.id);
    }
}

/// A connection to or from the sandbox, with bytes in both directions. Shutting it down ends this
/// side's half; dropping it before both halves have ended resets it.
#[derive(Debug)]
pub struct Tunnel {
    // Dropped first: its reset has no effect if both halves have ended.
    reader: StreamReader,
    writer: StreamWriter,
}

impl Tunnel {
    pub(super) fn new(shared: Arc<Shared>, id: StreamId) -> Tunnel {
        Tunnel {
            reader: StreamReader::new(shared.clone(), id),
            writer: StreamWriter::new(shared, id),
        }
    }

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
