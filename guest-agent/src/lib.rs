//! The agent: PID 1 of every Chitin sandbox. It serves one channel to the host, starts what the host asks for,
//! locked down, and keeps nothing from the host that it can hand on.
//!
//! ```text
//!                 chitin-agent            channel        file systems     when the channel ends
//!   microVM       (no arguments, PID 1)   vsock 2:1024   made here        reset the machine
//!   container     --stdio                 fd 0 and 1     the runtime's    end all processes, exit
//!   gVisor        --stdio --own-kernel    fd 0 and 1     the runtime's    end all processes, exit
//!   test          --stdio --build-root    fd 0 and 1     made here        end all processes, exit
//! ```
//!
//! One thread, one epoll loop ([`event_loop`]): channel ⇄ `Connection` ⇄ pumps ⇄ pipes of processes and copy jobs.
//! Nothing in the loop blocks. Copies run in threads of their own, because file systems do block.
//!
//! The host is trusted (it could end the sandbox anyway), yet its input is checked like any other; the workload
//! is hostile. A breach of the protocol ends the sandbox, any other failure ends one request.

mod cgroup;
mod copy_jobs;
mod egress;
mod event_loop;
mod identity;
mod io;
mod lockdown;
mod processes;
mod root_fs;
mod secrets;
mod shutdown;
mod syscall;

use std::fmt::Display;

use chitin_protocol::Failure;
use rustix::io::Errno;

/// What is started how: see the table above.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mode {
    stdio: bool,
    build_root: bool,
    /// The kernel is the sandbox's alone, though the file systems are not.
    own_kernel: bool,
}

impl Mode {
    fn of(arguments: &[&[u8]]) -> Result<Mode, String> {
        let mut mode = Mode { stdio: false, build_root: false, own_kernel: false };
        for argument in arguments.iter().skip(1) {
            match *argument {
                b"--stdio" => mode.stdio = true,
                b"--build-root" => mode.build_root = true,
                b"--own-kernel" => mode.own_kernel = true,
                other => {
                    return Err(format!("unknown argument {}", String::from_utf8_lossy(other)));
                }
            }
        }
        Ok(mode)
    }
}

/// Runs the agent until its channel ends, and gives the exit code: 0 after a channel that was closed, 1 after a
/// failure or a [`chitin_protocol::Fault`], 2 if it was called wrongly. As PID 1 of a microVM it does not return.
///
/// `arguments` include the program's name.
pub fn run(arguments: &[&[u8]]) -> i32 {
    let started_ns = boottime_ns();
    let init = rustix::process::getpid().is_init();
    // The kernel passes words of its command line that it does not know to init: they are not for us.
    let machine = init && !arguments.contains(&b"--stdio".as_slice());
    let machine_mode = Mode { stdio: false, build_root: true, own_kernel: false };
    let mode = if machine { Ok(machine_mode) } else { Mode::of(arguments) };
    let mode = match mode {
        Ok(mode) if mode.stdio || machine => mode,
        Ok(_) => {
            log(
                "this is the init of a sandbox; elsewhere it needs --stdio, with the channel on descriptors 0 and 1",
            );
            return 2;
        }
        Err(problem) => {
            log(problem);
            return 2;
        }
    };
    let end = event_loop::Agent::new(mode, started_ns).and_then(|mut agent| {
        let end = agent.serve();
        agent.finish(init);
        end
    });
    let code = match end {
        Ok(()) => 0,
        Err(error) => {
            log(error);
            1
        }
    };
    if machine {
        shutdown::reset_machine();
    }
    code
}

/// Nanoseconds of `CLOCK_BOOTTIME`.
fn boottime_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

/// One line to standard error, which in a microVM is the kernel log, whose tail the host shows.
fn log(problem: impl Display) {
    // One write: the kernel log makes a record of each.
    let line = format!("chitin-agent: {problem}\n");
    let _ = rustix::io::write(rustix::stdio::stderr(), line.as_bytes());
}

/// A system call that failed while the agent set itself or its sandbox up.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation} {object}: {errno}")]
pub(crate) struct SystemError {
    pub operation: &'static str,
    pub object: String,
    pub errno: Errno,
}

/// Names the operation and the object of a failed system call.
pub(crate) trait Context<T> {
    fn context(self, operation: &'static str, object: impl Display) -> Result<T, SystemError>;
}

impl<T> Context<T> for Result<T, Errno> {
    fn context(self, operation: &'static str, object: impl Display) -> Result<T, SystemError> {
        self.map_err(|errno| SystemError { operation, object: object.to_string(), errno })
    }
}

/// What a [`Failure`] says at most: a path may have 256 KiB, and an answer has to fit a control frame.
const MAX_FAILURE: usize = 512;

/// A failure for the host. `object` may be any bytes.
fn failure(operation: &str, object: &[u8], errno: Errno) -> Failure {
    let object = String::from_utf8_lossy(&object[..object.len().min(MAX_FAILURE)]);
    let operation =
        if object.is_empty() { operation.to_owned() } else { format!("{operation} {object}") };
    Failure { operation, errno: errno.raw_os_error() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_read_and_nothing_else() {
        let mode = |arguments: &[&[u8]]| Mode::of(&[&[b"init".as_slice()], arguments].concat());
        let stdio = Mode { stdio: true, build_root: false, own_kernel: false };
        assert_eq!(mode(&[b"--stdio"]), Ok(stdio));
        assert_eq!(mode(&[b"--stdio", b"--build-root"]), Ok(Mode { build_root: true, ..stdio }));
        assert_eq!(mode(&[b"--stdio", b"--own-kernel"]), Ok(Mode { own_kernel: true, ..stdio }));
        assert!(mode(&[b"--help"]).is_err());
    }

    #[test]
    fn a_failure_is_short_whatever_it_is_about() {
        let failure = failure("enter", &[0xff; 100_000], Errno::NOENT);
        assert!(failure.operation.len() < 4 * MAX_FAILURE, "{}", failure.operation.len());
    }
}
