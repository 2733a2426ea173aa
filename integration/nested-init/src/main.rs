//! PID 1 of the emulated KVM host.
//!
//! It is the whole user space of the initrd. It loads the modules next to it, makes the outer
//! machine's tree its root (9p, read-only, under an overlay whose writes are discarded), runs the
//! one command of the [`Launch`] message, and reports how that ended. Then the host ends the
//! machine. A failure before the command runs is a [`Report::Failed`] and a line on the console.

mod failure;
mod mounts;
mod ports;

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use chitin_nested_init::{
    CONTROL_PORT, Launch, NOT_EXECUTABLE, NOT_FOUND, Report, STDERR_PORT, STDIN_PORT, STDOUT_PORT,
};
use rustix::process::{Resource, Rlimit, WaitOptions, setrlimit, wait};

use failure::{During, Failure, Result};
use mounts::{enter_outer_tree, load_modules, mount_kernel_file_systems};
use ports::{copy_input, copy_output, open_port, read_launch};

/// The time for the host to end the machine after the report.
const END_LIMIT: Duration = Duration::from_secs(30);

fn main() {
    let opened = mount_kernel_file_systems()
        .and_then(|()| load_modules())
        .and_then(|()| open_port(CONTROL_PORT));
    let mut control = match opened {
        Ok(control) => control,
        // The console is the only way to report this. The kernel panics when PID 1 ends, which ends
        // QEMU.
        Err(failure) => {
            eprintln!("nested-init: {}", failure.message);
            return;
        }
    };
    let report = run_launch(&mut control).unwrap_or_else(|Failure { code, message }| {
        eprintln!("nested-init: {message}");
        Report::Failed { code, message }
    });
    rustix::fs::sync();
    if writeln!(control, "{report}").is_err() {
        return;
    }
    // The host has everything and ends the machine. If it is gone, PID 1 ends it.
    thread::sleep(END_LIMIT);
}

/// Runs the command of the launch message.
fn run_launch(control: &mut File) -> Result<Report> {
    let launch = read_launch(control)?;
    let (stdin, stdout, stderr) =
        (open_port(STDIN_PORT)?, open_port(STDOUT_PORT)?, open_port(STDERR_PORT)?);
    enter_outer_tree(&launch)?;
    bring_loopback_up().during(|| "bring the loopback interface up".into())?;
    let nofile = Rlimit { current: Some(1024), maximum: Some(1 << 20) };
    setrlimit(Resource::Nofile, nofile).during(|| "raise the limit of open files".into())?;

    let mut child = start_command(&launch)?;
    let child_stdin: Option<OwnedFd> = child.stdin.take().map(Into::into);
    let (done_reader, done) = io::pipe().during(|| "create a pipe".into())?;
    let done_for_stderr = done_reader.try_clone().during(|| "duplicate a pipe".into())?;
    let out = child
        .stdout
        .take()
        .map(|pipe| thread::spawn(move || copy_output(pipe, stdout, done_reader)));
    let err = child
        .stderr
        .take()
        .map(|pipe| thread::spawn(move || copy_output(pipe, stderr, done_for_stderr)));
    writeln!(control, "{}", Report::Started).during(|| "write to the control port".into())?;
    let reader = control.try_clone().during(|| "duplicate the control port".into())?;
    thread::spawn(move || copy_input(reader, stdin, child_stdin));

    let code = wait_for_command(&child)?;
    drop(done);
    let count = |thread: Option<thread::JoinHandle<u64>>| {
        thread.and_then(|thread| thread.join().ok()).unwrap_or(0)
    };
    Ok(Report::Exited { code, stdout: count(out), stderr: count(err) })
}

/// Does the work of `ip link set lo up`.
fn bring_loopback_up() -> io::Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: ifreq is plain old data, for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(c"lo".to_bytes()) {
        *to = from.cast_signed();
    }
    let up = libc::IFF_UP | libc::IFF_RUNNING;
    request.ifr_ifru.ifru_flags = i16::try_from(up).map_err(io::Error::other)?;
    // SAFETY: SIOCSIFFLAGS reads one ifreq, which `request` is and which outlives the call.
    let result = unsafe {
        libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, std::ptr::from_ref(&request))
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn start_command(launch: &Launch) -> Result<Child> {
    let cwd = Path::new(OsStr::from_bytes(&launch.cwd));
    if !cwd.is_dir() {
        let message = format!("{} is not a directory on the emulated machine", cwd.display());
        return Err(Failure::of_host(message));
    }
    let program = OsStr::from_bytes(&launch.argv[0]);
    let mut command = Command::new(program);
    command.args(launch.argv[1..].iter().map(|argument| OsStr::from_bytes(argument)));
    command.current_dir(cwd).env_clear();
    for variable in &launch.env {
        if let Some(at) = variable.iter().position(|&byte| byte == b'=') {
            command.env(OsStr::from_bytes(&variable[..at]), OsStr::from_bytes(&variable[at + 1..]));
        }
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    command.spawn().map_err(|error| Failure {
        code: if error.kind() == io::ErrorKind::NotFound { NOT_FOUND } else { NOT_EXECUTABLE },
        message: format!("{}: {error}", program.display()),
    })
}

/// Reaps every process, as PID 1 must, until the command ends, and returns its exit code.
fn wait_for_command(child: &Child) -> Result<u8> {
    loop {
        let ended = match wait(WaitOptions::empty()) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other.during(|| "wait for the command".into())?,
        };
        let Some((pid, status)) = ended else { continue };
        if u32::try_from(pid.as_raw_nonzero().get()).ok() != Some(child.id()) {
            continue;
        }
        let code = status.exit_status().or(status.terminating_signal().map(|signal| 128 + signal));
        return Ok(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX));
    }
}
