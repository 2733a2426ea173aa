//! A running emulated machine, from the start of QEMU to the end of the command.

use std::collections::VecDeque;
use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use chitin_nested_init::{Launch, MAX_LAUNCH_LEN, Report};

use super::Args;
use super::host::Host;
use super::qemu_args::{CHANNELS, build_arguments};
use super::streams::{Event, keep_tail, pass_output, read_reports, send_input};
use crate::process::{describe_start_failure, last_lines, new_command};
use crate::workspace;

/// The emulated machine boots in about 5 s; under other load, and with one deterministic CPU, in
/// several times that. A boot that takes longer is stuck.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// The time for the last output after the command has ended.
const DRAIN_LIMIT: Duration = Duration::from_secs(30);
/// The time for QEMU's own complaints to reach the thread that reads them.
const COMPLAINT_DELAY: Duration = Duration::from_millis(100);
/// Lines of the console that an error message repeats.
const CONSOLE_LINES: usize = 20;
/// The exit code of a command ended by a limit, as of coreutils' timeout.
const TIMED_OUT: u8 = 124;
/// The exit code when our own output has no reader any more: 128 + SIGPIPE.
const BROKEN_PIPE: u8 = 141;

/// A running QEMU; dropping it kills it.
pub struct Machine {
    qemu: Child,
    control: UnixStream,
    streams: Option<[UnixStream; 3]>,
    console: Arc<Mutex<VecDeque<u8>>>,
    started: Instant,
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Nothing in it needs saving: output has arrived, and writes to the shares are not cached.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

impl Machine {
    /// Starts QEMU, which ends with this process.
    pub fn start(program: &Path, args: &Args, host: &Host, shares: &[PathBuf]) -> Result<Self> {
        let mut ours = Vec::new();
        let mut theirs: Vec<OwnedFd> = Vec::new();
        for _ in CHANNELS {
            let (our_end, their_end) = UnixStream::pair().context("create a socket pair")?;
            ours.push(our_end);
            theirs.push(their_end.into());
        }
        let mut fds = [0; CHANNELS.len()];
        fds.iter_mut().zip(&theirs).for_each(|(fd, theirs)| *fd = theirs.as_raw_fd());
        let mut qemu = new_command(program, build_arguments(args, host, shares, &fds));
        qemu.stdout(Stdio::null()).stderr(Stdio::piped());
        inherit_and_die_with_us(&mut qemu, theirs);
        let started = Instant::now();
        let mut child = qemu.spawn().with_context(|| describe_start_failure(&qemu))?;
        // Closes our copies of the child's ends: a port then ends when QEMU does.
        drop(qemu);
        let [control, stdin, stdout, stderr, console_socket] =
            <[UnixStream; CHANNELS.len()]>::try_from(ours)
                .map_err(|_| anyhow!("one socket pair was created for each channel"))?;
        let console = Arc::new(Mutex::new(VecDeque::new()));
        let mut complaints: Vec<Box<dyn Read + Send>> = vec![Box::new(console_socket)];
        if let Some(stderr) = child.stderr.take() {
            complaints.push(Box::new(stderr));
        }
        for source in complaints {
            let (console, verbose) = (console.clone(), args.verbose);
            thread::spawn(move || keep_tail(source, &console, verbose));
        }
        let streams = Some([stdin, stdout, stderr]);
        Ok(Self { qemu: child, control, streams, console, started })
    }

    /// Runs the one command of this machine and returns its exit code.
    pub fn run(mut self, launch: &Launch, args: &Args) -> Result<u8> {
        let sent = self.send_launch(launch)?;
        let events = self.start_streams()?;
        if sent.is_err() {
            bail!(self.describe_failure("QEMU ended at once"));
        }
        let mut progress = Progress::new(args);
        loop {
            match events.recv_timeout(progress.time_left()) {
                Ok(Event::Report(Report::Started)) => {
                    if args.verbose {
                        let elapsed = self.started.elapsed().as_secs_f64();
                        eprintln!("nested: started after {elapsed:.1} s");
                    }
                    progress.start_command()?;
                }
                Ok(Event::Report(Report::Failed { code: 125, message })) => {
                    bail!(self.describe_failure(&message))
                }
                Ok(Event::Report(Report::Failed { code, message })) => {
                    eprintln!("xtask: {message}");
                    return Ok(code);
                }
                Ok(Event::Report(Report::Exited { code, stdout, stderr })) => {
                    progress.end_command(code, [stdout, stderr]);
                }
                Ok(Event::Output(stream, total)) => progress.count_output(stream, total),
                Ok(Event::BrokenPipe) => return Ok(BROKEN_PIPE),
                Ok(Event::Gone) | Err(RecvTimeoutError::Disconnected) => {
                    bail!(self.describe_failure("the emulated machine ended by itself"))
                }
                Err(RecvTimeoutError::Timeout) => match progress.describe_timeout() {
                    Timeout::OfCommand(message) => {
                        eprintln!("xtask: {message}");
                        return Ok(TIMED_OUT);
                    }
                    Timeout::OfMachine(message) => bail!(self.describe_failure(message)),
                },
            }
            if let Some(code) = progress.exit_code() {
                return Ok(code);
            }
        }
    }

    /// Writes the launch message to the socket, where it stays until PID 1 opens the port. The
    /// inner error means that QEMU has ended.
    fn send_launch(&mut self, launch: &Launch) -> Result<io::Result<()>> {
        let bytes = launch.encode();
        let len = u32::try_from(bytes.len()).ok().filter(|len| *len <= MAX_LAUNCH_LEN);
        let len = len.with_context(|| {
            format!("arguments and environment of {} bytes are too long", bytes.len())
        })?;
        let sent = self.control.write_all(&len.to_le_bytes());
        Ok(sent.and_then(|()| self.control.write_all(&bytes)))
    }

    /// Starts a thread for each stream, and returns their events.
    fn start_streams(&mut self) -> Result<Receiver<Event>> {
        let (events, receiver) = mpsc::channel();
        let reader = self.control.try_clone().context("duplicate a socket")?;
        let eof = self.control.try_clone().context("duplicate a socket")?;
        let [stdin, stdout, stderr] = self.streams.take().context("a machine runs once")?;
        let reports = events.clone();
        thread::spawn(move || read_reports(reader, &reports));
        let (out_events, err_events) = (events.clone(), events);
        thread::spawn(move || pass_output(0, stdout, io::stdout(), &out_events));
        thread::spawn(move || pass_output(1, stderr, io::stderr(), &err_events));
        thread::spawn(move || send_input(stdin, eof));
        Ok(receiver)
    }

    /// Returns an error message that ends with the last lines of the console, and keeps all of it
    /// in a file.
    fn describe_failure(&self, what: &str) -> String {
        thread::sleep(COMPLAINT_DELAY);
        let console =
            self.console.lock().map(|mut tail| tail.make_contiguous().to_vec()).unwrap_or_default();
        let log = workspace::target_dir().join("nested-console.log");
        let kept = fs::write(&log, &console).is_ok();
        let file = if kept { format!(" (all of it: {})", log.display()) } else { String::new() };
        format!(
            "{what}; the last lines of its console{file}:\n{}",
            last_lines(&console, CONSOLE_LINES)
        )
    }
}

/// Lets a child inherit these descriptors, and has the kernel kill it when this process ends.
fn inherit_and_die_with_us(command: &mut Command, fds: Vec<OwnedFd>) {
    let parent = rustix::process::getpid();
    // SAFETY: the closure runs between fork and exec and only makes system calls: it neither
    // allocates nor takes locks.
    unsafe {
        command.pre_exec(move || {
            for fd in &fds {
                rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
            }
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
            // A parent that ended before this call sends no signal.
            if rustix::process::getppid() != Some(parent) {
                return Err(io::Error::from(ErrorKind::BrokenPipe));
            }
            Ok(())
        });
    }
}

/// The state of the command, and the limit that ends the wait for its next event.
struct Progress {
    timeout: Duration,
    silence: Option<Duration>,
    running: bool,
    deadline: Instant,
    last_output: Instant,
    passed: [u64; 2],
    /// The exit code, and the number of bytes of both outputs.
    exit: Option<(u8, [u64; 2])>,
}

/// A limit that was reached.
enum Timeout<'a> {
    /// The command is at fault: it is ended.
    OfCommand(String),
    /// The machine is at fault: the run fails.
    OfMachine(&'a str),
}

impl Progress {
    fn new(args: &Args) -> Self {
        let now = Instant::now();
        Self {
            timeout: args.timeout,
            silence: args.silence,
            running: false,
            deadline: now + BOOT_LIMIT,
            last_output: now,
            passed: [0; 2],
            exit: None,
        }
    }

    fn start_command(&mut self) -> Result<()> {
        let now = Instant::now();
        self.running = true;
        self.deadline = now.checked_add(self.timeout).context("--timeout is too long")?;
        self.last_output = now;
        Ok(())
    }

    fn count_output(&mut self, stream: usize, total: u64) {
        self.passed[stream] = total;
        self.last_output = Instant::now();
    }

    fn end_command(&mut self, code: u8, output: [u64; 2]) {
        self.exit = Some((code, output));
        self.deadline = Instant::now() + DRAIN_LIMIT;
    }

    fn time_left(&self) -> Duration {
        let silent = match self.silence {
            Some(silence) if self.running && self.exit.is_none() => {
                self.last_output.checked_add(silence)
            }
            _ => None,
        };
        let until = silent.map_or(self.deadline, |silent| silent.min(self.deadline));
        until.saturating_duration_since(Instant::now())
    }

    fn describe_timeout(&self) -> Timeout<'_> {
        match (self.exit, self.running, self.silence) {
            (Some(_), _, _) => Timeout::OfMachine(
                "the last output of the command did not arrive within 30 seconds",
            ),
            (None, false, _) => {
                Timeout::OfMachine("the emulated machine did not boot within 3 minutes")
            }
            (None, true, Some(silence)) if Instant::now() < self.deadline => Timeout::OfCommand(
                format!("the command wrote nothing for {silence:?} and was ended (--silence)"),
            ),
            (None, true, _) => Timeout::OfCommand(format!(
                "the command was ended after {:?} (--timeout)",
                self.timeout
            )),
        }
    }

    /// Returns the exit code once the command has ended and all its output was passed on.
    fn exit_code(&self) -> Option<u8> {
        let (code, announced) = self.exit?;
        (self.passed[0] >= announced[0] && self.passed[1] >= announced[1]).then_some(code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_waits_for_announced_output() {
        let args = super::super::tests::parse(&["true"]).unwrap();
        let mut progress = Progress::new(&args);
        progress.count_output(0, 1);
        assert_eq!(progress.exit_code(), None);
        progress.end_command(7, [10, 2]);
        assert_eq!(progress.exit_code(), None);
        progress.count_output(0, 10);
        assert_eq!(progress.exit_code(), None);
        progress.count_output(1, 2);
        assert_eq!(progress.exit_code(), Some(7));
    }
}
