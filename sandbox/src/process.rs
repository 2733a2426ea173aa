//! Commands in a sandbox, in the manner of [`std::process`].

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use chitin_protocol::{Exit, Start, Usage};
use chitin_spec::EndCause;
use tokio::io::AsyncReadExt;
use tokio::sync::oneshot::{self, error::RecvError};
use tracing::{Span, field};

use crate::channel::{StreamReader, StreamWriter};
use crate::error::Error;
use crate::session::{Deadline, Session};

/// A small static program of every root image that prints its arguments, for tests and benchmarks
/// of the sandbox itself.
pub const ECHO: &str = "/usr/lib/chitin/echo";

/// Bytes of each of standard output and standard error that [`Command::output`] collects if no
/// other limit is set. The workload decides how much it prints, and the embedding program pays.
pub const OUTPUT_LIMIT: usize = 16 * 1024 * 1024;

/// Time for a command that was killed at its time limit to be gone, so that it changes no file
/// while its results are copied out.
const KILL_LIMIT: Duration = Duration::from_secs(1);

/// SIGKILL.
const KILL: u8 = 9;

/// User and group of every workload: `agent` of the root image.
const AGENT_UID: u32 = 1000;

/// Home and first working directory of a workload, and the only directory that it owns.
const HOME: &str = "/work";

/// The environment of every workload. Nothing of the host's is passed on.
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
    piped_stdin: bool,
    output_limit: usize,
}

impl Command {
    pub(crate) fn new(session: Arc<Session>, program: OsString) -> Command {
        let extra = session.extra_environment.get().into_iter().flatten();
        let env = ENVIRONMENT
            .iter()
            .chain(extra)
            .map(|(name, value)| (name.into(), value.into()))
            .collect();
        Command {
            session,
            argv: vec![program],
            env,
            cwd: HOME.into(),
            piped_stdin: false,
            output_limit: OUTPUT_LIMIT,
        }
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

    /// Sets an environment variable. The last value of a name counts.
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Command {
        self.env.retain(|(other, _)| other != name.as_ref());
        self.env.push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Sets the working directory, `/work` if not set. A relative path is below `/work`.
    pub fn current_dir(mut self, dir: impl AsRef<OsStr>) -> Command {
        self.cwd = Path::new(HOME).join(dir.as_ref()).into();
        self
    }

    /// Gives the command a standard input that can be written to. If not set, the command reads an
    /// end of file.
    pub fn piped_stdin(mut self) -> Command {
        self.piped_stdin = true;
        self
    }

    /// Starts the command. A program that cannot be executed is reported by the exit status, as
    /// [`Exit::NotStarted`].
    ///
    /// # Errors
    /// Command and environment are too long for one message, too many streams are open, or the time
    /// limit was reached.
    pub fn spawn(self) -> Result<Process, Error> {
        if let Some(deadline) = self.session.deadline.filter(Deadline::is_past) {
            return Err(deadline.to_error());
        }
        let channel = &self.session.channel;
        let open_reader = || channel.open_reader().ok_or(Error::TooManyStreams);
        let stdin = match self.piped_stdin {
            true => Some(channel.open_writer().ok_or(Error::TooManyStreams)?),
            false => None,
        };
        let (stdout, stderr) = (open_reader()?, open_reader()?);
        let id = channel.next_id();
        // Arguments and environment may contain values of credentials: only the program is logged.
        let span = tracing::info_span!("exec", program = ?self.argv[0], exit = field::Empty);
        let env = self.env.into_iter();
        let env = env.map(|(name, value)| (name.into_vec(), value.into_vec())).collect();
        let start = Start {
            process: id,
            argv: self.argv.into_iter().map(OsString::into_vec).collect(),
            env,
            cwd: self.cwd.into_vec(),
            uid: AGENT_UID,
            gid: AGENT_UID,
            stdin: stdin.as_ref().map(StreamWriter::id),
            stdout: stdout.id(),
            stderr: stderr.id(),
        };
        let end = channel
            .start_process(start)
            .map_err(|error| Error::CommandTooLong { len: error.len })?;
        let (stdout, stderr) = (Some(stdout), Some(stderr));
        let session = self.session;
        Ok(Process { stdin, stdout, stderr, id, end, timed_out: false, session, span })
    }

    /// Sets the number of bytes of each of standard output and standard error that
    /// [`output`](Command::output) collects, [`OUTPUT_LIMIT`] if not set.
    pub fn output_limit(mut self, bytes: usize) -> Command {
        self.output_limit = bytes;
        self
    }

    /// Runs the command to its end and collects its output.
    ///
    /// Output beyond the [limit](Command::output_limit) is read and discarded, so that the command
    /// does not block on it, and [`Output::truncated`] is set. A command that writes without end
    /// runs until the time limit of its sandbox.
    ///
    /// # Errors
    /// As for [`spawn`](Command::spawn) and [`Process::wait`].
    pub async fn output(self) -> Result<Output, Error> {
        let limit = self.output_limit;
        let mut process = self.spawn()?;
        drop(process.stdin.take());
        let ((stdout, cut_stdout), (stderr, cut_stderr)) = tokio::join!(
            collect_output(process.stdout.take(), limit),
            collect_output(process.stderr.take(), limit)
        );
        let (exit, usage) = process.wait().await?;
        Ok(Output { exit, usage, stdout, stderr, truncated: cut_stdout || cut_stderr })
    }
}

/// Reads a stream to its end. Returns the first `limit` bytes, and true if there were more.
async fn collect_output(stream: Option<StreamReader>, limit: usize) -> (Vec<u8>, bool) {
    let mut bytes = Vec::new();
    let Some(mut stream) = stream else { return (bytes, false) };
    // A broken stream means a broken channel, and `wait` reports the reason.
    let limit = u64::try_from(limit).unwrap_or(u64::MAX);
    let _ = (&mut stream).take(limit).read_to_end(&mut bytes).await;
    let discarded = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
    (bytes, discarded.unwrap_or(0) > 0)
}

/// The result of a command that has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// The exit status.
    pub exit: Exit,
    /// The resources that it used.
    pub usage: Usage,
    /// The output to standard output.
    pub stdout: Vec<u8>,
    /// The output to standard error.
    pub stderr: Vec<u8>,
    /// True if there was more output than was collected: see [`Command::output_limit`].
    pub truncated: bool,
}

/// A command that runs or has ended.
#[derive(Debug)]
pub struct Process {
    /// Standard input, if it was requested. Dropping it is the end of file.
    pub stdin: Option<StreamWriter>,
    /// Standard output. It must be read: the command blocks when the window is full.
    pub stdout: Option<StreamReader>,
    /// Standard error. It must be read as well.
    pub stderr: Option<StreamReader>,
    id: u32,
    end: oneshot::Receiver<(Exit, Usage)>,
    /// The time limit was reached and the command was killed.
    timed_out: bool,
    session: Arc<Session>,
    /// Names the program and its exit status, and lasts until the process is dropped.
    span: Span,
}

impl Output {
    /// Returns the cause of the end: a limit of the sandbox if one was reached and the command
    /// failed.
    pub fn cause(&self) -> EndCause {
        EndCause::of_process(&self.exit, &self.usage)
    }
}

impl Process {
    /// Waits for the end of the command.
    ///
    /// # Errors
    /// The sandbox ended first: its time limit was reached, the guest died, or the agent broke the
    /// protocol.
    pub async fn wait(&mut self) -> Result<(Exit, Usage), Error> {
        match self.wait_for_end().await? {
            Ok((exit, mut usage)) => {
                self.span.record("exit", field::debug(&exit));
                let observed = self.session.instance.lock().await.reached_limits();
                usage.reached = usage.reached.merge(observed);
                Ok((exit, usage))
            }
            Err(_) => Err(self.session.explain_close().await),
        }
    }

    /// Waits for the end, at most until the time limit if the sandbox outlives that: the command is
    /// killed then.
    async fn wait_for_end(&mut self) -> Result<Result<(Exit, Usage), RecvError>, Error> {
        let grants_grace = |deadline: &Deadline| !deadline.copy_grace.is_zero();
        let Some(deadline) = self.session.deadline.filter(grants_grace) else {
            return Ok((&mut self.end).await);
        };
        if !self.timed_out {
            if let Ok(end) = tokio::time::timeout_at(deadline.at, &mut self.end).await {
                return Ok(end);
            }
            self.timed_out = true;
            self.signal(KILL);
            let _ = tokio::time::timeout(KILL_LIMIT, &mut self.end).await;
        }
        Err(deadline.to_error())
    }

    /// Sends a signal (a Linux number) to the command and its descendants, unless it has ended.
    pub fn signal(&self, signal: u8) {
        self.session.channel.send_signal(self.id, signal);
    }
}
