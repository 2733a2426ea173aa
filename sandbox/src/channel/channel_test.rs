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
