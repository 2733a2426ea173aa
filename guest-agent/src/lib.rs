//! The agent: PID 1 of every Chitin sandbox. It serves one channel to the host, and starts and
//! confines the processes that the host asks for.
//!
//! ```text
//!                 chitin-agent            channel        file systems     when the channel ends
//!   microVM       (no arguments, PID 1)   vsock 2:1024   made here        reset the machine
//!   container     --stdio                 fd 0 and 1     the runtime's    end all processes, exit
//!   gVisor        --stdio --own-kernel    fd 0 and 1     the runtime's    end all processes, exit
//!   test          --stdio --build-root    fd 0 and 1     made here        end all processes, exit
//! ```
//!
//! The modules, in the order in which a sandbox meets them:
//!
//! ```text
//!   mode, setup      arguments; everything until the event loop starts
//!   root_fs, kernel  file systems and kernel parameters of a microVM
//!   loopback         the loopback interface
//!   lockdown/        privileges, limits, seccomp and Landlock, under which the workload runs
//!   cgroup/          limits of the workload as a whole
//!   event_loop       one thread, one epoll, one turn after the other
//!   io/              channel ⇄ connection ⇄ pumps ⇄ pipes and sockets
//!   dispatch         a handler for each message of the host
//!   processes/       launch, signal and reap
//!   secrets/         credentials, in memory or in the environment
//!   copy_jobs/       file trees in and out, each in a thread, because file systems block
//!   egress/          DNS answers, and listeners on the loopback interface
//!   identity/        freeze, reconnect and reseed: the way from a template to a copy
//!   shutdown         the end of the sandbox
//! ```
//!
//! Nothing in the event loop blocks. The host is trusted (it could end the sandbox at any time),
//! yet its input is validated like any other. The workload is hostile. A protocol violation ends
//! the sandbox; any other failure ends one request.

mod cgroup;
mod copy_jobs;
mod descriptors;
mod dispatch;
mod egress;
mod error;
mod event_loop;
mod identity;
mod io;
mod kernel;
mod limit_watch;
mod lockdown;
mod loopback;
mod mode;
mod processes;
mod root_fs;
mod secrets;
mod setup;
mod shutdown;
mod signals;
mod syscall;

use std::fmt::Display;

pub use egress::dns;
use event_loop::Agent;
use mode::Mode;

/// Runs the agent until its channel ends, and returns its exit code: 0 after the channel was
/// closed, 1 after a failure or a [`chitin_protocol::Fault`], 2 after a usage error. As PID 1 of a
/// microVM it does not return.
///
/// `arguments` include the program's name.
pub fn run(arguments: &[&[u8]]) -> i32 {
    let started_ns = read_boottime_ns();
    let is_init = rustix::process::getpid().is_init();
    let mode = match Mode::parse(arguments, is_init) {
        Ok(mode) => mode,
        Err(error) => {
            log_line(error);
            return 2;
        }
    };
    let result = Agent::set_up(mode, started_ns).and_then(|mut agent| {
        let result = agent.serve();
        agent.finish(is_init);
        result
    });
    let code = match result {
        Ok(()) => 0,
        Err(error) => {
            log_line(error);
            1
        }
    };
    if mode.is_microvm() {
        shutdown::reset_machine();
    }
    code
}

/// Returns `CLOCK_BOOTTIME` in nanoseconds.
fn read_boottime_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

/// Writes one line to standard error. In a microVM that is the kernel log, the end of which the
/// host shows.
fn log_line(problem: impl Display) {
    // One write, because the kernel log makes a record of each.
    let line = format!("chitin-agent: {problem}\n");
    let _ = rustix::io::write(rustix::stdio::stderr(), line.as_bytes());
}
