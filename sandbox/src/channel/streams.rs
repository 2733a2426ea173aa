//! The streams of a channel, which look like any other to tokio.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use chitin_protocol::StreamId;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::Channel;

/// Receives what the sandbox sends on one stream. Dropping it tells the sender to stop (a workload gets `SIGPIPE`).
#[derive(Debug)]
pub struct StreamReader {
    pub(super) channel: Channel,
    pub(super) id: StreamId,
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
    pub(super) channel: Channel,
    pub(super) id: StreamId,
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
    pub(super) reader: StreamReader,
    pub(super) writer: StreamWriter,
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
