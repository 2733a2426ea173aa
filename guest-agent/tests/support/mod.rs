//! A host for tests: starts the agent with `--stdio` on a socket pair and speaks the protocol with
//! it, blocking.
#![allow(dead_code, reason = "each test file uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use chitin_protocol::{
    Connection, Delivery, Direction, Event, Exit, Failure, Host, Secret, SecretBytes, Start,
    StreamId, ToGuest, ToHost, Usage,
};

/// The limit of every wait. No step takes so long on any machine: a test that reaches it has found
/// a hang.
const TIMEOUT: Duration = Duration::from_secs(60);

pub const AGENT: &str = env!("CARGO_BIN_EXE_chitin-agent");

pub fn is_root() -> bool {
    rustix::process::getuid().is_root()
}

/// Returns whether the test runs as root, and otherwise prints that `what` is skipped.
pub fn needs_root(what: &str) -> bool {
    if !is_root() {
        println!("SKIPPED: {what} can only be tested as root");
    }
    is_root()
}

/// Starts the agent as PID 1 in new namespaces of this machine, where it makes its root. Returns
/// `None` if the test does not run as root.
pub fn spawn_sandbox() -> Option<Agent> {
    if !needs_root("building a root file system") {
        return None;
    }
    let mut command = Command::new("unshare");
    command
        .args([
            "--mount",
            "--propagation=private",
            "--pid",
            "--fork",
            "--kill-child",
            "--net",
            "--uts",
            "--ipc",
        ])
        .args(["--cgroup", "--", AGENT, "--stdio", "--build-root"]);
    let mut agent = Agent::spawn_with(&mut command);
    agent.wait_until(|agent| agent.ready);
    Some(agent)
}

pub struct Agent {
    pub child: Child,
    pub socket: UnixStream,
    pub connection: Connection<Host>,
    /// Bytes that have arrived and that the test has not taken.
    pub output: HashMap<StreamId, Vec<u8>>,
    pub ended: Vec<StreamId>,
    pub reset: Vec<StreamId>,
    pub exits: HashMap<u32, Exit>,
    pub usages: HashMap<u32, Usage>,
    pub done: HashMap<u32, Result<(), Failure>>,
    pub ready: bool,
    /// Requested connections, oldest first.
    pub dials: Vec<(String, u16, StreamId)>,
    /// Names that were denied.
    pub denied: Vec<String>,
    /// Streams on which the host grants no credit.
    pub withhold: Vec<StreamId>,
    last_id: u32,
}

/// A process that the agent was asked to start.
#[derive(Debug, Clone, Copy)]
pub struct Running {
    pub id: u32,
    pub stdin: Option<StreamId>,
    pub stdout: StreamId,
    pub stderr: StreamId,
}

impl Agent {
    pub fn spawn() -> Agent {
        Agent::spawn_with(Command::new(AGENT).arg("--stdio"))
    }

    pub fn spawn_with(command: &mut Command) -> Agent {
        let (socket, theirs) = UnixStream::pair().unwrap();
        let both = theirs.try_clone().unwrap();
        let child = command
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::from(OwnedFd::from(both)))
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // The command keeps its ends of the sockets until it is dropped or changed.
        command.stdin(Stdio::null()).stdout(Stdio::null());
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        socket.set_write_timeout(Some(TIMEOUT)).unwrap();
        Agent {
            child,
            socket,
            connection: Connection::new(),
            output: HashMap::new(),
            ended: Vec::new(),
            reset: Vec::new(),
            exits: HashMap::new(),
            usages: HashMap::new(),
            done: HashMap::new(),
            ready: false,
            dials: Vec::new(),
            denied: Vec::new(),
            withhold: Vec::new(),
            last_id: 1,
        }
    }

    /// Starts the agent and waits until it is ready.
    pub fn spawn_ready() -> Agent {
        let mut agent = Agent::spawn();
        agent.wait_until(|agent| agent.ready);
        agent
    }

    /// Sends queued output, and handles what arrives, once. Returns `false` if the channel was
    /// closed.
    pub fn exchange_once(&mut self) -> bool {
        self.socket.set_nonblocking(true).unwrap();
        while !self.connection.pending_output().is_empty() {
            match self.socket.write(self.connection.pending_output()) {
                Ok(count) => self.connection.consume_output(count),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => return false,
            }
        }
        // With output left, a poll would be needed to wait for both directions: wait briefly
        // instead.
        let has_output = !self.connection.pending_output().is_empty();
        self.socket.set_nonblocking(false).unwrap();
        let timeout =
            if has_output { Duration::from_millis(1) } else { Duration::from_millis(200) };
        self.socket.set_read_timeout(Some(timeout)).unwrap();
        match self.socket.read(self.connection.input_buffer()) {
            Ok(0) => return false,
            Ok(count) => self.connection.commit_input(count),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                return true;
            }
            Err(_) => return false,
        }
        loop {
            let mut credit = None;
            match self.connection.next_event().expect("the agent follows the protocol") {
                None => return true,
                Some(Event::Established { .. } | Event::Credit { .. }) => {}
                Some(Event::Message(ToHost::Ready { started_ns, ready_ns })) => {
                    assert!(started_ns > 0 && ready_ns > started_ns);
                    self.ready = true;
                }
                Some(Event::Message(ToHost::Exited { process, exit, usage })) => {
                    self.usages.insert(process, usage);
                    assert!(self.exits.insert(process, exit).is_none());
                }
                Some(Event::Message(ToHost::Done { request, result })) => {
                    assert!(self.done.insert(request, result).is_none());
                }
                Some(Event::Message(ToHost::Dial { host, port, stream })) => {
                    self.connection.accept_stream(stream, Direction::Both).unwrap();
                    self.dials.push((host, port, stream));
                }
                Some(Event::Message(ToHost::Denied { host })) => self.denied.push(host),
                Some(Event::Data { stream, bytes }) => {
                    self.output.entry(stream).or_default().extend_from_slice(bytes);
                    credit = Some((stream, bytes.len()));
                }
                Some(Event::End { stream }) => self.ended.push(stream),
                Some(Event::Reset { stream }) => self.reset.push(stream),
            }
            if let Some((stream, count)) =
                credit.filter(|(stream, _)| !self.withhold.contains(stream))
            {
                self.connection.return_credit(stream, count);
            }
        }
    }

    pub fn wait_until(&mut self, condition: impl Fn(&Agent) -> bool) {
        let deadline = Instant::now() + TIMEOUT;
        while !condition(self) {
            assert!(Instant::now() < deadline, "timed out");
            assert!(
                self.exchange_once() || condition(self),
                "the agent ended: {}",
                self.read_stderr()
            );
        }
    }

    /// Waits until the agent closes the channel, and returns its exit code and its log.
    pub fn wait_for_end(&mut self) -> (Option<i32>, String) {
        let deadline = Instant::now() + TIMEOUT;
        while self.exchange_once() {
            assert!(Instant::now() < deadline, "the agent still runs");
        }
        let code = self.child.wait().unwrap().code();
        (code, self.read_stderr())
    }

    fn read_stderr(&mut self) -> String {
        let mut text = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            let _ = self.socket.shutdown(std::net::Shutdown::Both);
            let _ = stderr.read_to_string(&mut text);
        }
        text
    }

    pub fn next_id(&mut self) -> u32 {
        self.last_id += 1;
        self.last_id
    }

    /// Makes the request of a process in `/` with nothing but `PATH` in its environment. Its user
    /// is the workload's, or that of the test if the test does not run as root.
    pub fn plain_start(&mut self, argv: &[&str]) -> Start {
        let id = self.next_id();
        let (uid, gid) = if is_root() {
            (1000, 1000)
        } else {
            (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw())
        };
        Start {
            process: id,
            argv: argv.iter().map(|argument| argument.as_bytes().to_vec()).collect(),
            env: vec![(b"PATH".to_vec(), b"/usr/local/bin:/usr/bin:/bin".to_vec())],
            cwd: b"/".to_vec(),
            uid,
            gid,
            stdin: Some(self.connection.open_stream(Direction::Send).unwrap()),
            stdout: self.connection.open_stream(Direction::Receive).unwrap(),
            stderr: self.connection.open_stream(Direction::Receive).unwrap(),
        }
    }

    pub fn start_process(&mut self, start: Start) -> Running {
        let Start { process: id, stdin, stdout, stderr, .. } = start;
        self.connection.send_message(&ToGuest::Start(start)).unwrap();
        Running { id, stdin, stdout, stderr }
    }

    pub fn run_command(&mut self, argv: &[&str]) -> Running {
        let start = self.plain_start(argv);
        self.start_process(start)
    }

    pub fn run_shell(&mut self, script: &str) -> Running {
        self.run_command(&["sh", "-c", script])
    }

    pub fn wait_for_exit(&mut self, running: Running) -> Exit {
        // The three may come in any order.
        self.wait_until(|agent| {
            agent.exits.contains_key(&running.id)
                && agent.ended.contains(&running.stdout)
                && agent.ended.contains(&running.stderr)
        });
        self.exits[&running.id].clone()
    }

    /// Waits for exit code 0, and returns standard output.
    pub fn wait_for_output(&mut self, running: Running) -> String {
        let exit = self.wait_for_exit(running);
        let stderr = self.take_text(running.stderr);
        assert_eq!(exit, Exit::Code(0), "stderr: {stderr}");
        self.take_text(running.stdout)
    }

    pub fn take_text(&mut self, stream: StreamId) -> String {
        String::from_utf8(self.output.remove(&stream).unwrap_or_default()).unwrap()
    }

    /// Sends all of `bytes` and the end, and handles what arrives in the meantime.
    pub fn send_all(&mut self, stream: StreamId, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            bytes = &bytes[self.connection.send_data(stream, bytes)..];
            assert!(self.exchange_once(), "the agent ended: {}", self.read_stderr());
        }
        self.connection.end_stream(stream);
    }

    pub fn send_signal(&mut self, running: Running, signal: u8) {
        self.connection.send_message(&ToGuest::Signal { process: running.id, signal }).unwrap();
    }

    pub fn deliver_secret(
        &mut self,
        name: &str,
        value: &[u8],
        delivery: Delivery,
    ) -> Result<(), Failure> {
        let request = self.next_id();
        let value = SecretBytes::new(value.to_vec());
        let secret = Secret { request, name: name.into(), value, delivery };
        self.send_request(request, &ToGuest::Secret(secret))
    }

    pub fn revoke_secret(&mut self, name: &str) -> Result<(), Failure> {
        let request = self.next_id();
        self.send_request(request, &ToGuest::Revoke { request, name: name.into() })
    }

    fn send_request(&mut self, request: u32, message: &ToGuest) -> Result<(), Failure> {
        self.connection.send_message(message).unwrap();
        self.wait_until(|agent| agent.done.contains_key(&request));
        self.done.remove(&request).unwrap()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
        // The agent ends with its channel, except after some failures of a test.
        let deadline = Instant::now() + Duration::from_secs(10);
        while let Ok(None) = self.child.try_wait() {
            if Instant::now() > deadline {
                let _ = self.child.kill();
                let _ = self.child.wait();
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
