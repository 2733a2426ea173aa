//! The channel's frames, as either side reads them.
#![no_main]

use chitin_fuzz::Choices;
use chitin_protocol::{Connection, Direction, Event, Guest, Host, Role};
use libfuzzer_sys::fuzz_target;

/// Feeds one side, in pieces, and does with each event what the layer above does.
fn drive<R: Role>(data: &[u8]) {
    let mut choices = Choices(data);
    let mut connection = Connection::<R>::new();
    let (piece, habits) = (usize::from(choices.byte()) + 1, choices.byte());
    let first = if R::OPENS_ODD { 2 } else { 1 };
    let mut next = first;
    let mut own = None;
    while !choices.is_empty() {
        let space = connection.space();
        let bytes = choices.bytes(piece.min(space.len()));
        space[..bytes.len()].copy_from_slice(bytes);
        connection.filled(bytes.len());
        loop {
            let mut consumed = None;
            match connection.next_event() {
                Err(_) => return,
                Ok(None) => break,
                Ok(Some(Event::Message(_))) => {
                    // Which streams a message names is the layer above's to know; here it names a new one each time.
                    let direction = [Direction::Send, Direction::Receive, Direction::Both]
                        [usize::from(habits) % 3];
                    if connection.accept(next, direction).is_err() {
                        return;
                    }
                    next += 2;
                    own = connection.open(direction).or(own);
                }
                Ok(Some(Event::Data { stream, bytes })) => consumed = Some((stream, bytes.len())),
                Ok(Some(Event::Established { .. })) => own = connection.open(Direction::Both),
                Ok(Some(_)) => {}
            }
            if let Some((stream, count)) = consumed.filter(|_| habits & 4 != 0) {
                connection.consumed(stream, count);
            }
        }
        if let Some(own) = own {
            let sent = connection.send(own, b"payload");
            assert!(sent <= 7);
            if habits & 8 != 0 {
                connection.end(own);
            }
            if habits & 16 != 0 {
                connection.reset(own);
            }
        }
        if habits & 32 != 0 {
            let count = connection.output().len();
            connection.wrote(count);
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((side, data)) = data.split_first() else { return };
    if side & 1 == 0 { drive::<Host>(data) } else { drive::<Guest>(data) }
});
