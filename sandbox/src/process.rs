use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStringExt;
use std::sync::Arc;

use chitin_protocol::{Exit, Start, Usage};
use tokio::io::AsyncReadExt;
use tokio::sync::oneshot;
use tracing::{Span, field};

use crate::Error;
use crate::channel::{StreamReader, StreamWriter};
use crate::session::Session;

/// The user every workload is, unless told otherwise: `agent` of the root image.
const AGENT_UID: u32 = 1000;

/// Where a workload starts: its home, and the one place that is its own.
const HOME: &str = "/work";

/// What every workload finds in its environment; nothing of the host's is passed on.
const ENVIRONMENT: [(&str, &str); 5] = [
    ("PATH", "/usr/local/bin:/usr/bin:/bin"),
    ("HOME", HOME),
    ("USER", "agent"),
    ("LANG", "C.UTF-8"),
    ("TMPDIR", "/tmp"),
];

/// A command to run in a sandbox, in the manner of [`std::process::Command`].
#[derive(Debug)]
pub struct Command {
    session: Arc<Session>,
    argv: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    cwd: OsString,
    stdin: bool,
}

impl Command {
    pub(crate) fn new(session: Arc<Session>, program: OsString) -> Command {
        let more = session.environment.get().into_iter().flatten();
        let env = ENVIRONMENT
            .iter()
            .chain(more)
            .map(|(name, value)| (name.into(), value.into()))
            .collect();
        Command { session, argv: vec![program], env, cwd: HOME.into(), stdin: false }
    }

    /// Adds one argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Command {
        self.argv.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    pub fn args(mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Command {
        self.argv.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Sets an environment variable. The last one of a name counts.
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Command {
        self.env.retain(|(other, _)| other != name.as_ref());
        self.env.push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Sets the working directory, `/work` if not set.
    pub fn current_dir(mut self, dir: impl AsRef<OsStr>) -> Command {
        self.cwd = dir.as_ref().to_owned();
        self
    }

    /// Gives the command a standard input to be written to; without it, it reads nothing.
    pub fn piped_stdin(mut self) -> Command {
        self.stdin = true;
        self
    }

    /// Starts the command. Whether it could be executed is known when it has ended: see [`Exit::NotStarted`].
    ///
    /// # Errors
    /// If command and environment are too long for one message, or too many streams are open.
    pub fn spawn(self) -> Result<Process, Error> {
        let channel = &self.session.channel;
        let open_reader = || channel.open_reader().ok_or(Error::TooManyStreams);
        let stdin = match self.stdin {
            true => Some(channel.open_writer().ok_or(Error::TooManyStreams)?),
            false => None,
        };
        let (stdout, stderr) = (open_reader()?, open_reader()?);
        let name = channel.name();
        // Arguments and environment may contain values of credentials: only the program is logged.
        let span = tracing::info_span!("exec", program = ?self.argv[0], exit = field::Empty);
        let start = Start {
            process: name,
            argv: self.argv.into_iter().map(OsString::into_vec).collect(),
            env: self
                .env
                .into_iter()
                .map(|(name, value)| (name.into_vec(), value.into_vec()))
                .collect(),
            cwd: self.cwd.into_vec(),
            uid: AGENT_UID,
            gid: AGENT_UID,
            stdin: stdin.as_ref().map(StreamWriter::id),
            stdout: stdout.id(),
            stderr: stderr.id(),
        };
        let ended =
            channel.start(start).map_err(|error| Error::CommandTooLong { len: error.len })?;
        Ok(Process {
            name,
            ended,
            stdin,
            stdout: Some(stdout),
            stderr: Some(stderr),
            session: self.session,
            span,
        })
    }

    /// Runs the command to its end and collects what it printed, without bound.
    ///
    /// # Errors
    /// As for [`spawn`](Command::spawn) and [`Process::wait`].
    pub async fn output(self) -> Result<Output, Error> {
        let mut process = self.spawn()?;
        drop(process.stdin.take());
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        if let (Some(mut out), Some(mut err)) = (process.stdout.take(), process.stderr.take()) {
            // A broken stream is a broken channel, and `wait` says why it broke.
            let _ = tokio::join!(out.read_to_end(&mut stdout), err.read_to_end(&mut stderr));
        }
        let (exit, usage) = process.wait().await?;
        Ok(Output { exit, usage, stdout, stderr })
    }
}

/// A command that has run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// How it ended.
    pub exit: Exit,
    /// What it used.
    pub usage: Usage,
    /// All it wrote to standard output.
    pub stdout: Vec<u8>,
    /// All it wrote to standard error.
    pub stderr: Vec<u8>,
}

/// A command that is running, or has.
#[derive(Debug)]
pub struct Process {
    /// Its standard input, if asked for. Dropping it is the end of file.
    pub stdin: Option<StreamWriter>,
    /// Its standard output. Read it, or the command stops when the window is full.
    pub stdout: Option<StreamReader>,
    /// Its standard error, likewise.
    pub stderr: Option<StreamReader>,
    name: u32,
    ended: oneshot::Receiver<(Exit, Usage)>,
    session: Arc<Session>,
    /// Lasts until this is dropped, and names the program and its end.
    span: Span,
}

impl Process {
    /// Waits for the end of the command.
    ///
    /// # Errors
    /// If the sandbox ended first: its time was up, the guest died, or the agent broke the protocol.
    pub async fn wait(&mut self) -> Result<(Exit, Usage), Error> {
        match (&mut self.ended).await {
            Ok(ended) => {
                self.span.record("exit", field::debug(&ended.0));
                Ok(ended)
            }
            Err(_) => Err(self.session.why_closed().await),
        }
    }

    /// Sends a signal (a Linux number) to the command and what it started, unless it has ended.
    pub fn signal(&self, signal: u8) {
        self.session.channel.signal(self.name, signal);
    }
}
