//! The HTTP proxy between a sandbox and an endpoint that send anything: HTTP/1, HTTP/2 and
//! WebSockets. It never panics, it returns no value to the sandbox, its output is bounded, and the
//! sizes of what it forwards do not depend on the value.

#![no_main]

use std::sync::OnceLock;

use chitin_broker::proxy::fuzz_port::{FuzzProxy, Piece, scrub_body, scrub_websocket};
use chitin_fuzz::Choices;
use libfuzzer_sys::fuzz_target;
use tokio::runtime::{Builder, Runtime};

/// Two values of the same length.
const VALUE: &[u8] = b"s3cret/\"value+42";
const OTHER: &[u8] = b"another-one-0123";

/// Beginnings of messages, which random bytes would not find.
const REQUESTS: [&[u8]; 6] = [
    b"GET / HTTP/1.1\r\nhost: api.test\r\n",
    b"POST /?a=b HTTP/1.1\r\nhost: api.test\r\ntransfer-encoding: chunked\r\n",
    b"GET / HTTP/1.1\r\nhost: api.test\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
      sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
    b"HEAD / HTTP/1.0\r\nhost: api.test\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0",
    b"authorization: Bearer ",
];
const RESPONSES: [&[u8]; 8] = [
    b"HTTP/1.1 200 OK\r\ncontent-length: 64\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
    b"HTTP/1.1 101 x\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: a\r\n\r\n",
    b"HTTP/1.1 401 ",
    b"HTTP/1.1 103 a\r\nlink: ",
    b"\r\nx-a: ",
    b"\0\0\0\x04\0\0\0\0\0",
    b"\r\n\r\n",
];

/// The most that one message of the proxy itself has: the text of a refusal, and its headers.
const MAX_REFUSAL: usize = 1024;

fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        Builder::new_current_thread().enable_time().start_paused(true).build().expect("a runtime")
    })
}

fn proxy() -> &'static FuzzProxy {
    static PROXY: OnceLock<FuzzProxy> = OnceLock::new();
    PROXY.get_or_init(|| FuzzProxy::new(VALUE).expect("a proxy"))
}

/// Returns the bytes of a piece: any, a prepared beginning, or a part of the value.
fn take_piece(choices: &mut Choices<'_>, prepared: &[&[u8]]) -> Vec<u8> {
    match choices.take_u8() % 8 {
        0..=2 => {
            let count = usize::from(choices.take_u8());
            choices.take_bytes(count).to_vec()
        }
        3 | 4 => prepared[usize::from(choices.take_u8()) % prepared.len()].to_vec(),
        5 => VALUE.to_vec(),
        6 => {
            let start = usize::from(choices.take_u8()) % VALUE.len();
            VALUE[start..].to_vec()
        }
        _ => {
            let end = usize::from(choices.take_u8()) % VALUE.len();
            VALUE[..end].to_vec()
        }
    }
}

fn contains(bytes: &[u8], text: &[u8]) -> bool {
    bytes.windows(text.len()).any(|window| window == text)
}

/// Any bytes in any pieces: no value leaves, no byte is lost, and the value decides no size.
fn fuzz_body(choices: &mut Choices<'_>) {
    let mut pieces = Vec::new();
    while !choices.is_empty() {
        pieces.push(take_piece(choices, &RESPONSES));
    }
    let pieces: Vec<&[u8]> = pieces.iter().map(Vec::as_slice).collect();
    let (right, other) = (scrub_body(VALUE, &pieces), scrub_body(OTHER, &pieces));
    assert!(!contains(&right.concat(), VALUE));
    assert_eq!(right.concat().len(), pieces.concat().len());
    let sizes = |out: &[Vec<u8>]| out.iter().map(Vec::len).collect::<Vec<_>>();
    assert_eq!(sizes(&right), sizes(&other));
}

/// Frames, valid or not: no message contains a value, and the value decides no size.
fn fuzz_websocket(choices: &mut Choices<'_>) {
    let mut pieces = Vec::new();
    while !choices.is_empty() {
        let mut piece = take_piece(choices, &[b""]);
        // A header with the length of the piece, most of the time.
        if choices.take_u8() % 4 != 0 && piece.len() < 126 {
            let first = choices.take_u8();
            piece.splice(0..0, [first, piece.len() as u8]);
        }
        pieces.push(piece);
    }
    let pieces: Vec<&[u8]> = pieces.iter().map(Vec::as_slice).collect();
    let (right, other) = (scrub_websocket(VALUE, &pieces), scrub_websocket(OTHER, &pieces));
    let sizes = |out: &[Vec<u8>]| out.iter().map(Vec::len).collect::<Vec<_>>();
    assert_eq!(sizes(&right), sizes(&other));
    let output = right.concat();
    assert!(output.len() <= 16 * (pieces.concat().len() + 1));
    for message in read_messages(&output) {
        assert!(!contains(&message, VALUE));
    }
}

/// Returns the payloads of the frames of the proxy, which are valid: each data message, and each
/// control frame.
fn read_messages(mut bytes: &[u8]) -> Vec<Vec<u8>> {
    let (mut messages, mut message) = (Vec::new(), Vec::new());
    while let [first, second, rest @ ..] = bytes {
        let (length, rest) = match second {
            126 => (usize::from(rest[0]) << 8 | usize::from(rest[1]), &rest[2..]),
            length => (usize::from(*length), rest),
        };
        let (payload, rest) = rest.split_at(length);
        bytes = rest;
        if first & 8 != 0 {
            messages.push(payload.to_vec());
            continue;
        }
        message.extend_from_slice(payload);
        if first & 0x80 != 0 {
            messages.push(std::mem::take(&mut message));
        }
    }
    messages.push(message);
    messages
}

/// A connection on which both sides send anything.
fn fuzz_connection(is_http2: bool, choices: &mut Choices<'_>) {
    let placeholder = proxy().placeholder();
    let requests: Vec<&[u8]> = REQUESTS.into_iter().chain([placeholder.as_bytes()]).collect();
    let (mut pieces, mut total, mut sent) = (Vec::new(), 0, Vec::new());
    while !choices.is_empty() {
        let is_sandbox = choices.take_u8() & 1 == 0;
        let bytes = take_piece(choices, if is_sandbox { &requests } else { &RESPONSES });
        total += bytes.len();
        pieces.push(if is_sandbox {
            sent.extend_from_slice(&bytes);
            Piece::Sandbox(bytes)
        } else {
            Piece::Endpoint(bytes)
        });
    }
    let (to_sandbox, to_endpoint) = runtime().block_on(proxy().relay(is_http2, pieces));
    assert!(!contains(&to_sandbox, VALUE));
    // The value is sent only for a placeholder, unless the sandbox knows it.
    if !contains(&sent, placeholder.as_bytes()) && !contains(&sent, VALUE) {
        assert!(!contains(&to_endpoint, VALUE));
    }
    assert!(to_sandbox.len().max(to_endpoint.len()) <= MAX_REFUSAL * (total + 1));
}

fuzz_target!(|data: &[u8]| {
    let mut choices = Choices(data);
    match choices.take_u8() % 4 {
        0 => fuzz_body(&mut choices),
        1 => fuzz_websocket(&mut choices),
        2 => fuzz_connection(false, &mut choices),
        _ => fuzz_connection(true, &mut choices),
    }
});
