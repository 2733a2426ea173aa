//! The protocol between `cargo xtask nested` and PID 1 of the emulated host.
//!
//! Four virtio-serial ports connect them. Three carry stdin, stdout and stderr of the command as
//! raw bytes. The fourth, [`CONTROL_PORT`], carries the rest:
//!
//! - host → guest: one [`Launch`] (a little-endian `u32` length, then that many bytes), later a
//!   line `eof N`: stdin has ended after N bytes;
//! - guest → host: lines, each a [`Report`].
//!
//! A port has no end of file, so both directions count: a stream is complete when as many bytes
//! have arrived as the control port has announced.

use std::fmt;
use std::str::FromStr;

/// The port of launch, end of input and reports.
pub const CONTROL_PORT: &str = "chitin.control";
/// The port of the command's standard input.
pub const STDIN_PORT: &str = "chitin.stdin";
/// The port of the command's standard output.
pub const STDOUT_PORT: &str = "chitin.stdout";
/// The port of the command's standard error.
pub const STDERR_PORT: &str = "chitin.stderr";
/// The 9p mount tag of the outer machine's root directory.
pub const ROOT_TAG: &str = "outer";

/// The exit code for a command that does not exist.
pub const NOT_FOUND: u8 = 127;
/// The exit code for a command that exists but cannot be executed.
pub const NOT_EXECUTABLE: u8 = 126;

/// The length of the longest launch message: `execve` accepts at most 2 MiB of arguments and
/// environment, and a preload list of some thousand paths stays below the rest.
pub const MAX_LAUNCH_LEN: u32 = 8 << 20;

/// The command to run, and its tree. Paths and arguments are bytes, as they are to the kernel.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Launch {
    /// The command and its arguments; not empty.
    pub argv: Vec<Vec<u8>>,
    /// The complete environment, as `NAME=value`.
    pub env: Vec<Vec<u8>>,
    /// The directory to start in.
    pub cwd: Vec<u8>,
    /// Absolute directories that are written through to the outer machine; the nth has the 9p tag
    /// [`share_tag`]`(n)`.
    pub shares: Vec<Vec<u8>>,
    /// Absolute paths of regular files and symbolic links that are copied into memory before the
    /// command starts. None leads through a link.
    pub preload: Vec<Vec<u8>>,
}

/// Returns the 9p mount tag of the nth writable share.
pub fn share_tag(index: usize) -> String {
    format!("out{index}")
}

/// A launch message that does not parse.
#[derive(Debug, PartialEq, Eq)]
pub struct InvalidLaunch;

impl fmt::Display for InvalidLaunch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the launch message is truncated or has trailing bytes")
    }
}

impl std::error::Error for InvalidLaunch {}

impl Launch {
    /// Returns the message, without its length prefix.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for list in [&self.argv, &self.env, &vec![self.cwd.clone()], &self.shares, &self.preload] {
            push_len(&mut out, list.len());
            for item in list {
                push_len(&mut out, item.len());
                out.extend_from_slice(item);
            }
        }
        out
    }

    /// Parses a message of [`encode`](Self::encode).
    pub fn decode(mut bytes: &[u8]) -> Result<Self, InvalidLaunch> {
        let argv = split_list(&mut bytes)?;
        let env = split_list(&mut bytes)?;
        let cwd = split_list(&mut bytes)?.pop().ok_or(InvalidLaunch)?;
        let shares = split_list(&mut bytes)?;
        let preload = split_list(&mut bytes)?;
        if argv.is_empty() || !bytes.is_empty() {
            return Err(InvalidLaunch);
        }
        Ok(Self { argv, env, cwd, shares, preload })
    }
}

fn push_len(out: &mut Vec<u8>, len: usize) {
    // MAX_LAUNCH_LEN, which the sender checks, is far below 4 GiB.
    out.extend_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes());
}

fn split_len(bytes: &mut &[u8]) -> Result<usize, InvalidLaunch> {
    let (head, rest) = bytes.split_first_chunk::<4>().ok_or(InvalidLaunch)?;
    *bytes = rest;
    usize::try_from(u32::from_le_bytes(*head)).map_err(|_| InvalidLaunch)
}

fn split_list(bytes: &mut &[u8]) -> Result<Vec<Vec<u8>>, InvalidLaunch> {
    let count = split_len(bytes)?;
    let mut list = Vec::new();
    for _ in 0..count {
        let len = split_len(bytes)?;
        let (item, rest) = bytes.split_at_checked(len).ok_or(InvalidLaunch)?;
        list.push(item.to_vec());
        *bytes = rest;
    }
    Ok(list)
}

/// A line from the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Report {
    /// The command is running.
    Started,
    /// The command has ended after this many bytes of output.
    Exited {
        /// The exit code, or 128 + the signal that ended it.
        code: u8,
        /// The number of bytes on [`STDOUT_PORT`].
        stdout: u64,
        /// The number of bytes on [`STDERR_PORT`].
        stderr: u64,
    },
    /// The command could not be started.
    Failed {
        /// The exit code to end with: [`NOT_FOUND`], [`NOT_EXECUTABLE`], or 125 if the emulated
        /// host is at fault.
        code: u8,
        /// The reason, in one line.
        message: String,
    },
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Started => f.write_str("started"),
            Self::Exited { code, stdout, stderr } => write!(f, "exited {code} {stdout} {stderr}"),
            Self::Failed { code, message } => {
                write!(f, "failed {code} {}", message.replace('\n', " "))
            }
        }
    }
}

/// A line that is not a report.
#[derive(Debug, PartialEq, Eq)]
pub struct InvalidReport;

impl fmt::Display for InvalidReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the line is not a report")
    }
}

impl std::error::Error for InvalidReport {}

impl FromStr for Report {
    type Err = InvalidReport;

    fn from_str(line: &str) -> Result<Self, InvalidReport> {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        match word {
            "started" if rest.is_empty() => Ok(Self::Started),
            "exited" => {
                let mut numbers = rest.split(' ');
                let report = Self::Exited {
                    code: parse_number(numbers.next())?,
                    stdout: parse_number(numbers.next())?,
                    stderr: parse_number(numbers.next())?,
                };
                if numbers.next().is_some() { Err(InvalidReport) } else { Ok(report) }
            }
            "failed" => {
                let (code, message) = rest.split_once(' ').ok_or(InvalidReport)?;
                Ok(Self::Failed { code: parse_number(Some(code))?, message: message.to_owned() })
            }
            _ => Err(InvalidReport),
        }
    }
}

fn parse_number<T: FromStr>(text: Option<&str>) -> Result<T, InvalidReport> {
    text.and_then(|text| text.parse().ok()).ok_or(InvalidReport)
}

#[cfg(test)]
#[path = "lib_test.rs"]
mod tests;
