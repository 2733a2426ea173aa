//! A running `chitin` and the processes that belong to it.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::{CLEANUP_LIMIT, LIMIT};

/// A running `chitin`.
#[derive(Debug)]
pub struct Running {
    /// The process, with its pipes.
    pub child: Child,
    dir: TempDir,
    /// PID and start time of every process that was recognized as part of this run.
    seen: RefCell<BTreeSet<(u32, u64)>>,
}

/// A process that has not ended.
struct Process {
    path: PathBuf,
    pid: u32,
    parent: u32,
    /// The start in clock ticks since the host's boot. It distinguishes a reused PID.
    started: u64,
    /// Set if its working directory is that of the run.
    in_dir: bool,
}

impl Process {
    fn read(path: PathBuf, dir: &Path) -> Option<Process> {
        let pid = path.file_name()?.to_str()?.parse().ok()?;
        let stat = fs::read_to_string(path.join("stat")).ok()?;
        // After the name, which may contain any byte: the state, the parent, and the start time
        // as the 22nd of all fields.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let (state, parent, started) = (*fields.first()?, fields.get(1)?, fields.get(19)?);
        let in_dir = fs::read_link(path.join("cwd")).is_ok_and(|cwd| cwd == dir);
        let alive = !["Z", "X"].contains(&state);
        alive.then_some(Process {
            pid,
            parent: parent.parse().ok()?,
            started: started.parse().ok()?,
            in_dir,
            path,
        })
    }
}

impl Running {
    pub(crate) fn new(child: Child, dir: TempDir) -> Running {
        Running { child, dir, seen: RefCell::default() }
    }

    /// Waits for the end, and returns the exit code, or 128 + signal.
    #[track_caller]
    pub fn wait(&mut self) -> i32 {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.child.try_wait().expect("wait for chitin") {
                return status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
            }
            if Instant::now() > deadline {
                let _ = self.child.kill();
                panic!("chitin has not ended within {LIMIT:?}");
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Sends a signal to `chitin`.
    pub fn send_signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("send a signal");
    }

    /// Waits for a line on standard output, and returns it; an empty one at the end of the stream.
    #[track_caller]
    pub fn read_line(&mut self) -> String {
        let stdout = self.child.stdout.as_mut().expect("stdout is piped");
        let mut line = Vec::new();
        let mut byte = [0];
        while line.last() != Some(&b'\n') {
            if stdout.read(&mut byte).expect("read stdout") == 0 {
                break;
            }
            line.push(byte[0]);
        }
        String::from_utf8(line).expect("UTF-8").trim_end().to_owned()
    }

    /// Reads standard error to its end.
    #[track_caller]
    pub fn read_stderr(&mut self) -> String {
        let mut text = String::new();
        let mut stderr = self.child.stderr.take().expect("stderr is piped");
        stderr.read_to_string(&mut text).expect("read stderr");
        text
    }

    /// Returns the working directory of `chitin`.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Lists the processes of this run: `chitin`, the supervisor, and the jailed monitor. A process
    /// that was listed once is recognized again after its parents have ended.
    pub fn list_processes(&self) -> Vec<PathBuf> {
        let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
        let dir = fs::canonicalize(&self.dir).expect("the directory exists");
        let all: Vec<Process> =
            entries.filter_map(|entry| Process::read(entry.ok()?.path(), &dir)).collect();
        let mut seen = self.seen.borrow_mut();
        loop {
            let children = all.iter().filter(|process| {
                process.in_dir || seen.iter().any(|(pid, _)| *pid == process.parent)
            });
            let found: Vec<_> = children
                .map(|process| (process.pid, process.started))
                .filter(|id| !seen.contains(id))
                .collect();
            if found.is_empty() {
                break;
            }
            seen.extend(found);
        }
        all.into_iter()
            .filter(|process| seen.contains(&(process.pid, process.started)))
            .map(|process| process.path)
            .collect()
    }

    /// Asserts that every process of this run ends without help.
    #[track_caller]
    pub fn assert_no_process_left(&self) {
        let deadline = Instant::now() + CLEANUP_LIMIT;
        loop {
            let left = self.list_processes();
            if left.is_empty() {
                return;
            }
            assert!(Instant::now() < deadline, "left behind: {left:?}");
            thread::sleep(Duration::from_millis(20));
        }
    }
}
