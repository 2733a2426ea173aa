//! The processes that the host has started.
//!
//! ```text
//!   started ──(SIGCHLD: reaped)──▶ Exited sent, forgotten; pumps continue until pipes are empty
//! ```

mod child;
mod launch;
mod reap;
mod spawn;

use std::os::fd::OwnedFd;

use chitin_protocol::{
    Direction, Exit, Fault, Start, StartError, StreamId, ToHost, Unexpected, Usage,
};
use rustix::fs::{Gid, Mode, OFlags, Uid};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;

use crate::error::make_failure;
use crate::io::transport::Transport;
use crate::limit_watch::{LimitCounts, LimitWatch};
use crate::syscall::check_result;
pub use launch::LaunchContext;
use launch::{Child, LaunchError, StandardStreams};

/// The most processes of the host at the same time; the cgroup bounds those that they start
/// themselves. Each has three of the connection's 256 streams.
const MAX_PROCESSES: usize = 64;

/// A process that the host has started.
struct Process {
    /// The id that the host has chosen.
    id: u32,
    child: Child,
    stdin: Option<StreamId>,
    stdout: StreamId,
    stderr: StreamId,
    /// The counters of limits when it was started.
    counts: LimitCounts,
    /// Set once the process has been reaped.
    exit: Option<(Exit, Usage)>,
}

/// All processes whose exit has not been reported yet.
#[derive(Default)]
pub struct Processes {
    table: Vec<Process>,
}

impl Processes {
    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    /// Forgets all processes: their ids belong to a connection that has ended.
    pub fn clear(&mut self) {
        self.table.clear();
    }

    /// Starts a process and pumps its streams. A failure is reported as its exit.
    pub fn start(
        &mut self,
        start: &Start,
        transport: &mut Transport,
        context: &LaunchContext<'_>,
    ) -> Result<(), Fault> {
        if self.table.iter().any(|process| process.id == start.process) {
            return Err(Unexpected::ProcessIdInUse(start.process).into());
        }
        let mut streams = vec![(start.stdout, Direction::Send), (start.stderr, Direction::Send)];
        streams.extend(start.stdin.map(|stream| (stream, Direction::Receive)));
        // Ids only grow, and a host may open the three in any order.
        streams.sort_by_key(|(stream, _)| *stream);
        for (stream, direction) in streams {
            transport.connection.accept_stream(stream, direction)?;
        }
        let counts = context.limit_watch.count();
        if let Err((error, failure)) = self.try_start(start, counts, transport, context) {
            for stream in start.stdin.into_iter().chain([start.stdout, start.stderr]) {
                transport.drop_pump(stream);
            }
            transport.connection.end_stream(start.stdout);
            transport.connection.end_stream(start.stderr);
            if let Some(stdin) = start.stdin {
                transport.connection.reset_stream(stdin);
            }
            let exit = Exit::NotStarted { error, failure };
            transport.send(&ToHost::Exited {
                process: start.process,
                exit,
                usage: Usage {
                    reached: context.limit_watch.reached_since(counts),
                    ..Usage::default()
                },
            });
        }
        Ok(())
    }

    fn try_start(
        &mut self,
        start: &Start,
        counts: LimitCounts,
        transport: &mut Transport,
        context: &LaunchContext<'_>,
    ) -> Result<(), LaunchError> {
        if self.table.len() >= MAX_PROCESSES {
            return Err(refuse("start more than 64 processes at a time")(Errno::AGAIN));
        }
        let owner = (start.uid, start.gid);
        let (stdout, stdout_child) = open_pipe(owner)?;
        let (stderr, stderr_child) = open_pipe(owner)?;
        let stdin_child = match start.stdin {
            Some(stream) => {
                let (child, stdin) = open_pipe(owner)?;
                transport.pump_to_pipe(stream, stdin).map_err(refuse("watch a pipe"))?;
                child
            }
            None => rustix::fs::open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
                .map_err(refuse("open /dev/null"))?,
        };
        transport.pump_from_pipe(start.stdout, stdout).map_err(refuse("watch a pipe"))?;
        transport.pump_from_pipe(start.stderr, stderr).map_err(refuse("watch a pipe"))?;

        let streams =
            StandardStreams { stdin: stdin_child, stdout: stdout_child, stderr: stderr_child };
        let child = launch::launch_process(start, &streams, context)?;
        self.table.push(Process {
            id: start.process,
            child,
            stdin: start.stdin,
            stdout: start.stdout,
            stderr: start.stderr,
            counts,
            exit: None,
        });
        Ok(())
    }

    /// Sends a signal to the process group of a process. Ids of processes that have ended, and
    /// numbers that are not signals, have no effect.
    pub fn signal(&self, id: u32, signal: u8) {
        // The pid of a process that has been reaped may belong to another one.
        let is_running = |process: &&Process| process.id == id && process.exit.is_none();
        let Some(process) = self.table.iter().find(is_running) else { return };
        let pid = process.child.pid.as_raw_pid();
        // SAFETY: sending a signal touches no memory. The pid is that of an unreaped child, which
        // still has it. rustix would refuse real-time signals.
        let sent = unsafe { check_result(libc::kill(-pid, signal.into())) };
        if sent == Err(Errno::SRCH) {
            // The child has not created its session yet.
            // SAFETY: as above, for the child alone.
            let _ = unsafe { libc::kill(pid, signal.into()) };
        }
    }

    /// Reaps every child that has ended: processes of the host, and orphans that PID 1 inherits.
    pub fn reap(&mut self, transport: &mut Transport, limit_watch: &LimitWatch) {
        while let Some(reaped) = reap::reap_child() {
            let has_ended = |process: &&mut Process| {
                process.exit.is_none() && process.child.pid.as_raw_pid() == reaped.pid
            };
            let Some(process) = self.table.iter_mut().find(has_ended) else { continue };
            let exit = match process.child.read_launch_error() {
                Some((error, failure)) => Exit::NotStarted { error, failure },
                None => reaped.exit,
            };
            let reached = limit_watch.reached_since(process.counts);
            process.exit = Some((exit, Usage { reached, ..reaped.usage }));
            transport.drain_output(process.stdout);
            transport.drain_output(process.stderr);
            if let Some(stdin) = process.stdin {
                transport.drop_pump(stdin);
                transport.connection.reset_stream(stdin);
            }
        }
    }

    /// Reports the exits of processes that have been reaped, and forgets them.
    pub fn report_exits(&mut self, transport: &mut Transport) {
        for process in self.table.extract_if(.., |process| process.exit.is_some()) {
            if let Some((exit, usage)) = process.exit {
                transport.send(&ToHost::Exited { process: process.id, exit, usage });
            }
        }
    }
}

fn refuse(operation: &'static str) -> impl Fn(Errno) -> LaunchError {
    move |errno| (StartError::Other, make_failure(operation, b"", errno))
}

/// Opens a pipe that belongs to this user and group, so that the workload can open it again as
/// `/dev/stdin`, `/dev/stdout` or `/dev/stderr`.
fn open_pipe((uid, gid): (u32, u32)) -> Result<(OwnedFd, OwnedFd), LaunchError> {
    let open = || rustix::pipe::pipe_with(PipeFlags::CLOEXEC);
    let pipe = open().map_err(refuse("create a pipe"))?;
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(gid));
    match rustix::fs::fchown(&pipe.0, Some(user), Some(group)) {
        Ok(()) => Ok(pipe),
        // gVisor cannot change the owner of a pipe: it is the user who creates it.
        Err(Errno::PERM) => run_as_user(user, open).map_err(refuse("create a pipe")),
        Err(errno) => Err(refuse("change the owner of a pipe")(errno)),
    }
}

/// Runs `operation` with this effective user. Real and saved user stay the agent's, so that no
/// process of that user may signal or inspect the agent meanwhile.
fn run_as_user<T>(user: Uid, operation: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
    let agent = rustix::process::getuid();
    // For this thread alone: the C library's functions would change all of them.
    rustix::thread::set_thread_res_uid(agent, user, agent)?;
    let result = operation();
    rustix::thread::set_thread_res_uid(agent, agent, agent)?;
    result
}
