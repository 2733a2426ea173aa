//! The task that moves a channel's bytes between its socket and its state.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::frame_rate::FrameRate;
use super::state::{CloseReason, Shared};

/// Moves bytes until the channel ends, and returns the reason.
pub(super) async fn drive_channel(shared: &Shared) -> CloseReason {
    move_bytes(shared).await.unwrap_or_else(|error| CloseReason::Io(error.kind()))
}

async fn move_bytes(shared: &Shared) -> io::Result<CloseReason> {
    let socket = &*shared.socket;
    socket.set_nonblocking(true)?;
    let incoming = register_socket(shared.socket.clone(), Interest::READABLE)?;
    // Registered only while the socket is full: otherwise the task would be woken each time that
    // the other side has read.
    let mut outgoing = None;
    // A peer that has stopped reading may have reported why: its last bytes are read before the
    // channel is given up.
    let mut peer_reads = true;
    let mut rate = FrameRate::new(Instant::now());
    let mut paused_until = None;
    loop {
        peer_reads = peer_reads && write_output(shared, socket).is_ok();
        let blocked = match shared.lock() {
            state if state.closed => return Ok(CloseReason::Local),
            state => peer_reads && !state.connection.pending_output().is_empty(),
        };
        if !blocked {
            outgoing = None;
        } else if outgoing.is_none() {
            outgoing = Some(register_socket(Arc::new(socket.try_clone()?), Interest::WRITABLE)?);
        }
        let writable = async {
            match &outgoing {
                Some(outgoing) => outgoing.writable().await.map(|mut ready| ready.clear_ready()),
                None => std::future::pending().await,
            }
        };
        let pause = async {
            match paused_until {
                Some(until) => tokio::time::sleep_until(until).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            ready = incoming.readable(), if paused_until.is_none() => {
                let mut ready = ready?;
                let input = match read_input(shared, socket) {
                    Ok(input) => input,
                    Err(reason) => return Ok(reason),
                };
                let now = Instant::now();
                paused_until = rate.charge(input.frames, now).map(|wait| (now + wait).into());
                if input.more {
                    // A peer that fills the socket as fast as it is read would keep this task from
                    // ever returning to the runtime: timers and other sandboxes have their turn.
                    tokio::task::yield_now().await;
                } else {
                    ready.clear_ready();
                }
            }
            () = pause => paused_until = None,
            ready = writable => ready?,
            () = shared.driver.notified() => {}
        }
    }
}

#[expect(
    deprecated,
    reason = "the successor is unsafe, as a descriptor may change, which this type's cannot"
)]
fn register_socket(
    socket: Arc<UnixStream>,
    interest: Interest,
) -> io::Result<AsyncFd<Arc<UnixStream>>> {
    AsyncFd::with_interest(socket, interest)
}

/// Writes queued output until there is none or the socket is full.
fn write_output(shared: &Shared, mut socket: &UnixStream) -> io::Result<()> {
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

/// The result of one read.
struct Input {
    /// The frames that the peer has sent so far.
    frames: u64,
    /// The socket may have more.
    more: bool,
}

/// Reads once and handles the events.
fn read_input(shared: &Shared, mut socket: &UnixStream) -> Result<Input, CloseReason> {
    let mut state = shared.lock();
    let space = state.connection.input_buffer();
    let room = space.len();
    let more = match socket.read(space) {
        Ok(0) => return Err(CloseReason::Eof),
        Ok(count) => {
            state.connection.commit_input(count);
            while state.handle_event(shared).map_err(CloseReason::Fault)? {}
            // A short read means that the socket is empty. The end of file is reported as a
            // separate event.
            count == room
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
        Err(error) if error.kind() == io::ErrorKind::Interrupted => true,
        Err(error) => return Err(CloseReason::Io(error.kind())),
    };
    Ok(Input { frames: state.connection.frames_received(), more })
}
