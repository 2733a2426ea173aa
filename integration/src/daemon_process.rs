//! A daemon's process: it ends with the test, writes to a log, and is stopped gently.

use std::fs::File;
use std::io;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// The time limit of a stop: a daemon stops its containers first.
pub const STOP_LIMIT: Duration = Duration::from_secs(30);

/// Returns the command of a daemon, which ends with this process, even if this process is killed.
pub fn new_daemon_command(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "TERM", program]);
    command
}

/// Starts a daemon with the file `log` of this directory as its output.
pub fn spawn_daemon(command: &mut Command, program: &str, dir: &Path) -> io::Result<Child> {
    let log = File::options().create(true).append(true).open(dir.join("log"))?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn().map_err(|error| {
        io::Error::other(format!("start {program}: {error} (cargo xtask setup installs it)"))
    })
}

/// Asks a daemon to end, and kills it if it does not.
pub fn stop_daemon(child: &mut Child) {
    // The signal fails if the daemon has ended.
    let _ = kill_process(Pid::from_child(child), Signal::TERM);
    let deadline = Instant::now() + STOP_LIMIT;
    while matches!(child.try_wait(), Ok(None)) && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(20));
    }
    let _ = child.kill();
    let _ = child.wait();
}
