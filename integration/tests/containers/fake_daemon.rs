//! A daemon that follows Docker's API up to a step and then fails, for the tests of nemoclaw.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use tempfile::TempDir;

/// The calls of a start, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    Version,
    Create,
    InspectImage,
    ImportImage,
    CreateAgain,
    Attach,
    Start,
    /// The container runs, and its agent sends nothing.
    Agent,
}

impl Step {
    pub const ALL: [Step; 8] = [
        Step::Version,
        Step::Create,
        Step::InspectImage,
        Step::ImportImage,
        Step::CreateAgain,
        Step::Attach,
        Step::Start,
        Step::Agent,
    ];
}

/// The failure at a step, and of all calls after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// Connections are accepted, and nothing is answered.
    Silence,
    /// The response breaks off in the middle.
    Reset,
}

/// A daemon in this process, on a Unix socket.
pub struct FakeDaemon {
    dir: TempDir,
}

impl FakeDaemon {
    pub fn start(step: Step, failure: Failure) -> FakeDaemon {
        let dir = tempfile::tempdir().expect("create a directory");
        let listener = UnixListener::bind(dir.path().join("socket")).expect("bind the socket");
        let state = Arc::new(State::new(step, failure));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = state.clone();
                // An error means that the client is gone.
                thread::spawn(move || state.serve(stream));
            }
        });
        FakeDaemon { dir }
    }

    /// Returns the value for `DOCKER_HOST`.
    pub fn host(&self) -> String {
        format!("unix://{}", self.dir.path().join("socket").display())
    }
}

/// The state of a daemon.
pub struct State {
    step: Step,
    failure: Failure,
    failed: AtomicBool,
    imported: AtomicBool,
}

impl State {
    pub fn new(step: Step, failure: Failure) -> State {
        State { step, failure, failed: false.into(), imported: false.into() }
    }

    /// Serves one connection.
    pub fn serve(&self, mut stream: impl Read + Write) -> io::Result<()> {
        let (request, length) = read_head(&mut stream)?;
        let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
        let method = request.split(' ').next().unwrap_or_default();
        let step = self.find_step(method, &path);
        if step.is_some_and(|step| step == self.step) {
            self.failed.store(true, Ordering::SeqCst);
        }
        if self.failed.load(Ordering::SeqCst) {
            return fail(stream, self.failure);
        }
        if let Some(length) = length {
            io::copy(&mut (&mut stream).take(length), &mut io::sink())?;
        } else if step == Some(Step::ImportImage) {
            read_chunks(&mut stream)?;
        }
        let (status, body) = match step {
            Some(Step::Version) => ("200 OK", r#"{"Version":"20.10.24","ApiVersion":"1.41"}"#),
            Some(Step::Create) => ("404 Not Found", r#"{"message":"No such image"}"#),
            Some(Step::InspectImage) => ("404 Not Found", r#"{"message":"No such image"}"#),
            Some(Step::ImportImage) => {
                self.imported.store(true, Ordering::SeqCst);
                ("200 OK", r#"{"status":"sha256:0"}"#)
            }
            Some(Step::CreateAgain) => ("201 Created", r#"{"Id":"0123456789ab","Warnings":[]}"#),
            Some(Step::Attach) => return self.hold_channel(stream),
            Some(Step::Start) => ("204 No Content", ""),
            Some(Step::Agent) | None => ("200 OK", "[]"),
        };
        write!(
            stream,
            "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nConnection: close\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        )
    }

    fn find_step(&self, method: &str, path: &str) -> Option<Step> {
        let imported = self.imported.load(Ordering::SeqCst);
        Some(match method {
            "GET" if path.ends_with("/version") => Step::Version,
            "GET" if path.contains("/images/") && path.ends_with("/json") => Step::InspectImage,
            "POST" if path.contains("/images/create") => Step::ImportImage,
            "POST" if path.contains("/containers/create") && imported => Step::CreateAgain,
            "POST" if path.contains("/containers/create") => Step::Create,
            "POST" if path.contains("/attach") => Step::Attach,
            "POST" if path.ends_with("/start") => Step::Start,
            _ => return None,
        })
    }

    fn hold_channel(&self, mut stream: impl Read + Write) -> io::Result<()> {
        stream
            .write_all(b"HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n")?;
        if self.step == Step::Agent {
            self.failed.store(true, Ordering::SeqCst);
            return fail(stream, self.failure);
        }
        io::copy(&mut stream, &mut io::sink()).map(drop)
    }
}

/// Reads the head of a request: its first line, and the length of the body if it has one.
fn read_head(stream: &mut impl Read) -> io::Result<(String, Option<u64>)> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let (first, fields) = head.split_once("\r\n").unwrap_or_default();
    let fields = fields.to_ascii_lowercase();
    let length = fields.lines().find_map(|line| line.strip_prefix("content-length:"));
    Ok((first.to_owned(), length.and_then(|length| length.trim().parse().ok())))
}

/// Reads a chunked body to its end.
fn read_chunks(stream: &mut impl Read) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    loop {
        let mut size = String::new();
        reader.read_line(&mut size)?;
        let size = u64::from_str_radix(size.trim(), 16).map_err(io::Error::other)?;
        io::copy(&mut (&mut reader).take(size + 2), &mut io::sink())?;
        if size == 0 {
            return Ok(());
        }
    }
}

fn fail(mut stream: impl Read + Write, failure: Failure) -> io::Result<()> {
    match failure {
        Failure::Silence => {
            thread::sleep(Duration::from_secs(120));
            Ok(())
        }
        Failure::Reset => stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Le"),
    }
}
