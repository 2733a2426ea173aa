//! The task that moves a channel's bytes.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::state::{Closed, Shared};

/// Moves bytes until the channel ends, and says why it did.
pub(super) async fn drive(shared: &Shared, socket: UnixStream) -> Closed {
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
