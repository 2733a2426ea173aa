//! The command `chitin`, started in a separate directory, and its outcome.

use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::thread;

use serde_json::Value;
use tempfile::TempDir;

use crate::{Running, binary_path};

/// The outcome of one `chitin`.
#[derive(Debug)]
pub struct Outcome {
    /// The exit code, or 128 + n if signal n ended it.
    pub code: i32,
    /// The bytes of standard output.
    pub stdout: Vec<u8>,
    /// The text of standard error; invalid UTF-8 is replaced.
    pub stderr: String,
}

impl Outcome {
    /// Returns standard output as text, without the final newline.
    pub fn stdout_text(&self) -> &str {
        std::str::from_utf8(&self.stdout).expect("UTF-8 output").trim_end_matches('\n')
    }

    /// Asserts exit code 0 and returns standard output as text.
    #[track_caller]
    pub fn assert_success(&self) -> &str {
        assert_eq!(self.code, 0, "{self:?}");
        self.stdout_text()
    }

    /// Asserts that Chitin refused, with exit code 125 and one line that contains `words`.
    #[track_caller]
    pub fn assert_refused(&self, words: &str) {
        self.assert_error(125, words);
    }

    /// Asserts that the command line was invalid: exit code 2, and one line that contains `words`.
    #[track_caller]
    pub fn assert_usage_error(&self, words: &str) {
        self.assert_error(2, words);
    }

    #[track_caller]
    fn assert_error(&self, code: i32, words: &str) {
        assert_eq!(self.code, code, "{self:?}");
        assert!(self.stderr.contains(words), "no `{words}` in: {}", self.stderr);
        let lines = self.stderr.trim_end().lines().count();
        assert_eq!(lines, 1, "more than one line: {}", self.stderr);
        assert!(self.stderr.starts_with("chitin: "), "{}", self.stderr);
    }
}

/// A `chitin` to be started in a separate directory, by which its processes are recognized.
#[derive(Debug)]
pub struct Chitin {
    command: Command,
    dir: TempDir,
    stdin: Vec<u8>,
}

/// Returns `chitin` with these arguments, split at spaces, for a host that runs microVMs.
pub fn chitin(args: &str) -> Chitin {
    require_microvms();
    Chitin::new(args)
}

/// Returns `chitin run --` with this command, split at spaces.
pub fn run(command: &str) -> Chitin {
    chitin(&format!("run -- {command}"))
}

/// Returns `chitin run -- sh -c SCRIPT`.
pub fn run_sh(script: &str) -> Chitin {
    run("sh -c").arg(script)
}

impl Chitin {
    /// Returns `chitin` with these arguments, split at spaces, for any host.
    pub fn new(args: &str) -> Chitin {
        let dir = tempfile::tempdir().expect("create a directory");
        let mut command = Command::new(binary_path("chitin"));
        command.args(args.split_whitespace()).current_dir(&dir);
        Chitin { command, dir, stdin: Vec::new() }
    }

    /// Adds one argument, unsplit.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Chitin {
        self.command.arg(arg);
        self
    }

    /// Adds arguments, unsplit.
    pub fn args(mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Chitin {
        self.command.args(args);
        self
    }

    /// Sets an environment variable of `chitin` itself.
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Chitin {
        self.command.env(name, value);
        self
    }

    /// Sets the bytes of standard input.
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Chitin {
        self.stdin = bytes.into();
        self
    }

    /// Starts `chitin` through another program, which gets the command after these words.
    pub fn run_through(mut self, words: &[&OsStr]) -> Chitin {
        let [program, words @ ..] = words else { return self };
        let mut command = Command::new(program);
        command.args(words).arg(self.command.get_program()).args(self.command.get_args());
        for (name, value) in self.command.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command.current_dir(self.dir.path());
        self.command = command;
        self
    }

    /// Returns the command, to be changed or started in another way.
    pub fn command(&mut self) -> &mut Command {
        &mut self.command
    }

    /// Starts `chitin` with pipes on all three standard streams.
    pub fn spawn(mut self) -> Running {
        self.command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = self.command.spawn().expect("start chitin");
        Running::new(child, self.dir)
    }

    /// Runs `chitin` to its end, and asserts that no process is left.
    #[track_caller]
    pub fn outcome(mut self) -> Outcome {
        let stdin = std::mem::take(&mut self.stdin);
        let mut running = self.spawn();
        let mut pipe = running.child.stdin.take().expect("stdin is piped");
        let writer = thread::spawn(move || {
            // A workload need not read all of it.
            let _ = pipe.write_all(&stdin);
        });
        let stdout = collect_bytes(running.child.stdout.take().expect("stdout is piped"));
        let stderr = collect_bytes(running.child.stderr.take().expect("stderr is piped"));
        let code = running.wait();
        writer.join().expect("write stdin");
        let stdout = stdout.join().expect("read stdout");
        let stderr = String::from_utf8_lossy(&stderr.join().expect("read stderr")).into_owned();
        running.assert_no_process_left();
        Outcome { code, stdout, stderr }
    }

    /// Runs `chitin` with `OPTION FILE` and then `args` added, and returns the JSON of the file.
    #[track_caller]
    pub fn outcome_with_json(self, option: &str, args: &[&str]) -> (Outcome, Value) {
        let dir = tempfile::tempdir().expect("create a directory");
        let path = dir.path().join("report.json");
        let outcome = self.arg(option).arg(&path).args(args).outcome();
        let json =
            fs::read(&path).unwrap_or_else(|error| panic!("no report: {error}: {outcome:?}"));
        (outcome, serde_json::from_slice(&json).expect("JSON"))
    }
}

fn collect_bytes(mut from: impl Read + Send + 'static) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        from.read_to_end(&mut bytes).expect("read a pipe");
        bytes
    })
}

/// Fails the test, with the reason, on a host that cannot run microVMs.
fn require_microvms() {
    static VERDICT: OnceLock<Result<(), String>> = OnceLock::new();
    let verdict = VERDICT.get_or_init(|| {
        let doctor = Command::new(binary_path("chitin")).args(["doctor"]).output();
        match doctor {
            Ok(output) if output.status.success() => Ok(()),
            Ok(output) => Err(String::from_utf8_lossy(&output.stdout).into_owned()),
            Err(error) => Err(format!("{}: {error}", binary_path("chitin").display())),
        }
    });
    if let Err(reason) = verdict {
        panic!("this host cannot run microVMs; `cargo xtask test` emulates one.\n{reason}");
    }
}
