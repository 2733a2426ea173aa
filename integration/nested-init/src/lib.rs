//! What `cargo xtask nested` and PID 1 of the emulated host say to each other.
//!
//! Four virtio-serial ports connect them. Three carry the command's stdin, stdout and stderr as raw bytes and nothing
//! else. The fourth, [`CONTROL_PORT`], carries everything that is not the command's own:
//!
//! - host → guest: one [`Launch`] (a little-endian `u32` length, then that many bytes), later a line `eof N`: stdin
//!   ended after N bytes;
//! - guest → host: lines, each a [`Report`].
//!
//! A port has no end of file, so both directions count: a stream is complete when as many bytes arrived as the control
//! port announced.

use std::fmt;
use std::str::FromStr;

/// Port of launch, end of input and reports.
pub const CONTROL_PORT: &str = "chitin.control";
/// Port of the command's standard input.
pub const STDIN_PORT: &str = "chitin.stdin";
/// Port of the command's standard output.
pub const STDOUT_PORT: &str = "chitin.stdout";
/// Port of the command's standard error.
pub const STDERR_PORT: &str = "chitin.stderr";
/// 9p mount tag of the outer machine's root directory.
pub const ROOT_TAG: &str = "outer";

/// Exit code of a command that does not exist.
pub const NOT_FOUND: u8 = 127;
/// Exit code of a command that exists but cannot be executed.
pub const NOT_EXECUTABLE: u8 = 126;

/// A launch message larger than this is refused: `execve` itself takes at most 2 MiB of arguments and environment,
/// and a preload list of some thousand paths stays below the rest.
pub const MAX_LAUNCH_LEN: u32 = 8 << 20;

/// What to run, and on what tree. Paths and arguments are bytes, as they are to the kernel.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Launch {
    /// The command and its arguments; not empty.
    pub argv: Vec<Vec<u8>>,
    /// The whole environment, as `NAME=value`.
    pub env: Vec<Vec<u8>>,
    /// Directory to start in.
    pub cwd: Vec<u8>,
    /// Absolute directories that are written through to the outer machine; the nth has the 9p tag [`share_tag`]`(n)`.
    pub shares: Vec<Vec<u8>>,
    /// Absolute paths of regular files and symbolic links copied into memory before anything runs. None leads through a
    /// link.
    pub preload: Vec<Vec<u8>>,
}

/// The 9p mount tag of the nth writable share.
pub fn share_tag(index: usize) -> String {
    format!("out{index}")
}

/// A launch message that does not parse.
#[derive(Debug, PartialEq, Eq)]
pub struct BadLaunch;

impl fmt::Display for BadLaunch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the launch message is cut short or has trailing bytes")
    }
}

impl std::error::Error for BadLaunch {}

impl Launch {
    /// The message, without its length prefix.
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

    /// Parses what [`encode`](Self::encode) made.
    pub fn decode(mut bytes: &[u8]) -> Result<Self, BadLaunch> {
        let argv = take_list(&mut bytes)?;
        let env = take_list(&mut bytes)?;
        let cwd = take_list(&mut bytes)?.pop().ok_or(BadLaunch)?;
        let shares = take_list(&mut bytes)?;
        let preload = take_list(&mut bytes)?;
        if argv.is_empty() || !bytes.is_empty() {
            return Err(BadLaunch);
        }
        Ok(Self { argv, env, cwd, shares, preload })
    }
}

fn push_len(out: &mut Vec<u8>, len: usize) {
    // Longer than 4 GiB cannot happen below MAX_LAUNCH_LEN, which the sender checks.
    out.extend_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes());
}

fn take_len(bytes: &mut &[u8]) -> Result<usize, BadLaunch> {
    let (head, rest) = bytes.split_first_chunk::<4>().ok_or(BadLaunch)?;
    *bytes = rest;
    usize::try_from(u32::from_le_bytes(*head)).map_err(|_| BadLaunch)
}

fn take_list(bytes: &mut &[u8]) -> Result<Vec<Vec<u8>>, BadLaunch> {
    let count = take_len(bytes)?;
    let mut list = Vec::new();
    for _ in 0..count {
        let len = take_len(bytes)?;
        let (item, rest) = bytes.split_at_checked(len).ok_or(BadLaunch)?;
        list.push(item.to_vec());
        *bytes = rest;
    }
    Ok(list)
}

/// One line from the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Report {
    /// The command is running.
    Started,
    /// The command ended, after this many bytes of output.
    Exited {
        /// Its exit code, or 128 + the signal that ended it.
        code: u8,
        /// Bytes sent on [`STDOUT_PORT`].
        stdout: u64,
        /// Bytes sent on [`STDERR_PORT`].
        stderr: u64,
    },
    /// The command could not be started.
    Failed {
        /// The exit code to end with: [`NOT_FOUND`], [`NOT_EXECUTABLE`], or 125 when the emulated host is at fault.
        code: u8,
        /// Why, in one line.
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

/// A line that is no report.
#[derive(Debug, PartialEq, Eq)]
pub struct BadReport;

impl fmt::Display for BadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the line is no report")
    }
}

impl std::error::Error for BadReport {}

impl FromStr for Report {
    type Err = BadReport;

    fn from_str(line: &str) -> Result<Self, BadReport> {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        match word {
            "started" if rest.is_empty() => Ok(Self::Started),
            "exited" => {
                let mut numbers = rest.split(' ');
                let report = Self::Exited {
                    code: number(numbers.next())?,
                    stdout: number(numbers.next())?,
                    stderr: number(numbers.next())?,
                };
                if numbers.next().is_some() { Err(BadReport) } else { Ok(report) }
            }
            "failed" => {
                let (code, message) = rest.split_once(' ').ok_or(BadReport)?;
                Ok(Self::Failed { code: number(Some(code))?, message: message.to_owned() })
            }
            _ => Err(BadReport),
        }
    }
}

fn number<T: FromStr>(text: Option<&str>) -> Result<T, BadReport> {
    text.and_then(|text| text.parse().ok()).ok_or(BadReport)
}

#[cfg(test)]
#[path = "lib_test.rs"]
mod tests;
