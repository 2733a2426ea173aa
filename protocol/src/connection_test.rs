use super::*;
use crate::{Delivery, MAX_CONTROL, Secret, SecretBytes};

/// Moves all pending output of `from` to `to`.
fn carry<A: Role, B: Role>(from: &mut Connection<A>, to: &mut Connection<B>) {
    while !from.pending_output().is_empty() {
        let space = to.input_buffer();
        let count = space.len().min(from.pending_output().len());
        space[..count].copy_from_slice(&from.pending_output()[..count]);
        to.commit_input(count);
        from.consume_output(count);
    }
}

fn feed<R: Role>(connection: &mut Connection<R>, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        let space = connection.input_buffer();
        let count = space.len().min(bytes.len());
        space[..count].copy_from_slice(&bytes[..count]);
        connection.commit_input(count);
        bytes = &bytes[count..];
    }
}

fn established() -> (Connection<Host>, Connection<Guest>) {
    let (mut host, mut guest) = (Connection::<Host>::new(), Connection::<Guest>::new());
    carry(&mut host, &mut guest);
    carry(&mut guest, &mut host);
    assert_eq!(host.next_event(), Ok(Some(Event::Established { version: VERSION })));
    assert_eq!(guest.next_event(), Ok(Some(Event::Established { version: VERSION })));
    (host, guest)
}

fn raw(kind: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (u32::try_from(payload.len()).unwrap() << 8).to_le_bytes().to_vec();
    bytes[0] = kind;
    bytes.extend(stream.to_le_bytes());
    bytes.extend(payload);
    bytes
}

fn hello(version: u32) -> Vec<u8> {
    raw(1, 0, &[MAGIC.as_slice(), &version.to_le_bytes()].concat())
}

#[test]
fn input_buffer_is_never_empty_and_starts_small() {
    let (_, mut guest) = established();
    assert_eq!(guest.input_buffer().len(), SMALL_INPUT);
    // Short frames arrive, and no event is requested.
    let signal = raw(3, 0, &[0; 3]);
    for _ in 0..2 * MAX_DATA_FRAME / signal.len() {
        let space = guest.input_buffer();
        let count = signal.len().min(space.len());
        assert!(count > 0);
        space[..count].copy_from_slice(&signal[..count]);
        guest.commit_input(count);
        if guest.received >= MAX_DATA_FRAME {
            return;
        }
    }
    panic!("{} bytes of room", guest.input.len());
}

#[test]
fn lower_version_is_used_and_version_0_is_fault() {
    for (theirs, outcome) in [
        (1, Ok(1)),
        (1 << 31, Ok(VERSION)),
        (u32::MAX, Ok(VERSION)),
        (0, Err(Fault::UnsupportedVersion { theirs: 0, ours: VERSION })),
    ] {
        let mut host = Connection::<Host>::new();
        feed(&mut host, &hello(theirs));
        let event = host.next_event();
        assert_eq!(event, outcome.map(|version| Some(Event::Established { version })));
    }
}

#[test]
fn hello_is_first_frame_and_sent_once() {
    let mut host = Connection::<Host>::new();
    feed(&mut host, b"GET / HTTP/1.1\r\n");
    assert_eq!(host.next_event(), Err(Fault::MissingHello { kind: b'G' }));

    let mut host = Connection::<Host>::new();
    feed(&mut host, &raw(1, 0, b"SSH-2.0-"));
    assert_eq!(host.next_event(), Err(Fault::InvalidHello));

    let (mut host, _) = established();
    feed(&mut host, &hello(1));
    assert_eq!(host.next_event(), Err(Fault::DuplicateHello));
}

#[test]
fn fragmented_frames_arrive_in_order() {
    let (mut host, mut guest) = established();
    let stream = host.open_stream(Direction::Send).unwrap();
    let put = ToGuest::Put { request: 7, path: b"/work/a".to_vec(), stream };
    host.send_message(&put).unwrap();
    assert_eq!(host.send_data(stream, b"one"), 3);
    host.end_stream(stream);
    let wire = host.pending_output().to_vec();
    host.consume_output(wire.len());

    let mut seen = Vec::new();
    for byte in wire {
        feed(&mut guest, &[byte]);
        let accept = match guest.next_event().unwrap() {
            Some(Event::Message(message)) => {
                assert_eq!(message, put);
                seen.push("put");
                true
            }
            Some(Event::Data { bytes, .. }) => {
                assert_eq!(bytes, b"one");
                seen.push("data");
                false
            }
            Some(Event::End { .. }) => {
                seen.push("end");
                false
            }
            Some(other) => panic!("{other:?}"),
            None => false,
        };
        if accept {
            guest.accept_stream(stream, Direction::Receive).unwrap();
        }
    }
    assert_eq!(seen, ["put", "data", "end"]);
    assert!(host.streams.is_empty() && guest.streams.is_empty());
}

#[test]
fn sender_blocks_at_window_until_credit() {
    let (mut host, mut guest) = established();
    let stream = host.open_stream(Direction::Send).unwrap();
    guest.accept_stream(stream, Direction::Receive).unwrap();
    let block = vec![7; MAX_DATA];
    let (mut sent, mut received) = (0, 0);
    loop {
        let taken = host.send_data(stream, &block);
        sent += taken;
        carry(&mut host, &mut guest);
        while let Some(event) = guest.next_event().unwrap() {
            let Event::Data { bytes, .. } = event else { panic!("{event:?}") };
            received += bytes.len();
        }
        if taken == 0 {
            break;
        }
    }
    assert_eq!((sent, received), (WINDOW as usize, WINDOW as usize));

    guest.return_credit(stream, received);
    carry(&mut guest, &mut host);
    assert_eq!(host.next_event(), Ok(Some(Event::Credit { stream })));
    assert_eq!(host.send_capacity(stream), WINDOW as usize);
}

#[test]
fn output_is_bounded_while_peer_does_not_read() {
    let (mut host, _) = established();
    let block = vec![7; MAX_DATA];
    for _ in 0..20 {
        let stream = host.open_stream(Direction::Send).unwrap();
        host.send_data(stream, &block);
    }
    assert!(host.pending_output().len() <= OUTPUT_HIGH_WATER);
}

#[test]
fn unread_answers_above_limit_are_fault() {
    let (_, mut guest) = established();
    let answer = ToHost::Done { request: 0, result: Ok(()) };
    while guest.pending_output().len() <= OUTPUT_LIMIT {
        guest.send_message(&answer).unwrap();
    }
    assert!(matches!(guest.next_event(), Err(Fault::UnreadBacklog { .. })));
}

#[test]
fn data_beyond_window_is_fault() {
    let (mut host, _) = established();
    let stream = host.open_stream(Direction::Receive).unwrap();
    for _ in 0..WINDOW as usize / MAX_DATA {
        feed(&mut host, &raw(3, stream, &vec![0; MAX_DATA]));
        assert!(matches!(host.next_event(), Ok(Some(Event::Data { .. }))));
    }
    feed(&mut host, &raw(3, stream, b"x"));
    assert_eq!(host.next_event(), Err(Fault::WindowExceeded { stream, len: 1, window: 0 }));
}

#[test]
fn credit_beyond_window_is_fault() {
    let (mut host, _) = established();
    let stream = host.open_stream(Direction::Send).unwrap();
    feed(&mut host, &raw(4, stream, &1u32.to_le_bytes()));
    assert_eq!(host.next_event(), Err(Fault::CreditOverflow { stream, credit: 1 }));
    let (mut host, _) = established();
    let stream = host.open_stream(Direction::Send).unwrap();
    host.send_data(stream, b"x");
    feed(&mut host, &raw(4, stream, &u32::MAX.to_le_bytes()));
    assert_eq!(host.next_event(), Err(Fault::CreditOverflow { stream, credit: u32::MAX }));
}

#[test]
fn frame_on_unopened_stream_is_fault_on_closed_not() {
    for (kind, payload) in [(3, b"x".as_slice()), (4, &[1, 0, 0, 0]), (5, b""), (6, b"")] {
        for stream in [1, 2, 3, 1 << 31] {
            let (mut host, _) = established();
            feed(&mut host, &raw(kind, stream, payload));
            assert_eq!(host.next_event(), Err(Fault::UnknownStream { kind, stream }));
        }
        let (mut host, _) = established();
        let stream = host.open_stream(Direction::Both).unwrap();
        host.reset_stream(stream);
        feed(&mut host, &raw(kind, stream, payload));
        assert_eq!(host.next_event(), Ok(None));
    }
}

#[test]
fn flood_on_closed_stream_is_fault() {
    for (kind, payload, honest) in [
        (Kind::Data, vec![0], WINDOW as usize),
        (Kind::Data, vec![0; MAX_DATA], WINDOW as usize / MAX_DATA),
        (Kind::Credit, vec![1, 0, 0, 0], 64),
        (Kind::End, vec![], 64),
        (Kind::Reset, vec![], 64),
    ] {
        let (mut host, _) = established();
        let stream = host.open_stream(Direction::Both).unwrap();
        host.reset_stream(stream);
        let frame = raw(kind as u8, stream, &payload);
        for _ in 0..honest {
            feed(&mut host, &frame);
            assert_eq!(host.next_event(), Ok(None), "{kind:?}");
        }
        let flood = (0..1_000_000).find_map(|_| {
            feed(&mut host, &frame);
            host.next_event().err()
        });
        assert_eq!(flood, Some(Fault::StaleFrames), "{kind:?}");
    }
}

#[test]
fn flood_of_credit_on_ended_half_is_fault() {
    let (mut host, _) = established();
    let stream = host.open_stream(Direction::Both).unwrap();
    host.end_stream(stream);
    let frame = raw(Kind::Credit as u8, stream, &[1, 0, 0, 0]);
    let flood = (0..1_000_000).find_map(|_| {
        feed(&mut host, &frame);
        host.next_event().err()
    });
    assert_eq!(flood, Some(Fault::StaleFrames));
}

#[test]
fn credit_of_zero_is_fault() {
    let (mut host, _) = established();
    let stream = host.open_stream(Direction::Send).unwrap();
    feed(&mut host, &raw(Kind::Credit as u8, stream, &[0; 4]));
    assert_eq!(host.next_event(), Err(Fault::CreditOverflow { stream, credit: 0 }));
}

#[test]
fn each_closed_stream_allows_a_window_of_stale_data() {
    let (mut host, _) = established();
    for _ in 0..1000 {
        let stream = host.open_stream(Direction::Receive).unwrap();
        host.reset_stream(stream);
        for _ in 0..WINDOW as usize / MAX_DATA {
            feed(&mut host, &raw(Kind::Data as u8, stream, &[0; MAX_DATA]));
            assert_eq!(host.next_event(), Ok(None));
        }
        feed(&mut host, &raw(Kind::End as u8, stream, &[]));
        assert_eq!(host.next_event(), Ok(None));
        let sent = host.pending_output().len();
        host.consume_output(sent);
    }
}

#[test]
fn data_on_ended_or_absent_half_is_fault() {
    let (mut host, _) = established();
    let stream = host.open_stream(Direction::Send).unwrap();
    feed(&mut host, &raw(3, stream, b"x"));
    assert_eq!(host.next_event(), Err(Fault::DataAfterEnd { stream }));

    let (mut host, _) = established();
    let stream = host.open_stream(Direction::Both).unwrap();
    feed(&mut host, &raw(5, stream, b""));
    assert_eq!(host.next_event(), Ok(Some(Event::End { stream })));
    feed(&mut host, &raw(5, stream, b""));
    assert_eq!(host.next_event(), Err(Fault::DataAfterEnd { stream }));
}

#[test]
fn stream_ids_are_unique_per_side_and_bounded() {
    let (mut host, mut guest) = established();
    assert_eq!(host.accept_stream(2, Direction::Both), Err(Fault::InvalidStreamId { stream: 2 }));
    assert_eq!(guest.accept_stream(3, Direction::Both), Err(Fault::InvalidStreamId { stream: 3 }));
    guest.accept_stream(8, Direction::Both).unwrap();
    assert_eq!(guest.accept_stream(8, Direction::Both), Err(Fault::InvalidStreamId { stream: 8 }));
    assert_eq!(guest.accept_stream(6, Direction::Both), Err(Fault::InvalidStreamId { stream: 6 }));
    for n in 1..MAX_STREAMS as u32 {
        guest.accept_stream(8 + 2 * n, Direction::Both).unwrap();
    }
    assert_eq!(guest.accept_stream(100_000, Direction::Both), Err(Fault::TooManyStreams));
    // The streams of the other side are counted separately.
    for n in 1..=MAX_DIALS as u32 {
        assert_eq!(guest.open_stream(Direction::Both), Some(1 + 2 * n));
        host.accept_stream(1 + 2 * n, Direction::Both).unwrap();
    }
    assert!(!guest.can_open_stream() && guest.open_stream(Direction::Both).is_none());
    assert_eq!(host.accept_stream(1001, Direction::Both), Err(Fault::TooManyStreams));
    guest.reset_stream(3);
    assert!(guest.can_open_stream());
    assert_eq!(
        (host.open_stream(Direction::Both), host.open_stream(Direction::Both)),
        (Some(2), Some(4))
    );
}

#[test]
fn undecodable_message_is_fault() {
    for payload in
        [b"\xff".as_slice(), b"\x01\x00", b"\x02\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f"]
    {
        let (mut host, _) = established();
        feed(&mut host, &raw(2, 0, payload));
        assert_eq!(host.next_event(), Err(Fault::InvalidMessage { len: payload.len() }));
    }
    let mut trailing = postcard::to_allocvec(&ToHost::Done { request: 1, result: Ok(()) }).unwrap();
    trailing.push(0);
    let (mut host, _) = established();
    feed(&mut host, &raw(2, 0, &trailing));
    assert!(matches!(host.next_event(), Err(Fault::InvalidMessage { .. })));
}

#[test]
fn message_over_limit_is_rejected_before_queueing() {
    let (mut host, mut guest) = established();
    let put = |len| ToGuest::Get { request: 1, path: vec![b'a'; len], stream: 2 };
    let queued = host.pending_output().len();
    assert_eq!(host.send_message(&put(MAX_CONTROL)), Err(TooLarge { len: MAX_CONTROL + 6 }));
    assert_eq!(host.pending_output().len(), queued);
    host.send_message(&put(MAX_CONTROL - 6)).unwrap();
    carry(&mut host, &mut guest);
    assert_eq!(guest.next_event(), Ok(Some(Event::Message(put(MAX_CONTROL - 6)))));
}

#[test]
fn secret_is_zeroed_in_both_buffers() {
    let canary = b"canary-5f2c9b";
    let (mut host, mut guest) = established();
    let secret = Secret {
        request: 1,
        name: "TOKEN".into(),
        value: SecretBytes::new(canary.to_vec()),
        delivery: Delivery::Memory,
    };
    host.send_message(&ToGuest::Secret(secret)).unwrap();
    // Growing the buffer must not leave a copy either. That memory cannot be inspected here, but
    // the branch is taken.
    host.send_message(&ToGuest::Get { request: 2, path: vec![b'a'; 8000], stream: 2 }).unwrap();
    carry(&mut host, &mut guest);
    while guest.next_event().unwrap().is_some() {}
    let holds = |buffer: &[u8]| buffer.windows(canary.len()).any(|window| window == canary);
    host.output.resize(host.output.capacity(), 0);
    assert!(!holds(&host.output));
    assert!(!holds(&guest.input));
}

#[test]
fn debug_output_hides_secret() {
    let value = SecretBytes::new(b"canary".to_vec());
    assert_eq!(format!("{value:?}"), "SecretBytes(6 bytes)");
}

#[test]
fn data_frame_written_by_caller_is_received() {
    let (mut host, mut guest) = established();
    let stream = host.open_stream(Direction::Receive).unwrap();
    guest.accept_stream(stream, Direction::Send).unwrap();
    let header = guest.begin_data_frame(stream, 3);
    assert!(guest.pending_output().is_empty());
    feed(&mut host, &[&header[..], b"abc"].concat());
    assert_eq!(host.next_event(), Ok(Some(Event::Data { stream, bytes: b"abc" })));
    guest.send_data(stream, b"def");
    carry(&mut guest, &mut host);
    assert_eq!(host.next_event(), Ok(Some(Event::Data { stream, bytes: b"def" })));
    assert_eq!(guest.streams[&stream].send, Some(WINDOW - 6));
}
