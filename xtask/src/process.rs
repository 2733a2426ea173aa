//! Other programs as child processes: always an argument vector, never a shell line.

use std::ffi::OsStr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output, Stdio};

use anyhow::{Context, Result, bail};

/// Lines of standard error that an error message repeats.
const ERROR_LINES: usize = 12;

/// Returns a command with arguments and an empty standard input.
pub fn new_command(
    program: impl AsRef<OsStr>,
    args: impl IntoIterator<Item = impl AsRef<OsStr>>,
) -> Command {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null());
    command
}

/// Runs a command that writes to our own standard streams. The error names the command; its cause
/// is printed above.
pub fn run_command(command: &mut Command) -> Result<()> {
    let status = run_for_status(command)?;
    check_status(command, status)
}

/// Runs a command that writes to our own standard streams, and returns how it ended.
pub fn run_for_status(command: &mut Command) -> Result<ExitStatus> {
    command.status().with_context(|| describe_start_failure(command))
}

/// Prints a command, then runs it: for commands that take long or change the machine.
pub fn announce_and_run(command: &mut Command) -> Result<()> {
    eprintln!("running: {}", display_command(command));
    run_command(command)
}

/// Runs a command and returns its standard output. The error ends with the last lines of its
/// standard error.
pub fn capture_output(command: &mut Command) -> Result<String> {
    let Output { status, stdout, stderr } =
        command.output().with_context(|| describe_start_failure(command))?;
    if !status.success() {
        bail!(
            "{} failed ({status}): {}",
            display_command(command),
            last_lines(&stderr, ERROR_LINES)
        );
    }
    Ok(String::from_utf8_lossy(&stdout).into_owned())
}

/// Returns the first line of `PROGRAM --version`.
pub fn query_version(program: &str) -> Result<String> {
    let text = capture_output(&mut new_command(program, ["--version"]))?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

/// Returns an error that names the command, unless it ended with exit code 0.
pub fn check_status(command: &Command, status: ExitStatus) -> Result<()> {
    if !status.success() {
        bail!("{} failed ({status})", display_command(command));
    }
    Ok(())
}

/// Reports whether `PATH` leads to a program of this name.
pub fn is_on_path(program: &str) -> bool {
    find_on_path(program).is_some()
}

/// Returns the path of a program that `PATH` leads to.
pub fn find_on_path(program: &str) -> Option<PathBuf> {
    let dirs = std::env::var_os("PATH")?;
    std::env::split_paths(&dirs).map(|dir| dir.join(program)).find(|path| is_executable(path))
}

fn is_executable(path: &Path) -> bool {
    path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// Returns the message for a program that cannot be started.
pub fn describe_start_failure(command: &Command) -> String {
    let program = command.get_program().display();
    format!("cannot start {program} (`cargo xtask setup` installs missing programs)")
}

/// Returns the command as one readable line.
pub fn display_command(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// Returns the last lines of a text, without blank ones.
pub fn last_lines(bytes: &[u8], count: usize) -> String {
    let text = String::from_utf8_lossy(bytes);
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}
