use std::future::Future;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream as StdStream;
use std::time::Duration;

use chitin_protocol::{Connection, Event, Exit, Fault, Guest, ToHost, Unexpected, Usage, WINDOW};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

/// An agent on a thread with blocking I/O.
struct Agent {
    socket: StdStream,
    connection: Connection<Guest>,
}

impl Agent {
    fn send(&mut self, message: &ToHost) {
        self.connection.send_message(message).unwrap();
        self.flush();
    }

    fn flush(&mut self) {
        while !self.connection.pending_output().is_empty() {
            match self.socket.write(self.connection.pending_output()) {
                Ok(count) => self.connection.consume_output(count),
                Err(_) => return,
            }
        }
    }

    /// Waits for the next message; data that arrives before it is appended to `data`.
    fn next_message(&mut self, data: &mut Vec<u8>) -> Option<ToGuest> {
        loop {
            loop {
                let (stream, count) = match self.connection.next_event().unwrap() {
                    None => break,
                    Some(Event::Message(message)) => return Some(message),
                    Some(Event::Data { stream, bytes }) => {
                        data.extend(bytes);
                        (stream, bytes.len())
                    }
                    Some(Event::End { .. }) => return None,
                    Some(_) => continue,
                };
                self.connection.return_credit(stream, count);
            }
            self.flush();
            let count = self.socket.read(self.connection.input_buffer()).unwrap();
            if count == 0 {
                return None;
            }
            self.connection.commit_input(count);
        }
    }
}

fn usage() -> Usage {
    Usage::default()
}

/// Runs `host` against an agent that runs `script`; neither may take longer than ten seconds.
async fn run_against<T>(
    script: impl FnOnce(Agent) + Send + 'static,
    host: impl AsyncFnOnce(Channel) -> T,
) -> T {
    let (ours, socket) = UnixStream::pair().unwrap();
    let agent = std::thread::spawn(move || script(Agent { socket, connection: Connection::new() }));
    let result = finish_in_time(host(Channel::new(ours))).await;
    finish_in_time(tokio::task::spawn_blocking(move || agent.join().unwrap())).await.unwrap();
    result
}

async fn finish_in_time<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(10), future).await.expect("in time")
}

fn start_cat(
    channel: &Channel,
) -> (oneshot::Receiver<ProcessEnd>, Option<StreamWriter>, StreamReader, StreamReader) {
    let (stdin, stdout, stderr) =
        (channel.open_writer(), channel.open_reader(), channel.open_reader());
    let (stdout, stderr) = (stdout.unwrap(), stderr.unwrap());
    let ended = channel.start_process(Start {
        process: channel.next_id(),
        argv: vec![b"cat".to_vec()],
        env: vec![],
        cwd: b"/".to_vec(),
        uid: 1000,
        gid: 1000,
        stdin: stdin.as_ref().map(StreamWriter::id),
        stdout: stdout.id(),
        stderr: stderr.id(),
    });
    (ended.unwrap(), stdin, stdout, stderr)
}

#[tokio::test]
async fn process_echoes_more_than_any_buffer_holds() {
    const SIZE: usize = 20 * WINDOW as usize + 12_345;
    let script = |mut agent: Agent| {
        agent.send(&ToHost::Ready { started_ns: 5, ready_ns: 12 });
        let Some(ToGuest::Start(start)) = agent.next_message(&mut vec![]) else {
            panic!("no start")
        };
        let stdin = start.stdin.unwrap();
        agent.connection.accept_stream(stdin, Direction::Receive).unwrap();
        agent.connection.accept_stream(start.stdout, Direction::Send).unwrap();
        agent.connection.accept_stream(start.stderr, Direction::Send).unwrap();
        let mut data = vec![];
        assert_eq!(agent.next_message(&mut data), None);
        let mut rest = data.as_slice();
        while !rest.is_empty() {
            let sent = agent.connection.send_data(start.stdout, rest);
            rest = &rest[sent..];
            agent.flush();
            if sent == 0 {
                // Out of credit: the next message returns some.
                let count = agent.socket.read(agent.connection.input_buffer()).unwrap();
                agent.connection.commit_input(count);
                while agent.connection.next_event().unwrap().is_some() {}
            }
        }
        agent.connection.end_stream(start.stdout);
        agent.connection.end_stream(start.stderr);
        agent.send(&ToHost::Exited { process: start.process, exit: Exit::Code(3), usage: usage() });
        agent.next_message(&mut vec![]);
    };
    run_against(script, async |channel| {
        channel.wait_until_ready().await.unwrap();
        assert_eq!(channel.timestamps().agent_start_ns, 7);
        let (ended, stdin, mut stdout, mut stderr) = start_cat(&channel);
        let sent: Vec<u8> = (0..=250u8).cycle().take(SIZE).collect();
        let (mut out, mut err) = (vec![], vec![]);
        let sending = async {
            let mut stdin = stdin.unwrap();
            stdin.write_all(&sent).await.unwrap();
            stdin.shutdown().await.unwrap();
        };
        let (_, read, none) =
            tokio::join!(sending, stdout.read_to_end(&mut out), stderr.read_to_end(&mut err));
        assert_eq!((read.unwrap(), none.unwrap()), (SIZE, 0));
        assert!(out == sent);
        assert_eq!(ended.await.unwrap().0, Exit::Code(3));
        assert!(channel.timestamps().first_output.is_some());
        assert!(channel.timestamps().last_exit.is_some());
        channel.close();
    })
    .await;
}

#[tokio::test]
async fn closed_channel_fails_all_waiters() {
    let script = |mut agent: Agent| {
        agent.send(&ToHost::Ready { started_ns: 0, ready_ns: 0 });
        agent.next_message(&mut vec![]);
    };
    run_against(script, async |channel| {
        channel.wait_until_ready().await.unwrap();
        let (ended, stdin, mut stdout, _stderr) = start_cat(&channel);
        assert_eq!(channel.wait_until_closed().await, CloseReason::Eof);
        assert!(ended.await.is_err());
        let error = stdout.read(&mut [0; 1]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        let error = stdin.unwrap().write(b"x").await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        // Later calls fail as well.
        assert!(start_cat(&channel).0.await.is_err());
    })
    .await;
}

async fn close_reason_of(script: impl FnOnce(Agent) + Send + 'static) -> CloseReason {
    run_against(script, async |channel| channel.wait_until_closed().await).await
}

#[tokio::test]
async fn protocol_breach_closes_the_channel() {
    let send_unexpected = |message: ToHost| {
        move |mut agent: Agent| {
            agent.send(&ToHost::Ready { started_ns: 0, ready_ns: 0 });
            agent.send(&message);
        }
    };
    let exited = ToHost::Exited { process: 9, exit: Exit::Code(0), usage: usage() };
    for message in [
        exited,
        ToHost::Done { request: 9, result: Ok(()) },
        ToHost::Ready { started_ns: 0, ready_ns: 0 },
    ] {
        let reason = close_reason_of(send_unexpected(message)).await;
        assert!(matches!(reason, CloseReason::Fault(Fault::Unexpected { .. })), "{reason:?}");
    }
    let noise = |mut agent: Agent| agent.socket.write_all(b"HTTP/1.1 400 Bad Request\r\n").unwrap();
    assert_eq!(
        close_reason_of(noise).await,
        CloseReason::Fault(Fault::MissingHello { kind: b'H' })
    );
}

#[tokio::test]
async fn backward_agent_clock_counts_as_zero() {
    let script = |mut agent: Agent| {
        agent.send(&ToHost::Ready { started_ns: u64::MAX, ready_ns: 0 });
        agent.next_message(&mut vec![]);
    };
    run_against(script, async |channel| {
        channel.wait_until_ready().await.unwrap();
        assert_eq!(channel.timestamps().agent_start_ns, 0);
        channel.close();
    })
    .await;
}

#[tokio::test]
async fn dial_without_egress_closes_the_channel() {
    let script = |mut agent: Agent| {
        let stream = agent.connection.open_stream(Direction::Both).unwrap();
        agent.send(&ToHost::Dial { host: "a.test".into(), port: 443, stream });
    };
    let reason = close_reason_of(script).await;
    assert_eq!(reason, CloseReason::Fault(Fault::Unexpected(Unexpected::EgressNotEnabled)));
}

/// Whole frames as they are on the wire, with a stream that the host has closed.
fn frame(kind: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).unwrap();
    let mut header = (u32::from(kind) | len << 8).to_le_bytes().to_vec();
    header.extend(stream.to_le_bytes());
    header.extend(payload);
    header
}

/// Each kind of frame that a guest can repeat without end, for the streams 2 (closed) and 4 (open,
/// its data unread).
fn floods() -> Vec<(&'static str, Vec<u8>)> {
    let message = |message: &ToHost| {
        let mut connection = Connection::<Guest>::new();
        let hello = connection.pending_output().len();
        connection.consume_output(hello);
        connection.send_message(message).unwrap();
        connection.pending_output().to_vec()
    };
    vec![
        ("reset", frame(6, 2, &[])),
        ("end", frame(5, 2, &[])),
        ("credit", frame(4, 2, &[1, 0, 0, 0])),
        ("data", frame(3, 2, &[0])),
        ("long data", frame(3, 2, &[0; 65_536])),
        ("data on an open stream", frame(3, 4, &[0])),
        ("hello", frame(1, 0, b"CHTN\x01\0\0\0")),
        ("unknown", frame(99, 0, &[])),
        ("denied", message(&ToHost::Denied { host: "example.com".into() })),
        ("dial", message(&ToHost::Dial { host: "example.com".into(), port: 1, stream: 3 })),
        ("ready", message(&ToHost::Ready { started_ns: 0, ready_ns: 1 })),
        ("exited", message(&ToHost::Exited { process: 1, exit: Exit::Code(0), usage: usage() })),
        ("done", message(&ToHost::Done { request: 1, result: Ok(()) })),
    ]
}

/// A channel whose guest, once told to, repeats a frame as fast as it can. The host has closed
/// stream 2, reads stream 4, and takes connection requests without answering them.
async fn open_flooded(flood: Vec<u8>) -> (Channel, StreamReader, std::sync::mpsc::Sender<()>) {
    let (ours, mut theirs) = StdStream::pair().unwrap();
    let (go, wait) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut connection = Connection::<Guest>::new();
        connection.send_message(&ToHost::Ready { started_ns: 0, ready_ns: 1 }).unwrap();
        theirs.write_all(connection.pending_output()).unwrap();
        if wait.recv().is_ok() {
            let flood = flood.repeat((256 * 1024 / flood.len()).max(1));
            while theirs.write_all(&flood).is_ok() {}
        }
    });
    let channel = Channel::new(ours);
    channel.wait_until_ready().await.unwrap();
    drop(channel.open_reader().unwrap());
    let reader = channel.open_reader().unwrap();
    let mut requests = channel.dial_requests();
    tokio::spawn(async move { while requests.recv().await.is_some() {} });
    (channel, reader, go)
}

#[test]
fn deadline_holds_under_each_flood() {
    for (name, flood) in floods() {
        for workers in [0, 2] {
            let runtime = match workers {
                0 => tokio::runtime::Builder::new_current_thread().enable_all().build(),
                _ => tokio::runtime::Builder::new_multi_thread().enable_all().build(),
            };
            let (late, ended) = runtime.unwrap().block_on(async {
                let (channel, mut reader, go) = open_flooded(flood.clone()).await;
                let drain = tokio::spawn(async move {
                    tokio::io::copy(&mut reader, &mut tokio::io::sink()).await
                });
                let limit = std::time::Instant::now() + Duration::from_millis(300);
                let _guard = channel.close_at(limit);
                go.send(()).unwrap();
                // A timer of the runtime has its turn as well.
                tokio::time::sleep(Duration::from_millis(300)).await;
                let late = limit.elapsed();
                channel.wait_until_closed().await;
                let _ = drain.await;
                (late, limit.elapsed())
            });
            assert!(late < Duration::from_secs(1), "{name}: a timer was {late:?} late");
            assert!(ended < Duration::from_secs(1), "{name}: the end was {ended:?} late");
        }
    }
}

#[test]
fn deadline_holds_while_runtime_is_blocked() {
    let (ours, mut theirs) = StdStream::pair().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (guest_end, blocked) = runtime.block_on(async {
        let channel = Channel::new(ours);
        tokio::task::yield_now().await;
        let start = std::time::Instant::now();
        let _guard = channel.close_at(start + Duration::from_millis(50));
        let guest = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            theirs.read_to_end(&mut bytes).unwrap();
            start.elapsed()
        });
        std::thread::sleep(Duration::from_millis(1500));
        (guest.join().unwrap(), start.elapsed())
    });
    assert!(guest_end < Duration::from_secs(1) && guest_end < blocked, "{guest_end:?}");
}

/// Counts answers of an honest guest in a period: each waits for the one before.
async fn count_exchanges(channel: &Channel, period: Duration) -> u32 {
    let end = std::time::Instant::now() + period;
    let mut count = 0;
    while std::time::Instant::now() < end {
        let request = channel.next_id();
        let message = ToGuest::Freeze { request };
        channel.send_request(request, &message).unwrap().await.unwrap().unwrap();
        count += 1;
    }
    count
}

#[test]
fn flood_leaves_other_sandboxes_their_rate() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (ours, theirs) = StdStream::pair().unwrap();
        std::thread::spawn(move || {
            let mut agent = Agent { socket: theirs, connection: Connection::new() };
            agent.send(&ToHost::Ready { started_ns: 0, ready_ns: 1 });
            while let Some(message) = agent.next_message(&mut Vec::new()) {
                let ToGuest::Freeze { request } = message else { panic!("{message:?}") };
                agent.send(&ToHost::Done { request, result: Ok(()) });
            }
        });
        let honest = Channel::new(ours);
        honest.wait_until_ready().await.unwrap();
        let denied = floods().into_iter().find(|(name, _)| *name == "denied").unwrap().1;
        let period = Duration::from_millis(100);
        count_exchanges(&honest, period).await;
        // In turns, so that other load of the machine affects both alike.
        let (mut alone, mut beside) = (0, 0);
        for _ in 0..8 {
            alone += count_exchanges(&honest, period).await;
            let (flooded, reader, go) = open_flooded(denied.clone()).await;
            go.send(()).unwrap();
            // The first frames are a burst.
            tokio::time::sleep(Duration::from_millis(200)).await;
            beside += count_exchanges(&honest, period).await;
            flooded.close();
            drop(reader);
        }
        assert!(beside * 10 >= alone * 8, "{alone} alone, {beside} beside a flood");
    });
}
