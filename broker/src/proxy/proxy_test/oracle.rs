//! The scrubber as an oracle: its output must not tell a right guess from a wrong one.

use std::collections::BTreeMap;
use std::convert::Infallible;

use bytes::Bytes;
use http::{Method, Request, Response, Version};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::http2 as server2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::task::JoinSet;

use super::super::selftest::Sender;
use super::plain::*;

/// Two values of the same length.
const RIGHT: &str = "sk-live-4fQ9zT1mXw7bR2";
const WRONG: &str = "tk/%\"ve+9aB3xZ0yLq5nD8";

/// The largest number of requests of the attack.
const MAX_REQUESTS: usize = 20_000;

/// Returns pieces that end with each part of a value, and the whole of it if requested.
fn guesses(value: &str, with_value: bool) -> Vec<Vec<u8>> {
    let longest = value.len() - usize::from(!with_value);
    let mut pieces = Vec::new();
    for end in 1..=longest {
        for lead in ["!", "\n", "data: "] {
            pieces.push([lead.as_bytes(), &value.as_bytes()[..end]].concat());
        }
    }
    pieces
}

fn with_length(pieces: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let length: usize = pieces.iter().map(Vec::len).sum();
    let head = format!("HTTP/1.1 200 OK\r\ndate: x\r\ncontent-length: {length}\r\n\r\n");
    [vec![head.into_bytes()], pieces.to_vec()].concat()
}

fn chunked(pieces: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let head = b"HTTP/1.1 200 OK\r\ndate: x\r\ntransfer-encoding: chunked\r\n\r\n".to_vec();
    let chunk = |piece: &Vec<u8>| {
        [format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n".as_slice()].concat()
    };
    let chunks = pieces.iter().map(chunk).collect();
    [vec![head], chunks, vec![b"0\r\n\r\n".to_vec()]].concat()
}

/// Returns each piece as a message of its own, and all of them again as fragments of one message,
/// between pings.
fn websocket(pieces: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let head = b"HTTP/1.1 101 Switching Protocols\r\ndate: x\r\nupgrade: websocket\r\n\
                 connection: upgrade\r\nsec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";
    let frame = |first: u8, piece: &[u8]| {
        [&[first, u8::try_from(piece.len()).unwrap()][..], piece].concat()
    };
    let messages = pieces.iter().map(|piece| frame(0x82, piece)).collect();
    let mut fragments = vec![frame(0x02, b"")];
    for piece in pieces {
        fragments.push(frame(0x00, piece));
        fragments.push(frame(0x89, piece));
    }
    fragments.push(frame(0x80, b""));
    let close = vec![frame(0x88, &[&[3, 232][..], pieces.last().unwrap()].concat())];
    [vec![head.to_vec()], messages, fragments, close].concat()
}

const GET: &str = "GET / HTTP/1.1\r\nhost: api.test\r\n\r\n";
const UPGRADE: &str = "GET / HTTP/1.1\r\nhost: api.test\r\nupgrade: websocket\r\n\
    connection: upgrade\r\nsec-websocket-version: 13\r\n\
    sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";

/// Returns the output for the same bytes of an endpoint in each framing.
async fn observe(value: &str, pieces: &[Vec<u8>]) -> BTreeMap<&'static str, Vec<Event>> {
    let proxy = proxy_of(value);
    BTreeMap::from([
        ("length", exchange_http1(&proxy, GET, &with_length(pieces)).await.0),
        ("chunked", exchange_http1(&proxy, GET, &chunked(pieces)).await.0),
        ("websocket", exchange_http1(&proxy, UPGRADE, &websocket(pieces)).await.0),
        ("h2", exchange_http2(&proxy, pieces).await),
    ])
}

#[tokio::test(start_paused = true)]
async fn output_events_do_not_depend_on_the_value() {
    assert_eq!(RIGHT.len(), WRONG.len());
    // Neither value is complete: everything is equal. The pieces tempt the scrubber of one value.
    let pieces = guesses(RIGHT, false);
    let (right, wrong) = (observe(RIGHT, &pieces).await, observe(WRONG, &pieces).await);
    for (framing, events) in &right {
        assert!(events.len() > 2, "{framing}: {events:?}");
        let differs = events.iter().zip(&wrong[framing]).find(|(right, wrong)| right != wrong);
        assert!(differs.is_none(), "{framing}: {differs:?}");
        assert_eq!(events.len(), wrong[framing].len(), "{framing}");
    }
    // One value is complete, in every form: the content differs, and neither length nor time.
    let mut pieces = guesses(RIGHT, true);
    pieces.push(super::encode_base64(format!("user:{RIGHT}").as_bytes(), false));
    let (right, wrong) = (observe(RIGHT, &pieces).await, observe(WRONG, &pieces).await);
    let sizes = |events: &[Event]| -> Vec<_> {
        events.iter().map(|(time, bytes)| (*time, bytes.len())).collect()
    };
    for (framing, events) in &right {
        assert_eq!(sizes(events), sizes(&wrong[framing]), "{framing}");
        let text: Vec<u8> = events.iter().flat_map(|(_, bytes)| bytes.clone()).collect();
        assert!(!String::from_utf8_lossy(&text).contains(RIGHT), "{framing}");
        assert_ne!(events, &wrong[framing], "{framing}");
    }
}

/// An endpoint that echoes bodies, over one connection.
struct Echo {
    sender: Sender,
    requests: usize,
    _tasks: JoinSet<()>,
}

impl Echo {
    async fn connect(value: &str) -> Echo {
        let mut tasks = JoinSet::new();
        let (sandbox, endpoint, _) = start_relay(&proxy_of(value), true, &mut tasks);
        tasks.spawn(async move {
            let service = service_fn(|request: Request<Incoming>| async move {
                Ok::<_, Infallible>(Response::new(request.into_body()))
            });
            let endpoint = TokioIo::new(endpoint);
            let builder = server2::Builder::new(TokioExecutor::new());
            drop(builder.serve_connection(endpoint, service).await);
        });
        let sender = Sender::new(sandbox, true, &mut tasks).await.unwrap();
        Echo { sender, requests: 0, _tasks: tasks }
    }

    /// Returns the size of each frame of the echo, and its content without the guess.
    async fn observe(&mut self, lead: &str, guess: &str, rest: &str) -> Vec<(usize, Vec<u8>)> {
        self.requests += 1;
        let request = Request::builder()
            .method(Method::POST)
            .version(Version::HTTP_2)
            .uri("https://api.test/echo")
            .body(Full::from(Bytes::from([lead, guess, rest].concat())))
            .unwrap();
        let mut body = self.sender.send_request(request).await.unwrap().into_body();
        let (mut frames, mut at) = (Vec::new(), 0);
        while let Some(frame) = body.frame().await {
            let mut bytes = frame.unwrap().into_data().unwrap_or_default().to_vec();
            let size = bytes.len();
            for (index, byte) in bytes.iter_mut().enumerate() {
                if (lead.len()..lead.len() + guess.len()).contains(&(at + index)) && *byte != b'*' {
                    *byte = b'g';
                }
            }
            at += size;
            frames.push((size, bytes));
        }
        frames
    }
}

#[tokio::test]
async fn adaptive_guesses_recover_no_character() {
    let mut echo = Echo::connect(RIGHT).await;
    let alphabet: Vec<char> = ('!'..='~').filter(|letter| *letter != '*').collect();
    let (mut known, mut learnt, mut round) = (String::new(), String::new(), 0);
    while echo.requests + alphabet.len() <= MAX_REQUESTS && known.len() + 1 < RIGHT.len() {
        // A guess at the end, before a byte that no value contains, and before more text.
        let (lead, rest) =
            [("!", ""), ("\n", "\n"), ("", " and more text"), ("x", "\0")][round % 4];
        round += 1;
        let mut groups: BTreeMap<Vec<(usize, Vec<u8>)>, Vec<char>> = BTreeMap::new();
        for &letter in &alphabet {
            let seen = echo.observe(lead, &format!("{known}{letter}"), rest).await;
            groups.entry(seen).or_default().push(letter);
        }
        // A letter that behaves as no other one does continues the value.
        if let Some(letters) = groups.values().find(|letters| letters.len() == 1) {
            known.push(letters[0]);
            learnt.push(letters[0]);
        } else if round % 8 == 7 && learnt.is_empty() {
            // The beginnings of tokens are known.
            known = ["", "sk-", "sk-live-"][round / 8 % 3].into();
        }
    }
    assert_eq!(learnt, "", "after {} requests", echo.requests);
    assert!(echo.requests + alphabet.len() > MAX_REQUESTS);
}
