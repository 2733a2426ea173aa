//! Running other programs: always an argument vector, never a shell line.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail};

/// A command, with arguments, that reads nothing.
pub fn command(
    program: impl AsRef<OsStr>,
    args: impl IntoIterator<Item = impl AsRef<OsStr>>,
) -> Command {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null());
    command
}

/// Runs a command whose output is for the user; an error says which it was, and what the program said stands above it.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| start_failure(command))?;
    if !status.success() {
        bail!("{} failed ({status})", describe(command));
    }
    Ok(())
}

/// The same, named beforehand: for what takes long, or changes the machine.
pub fn run_aloud(command: &mut Command) -> Result<()> {
    eprintln!("running: {}", describe(command));
    run(command)
}

/// Runs a command and returns what it printed; an error carries the end of what it complained about.
pub fn output(command: &mut Command) -> Result<String> {
    let Output { status, stdout, stderr } =
        command.output().with_context(|| start_failure(command))?;
    if !status.success() {
        bail!("{} failed ({status}): {}", describe(command), last_lines(&stderr, 12));
    }
    Ok(String::from_utf8_lossy(&stdout).into_owned())
}

/// The first line of what a program says of its version.
pub fn version(program: &str) -> Result<String> {
    let text = output(&mut command(program, ["--version"]))?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

/// Whether a program of that name is on PATH.
pub fn exists(program: &str) -> bool {
    find(program).is_some()
}

/// The path of a program on PATH.
pub fn find(program: &str) -> Option<std::path::PathBuf> {
    let dirs = std::env::var_os("PATH")?;
    std::env::split_paths(&dirs).map(|dir| dir.join(program)).find(|path| is_executable(path))
}

fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// What to say when a program cannot be started at all.
pub fn start_failure(command: &Command) -> String {
    let program = command.get_program().display();
    format!("cannot start {program} (cargo xtask setup installs what is missing)")
}

/// The command as one readable line.
pub fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// The last lines of a program's complaints.
pub fn last_lines(bytes: &[u8], count: usize) -> String {
    let text = String::from_utf8_lossy(bytes);
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}
