//! A host for tests: starts the agent with `--stdio` on a socket pair and speaks the protocol with it, blocking.
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

/// Nothing here takes so long on any machine: a test that waits longer has found a hang.
const PATIENCE: Duration = Duration::from_secs(60);

pub const AGENT: &str = env!("CARGO_BIN_EXE_chitin-agent");

pub fn is_root() -> bool {
    rustix::process::getuid().is_root()
}

/// For tests of what only root can do: says visibly that nothing was tested.
pub fn needs_root(what: &str) -> bool {
    if !is_root() {
        println!("SKIPPED: {what} can only be tested as root");
    }
    is_root()
}

/// The agent as PID 1 with a root of its own making, in namespaces of this machine.
pub fn sandbox() -> Option<Agent> {
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
    agent.until(|agent| agent.ready);
    Some(agent)
}

pub struct Agent {
    pub child: Child,
    pub socket: UnixStream,
    pub connection: Connection<Host>,
    /// What has arrived and was not yet asked for.
    pub output: HashMap<StreamId, Vec<u8>>,
    pub ended: Vec<StreamId>,
    pub reset: Vec<StreamId>,
    pub exits: HashMap<u32, Exit>,
    pub usages: HashMap<u32, Usage>,
    pub done: HashMap<u32, Result<(), Failure>>,
    pub ready: bool,
    /// Connections asked for, oldest first, and names that were refused.
    pub dials: Vec<(String, u16, StreamId)>,
    pub denied: Vec<String>,
    /// Streams whose bytes give no credit back.
    pub withhold: Vec<StreamId>,
    next: u32,
}

/// One process of the agent's.
#[derive(Debug, Clone, Copy)]
pub struct Running {
    pub name: u32,
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
        // The command keeps its ends until it is dropped or changed.
        command.stdin(Stdio::null()).stdout(Stdio::null());
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.set_write_timeout(Some(PATIENCE)).unwrap();
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
            next: 1,
        }
    }

    /// Waits until the agent is up.
    pub fn up() -> Agent {
        let mut agent = Agent::spawn();
        agent.until(|agent| agent.ready);
        agent
    }

    /// Sends what is to be sent and takes what is there, once. `false` when the channel was closed.
    pub fn turn(&mut self) -> bool {
        self.socket.set_nonblocking(true).unwrap();
        while !self.connection.pending_output().is_empty() {
            match self.socket.write(self.connection.pending_output()) {
                Ok(count) => self.connection.consume_output(count),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => return false,
            }
        }
        // With something left to send, waiting for both would need a poll: look again soon instead.
        let waiting = !self.connection.pending_output().is_empty();
        self.socket.set_nonblocking(false).unwrap();
        let patience = if waiting { Duration::from_millis(1) } else { Duration::from_millis(200) };
        self.socket.set_read_timeout(Some(patience)).unwrap();
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
            match self.connection.next_event().expect("the agent keeps to the protocol") {
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

    pub fn until(&mut self, condition: impl Fn(&Agent) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !condition(self) {
            assert!(Instant::now() < deadline, "waited too long");
            assert!(self.turn() || condition(self), "the agent ended: {}", self.stderr());
        }
    }

    /// Waits until the agent closes the channel, and gives its exit code and what it logged.
    pub fn until_ended(&mut self) -> (Option<i32>, String) {
        let deadline = Instant::now() + PATIENCE;
        while self.turn() {
            assert!(Instant::now() < deadline, "the agent goes on");
        }
        let code = self.child.wait().unwrap().code();
        (code, self.stderr())
    }

    fn stderr(&mut self) -> String {
        let mut text = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            let _ = self.socket.shutdown(std::net::Shutdown::Both);
            let _ = stderr.read_to_string(&mut text);
        }
        text
    }

    pub fn request(&mut self) -> u32 {
        self.next += 1;
        self.next
    }

    /// A process that is this test's user in `/`, with a plain environment.
    pub fn plain(&mut self, argv: &[&str]) -> Start {
        let name = self.request();
        let (uid, gid) = if is_root() {
            (1000, 1000)
        } else {
            (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw())
        };
        Start {
            process: name,
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

    pub fn start(&mut self, start: Start) -> Running {
        let Start { process: name, stdin, stdout, stderr, .. } = start;
        self.connection.send_message(&ToGuest::Start(start)).unwrap();
        Running { name, stdin, stdout, stderr }
    }

    pub fn run(&mut self, argv: &[&str]) -> Running {
        let start = self.plain(argv);
        self.start(start)
    }

    pub fn shell(&mut self, script: &str) -> Running {
        self.run(&["sh", "-c", script])
    }

    pub fn exit(&mut self, running: Running) -> Exit {
        // In whatever order the three come.
        self.until(|agent| {
            agent.exits.contains_key(&running.name)
                && agent.ended.contains(&running.stdout)
                && agent.ended.contains(&running.stderr)
        });
        self.exits[&running.name].clone()
    }

    /// Waits for the end and gives standard output; anything else than code 0 fails.
    pub fn output(&mut self, running: Running) -> String {
        let exit = self.exit(running);
        let stderr = self.text(running.stderr);
        assert_eq!(exit, Exit::Code(0), "stderr: {stderr}");
        self.text(running.stdout)
    }

    pub fn text(&mut self, stream: StreamId) -> String {
        String::from_utf8(self.output.remove(&stream).unwrap_or_default()).unwrap()
    }

    /// Sends all of `bytes` and the end, while taking what comes.
    pub fn feed(&mut self, stream: StreamId, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            bytes = &bytes[self.connection.send_data(stream, bytes)..];
            assert!(self.turn(), "the agent ended: {}", self.stderr());
        }
        self.connection.end_stream(stream);
    }

    pub fn signal(&mut self, running: Running, signal: u8) {
        self.connection.send_message(&ToGuest::Signal { process: running.name, signal }).unwrap();
    }

    pub fn secret(&mut self, name: &str, value: &[u8], delivery: Delivery) -> Result<(), Failure> {
        let request = self.request();
        let value = SecretBytes::new(value.to_vec());
        let secret = Secret { request, name: name.into(), value, delivery };
        self.ask(request, &ToGuest::Secret(secret))
    }

    pub fn revoke(&mut self, name: &str) -> Result<(), Failure> {
        let request = self.request();
        self.ask(request, &ToGuest::Revoke { request, name: name.into() })
    }

    fn ask(&mut self, request: u32, message: &ToGuest) -> Result<(), Failure> {
        self.connection.send_message(message).unwrap();
        self.until(|agent| agent.done.contains_key(&request));
        self.done.remove(&request).unwrap()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
        // It ends with its channel; only a test that failed has to help.
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
