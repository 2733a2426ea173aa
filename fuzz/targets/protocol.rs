//! The frames of the channel, read by either side.
#![no_main]

use chitin_fuzz::Choices;
use chitin_protocol::{Connection, Direction, Event, Guest, Host, Role};
use libfuzzer_sys::fuzz_target;

/// Feeds one side in pieces, and handles each event as the layer above does.
fn drive<R: Role>(data: &[u8]) {
    let mut choices = Choices(data);
    let mut connection = Connection::<R>::new();
    let (piece, habits) = (usize::from(choices.take_u8()) + 1, choices.take_u8());
    let first = if R::OPENS_ODD { 2 } else { 1 };
    let mut next = first;
    let mut own = None;
    while !choices.is_empty() {
        let space = connection.input_buffer();
        let bytes = choices.take_bytes(piece.min(space.len()));
        space[..bytes.len()].copy_from_slice(bytes);
        connection.commit_input(bytes.len());
        loop {
            let mut consumed = None;
            match connection.next_event() {
                Err(_) => return,
                Ok(None) => break,
                Ok(Some(Event::Message(_))) => {
                    // Only the layer above knows the streams of a message. Here, each names a new
                    // one.
                    let direction = [Direction::Send, Direction::Receive, Direction::Both]
                        [usize::from(habits) % 3];
                    if connection.accept_stream(next, direction).is_err() {
                        return;
                    }
                    next += 2;
                    own = connection.open_stream(direction).or(own);
                }
                Ok(Some(Event::Data { stream, bytes })) => consumed = Some((stream, bytes.len())),
                Ok(Some(Event::Established { .. })) => {
                    own = connection.open_stream(Direction::Both)
                }
                Ok(Some(_)) => {}
            }
            if let Some((stream, count)) = consumed.filter(|_| habits & 4 != 0) {
                connection.return_credit(stream, count);
            }
        }
        if let Some(own) = own {
            let sent = connection.send_data(own, b"payload");
            assert!(sent <= 7);
            if habits & 8 != 0 {
                connection.end_stream(own);
            }
            if habits & 16 != 0 {
                connection.reset_stream(own);
            }
        }
        if habits & 32 != 0 {
            let count = connection.pending_output().len();
            connection.consume_output(count);
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((side, data)) = data.split_first() else { return };
    if side & 1 == 0 { drive::<Host>(data) } else { drive::<Guest>(data) }
});
