//! Another monitor, measured in the same run.
//!
//! Both run the same kernel (unless another one is named), the same root image and the same
//! commands. The init of the peer's guest does nothing but run them (`benches/peer/`). The work
//! that the agent of Chitin does in addition (file systems, a lock-down, new entropy for each
//! copy) counts as a cost of Chitin, as its jail does.

mod connection;
mod firecracker;

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr;
use std::time::Duration;

use chitin::Artifacts;
use serde::Serialize;
use tempfile::TempDir;

pub use firecracker::{Guest, Snapshot};

/// The limit that Chitin has for a boot too: on an emulated, loaded host a boot takes long.
const BOOT_LIMIT: Duration = Duration::from_secs(120);

const REMEDY: &str = "name a Firecracker binary, from its releases or built from its source with \
                      `cargo build --release`";

/// Arguments of benchmarks that can measure a peer.
#[derive(clap::Args, Clone)]
pub struct PeerArgs {
    /// Measure another monitor too, in turns with Chitin
    #[arg(long, value_name = "firecracker=BIN")]
    peer: Option<PeerProgram>,

    /// Guest kernel of the peer, an ELF `vmlinux` [default: the kernel of Chitin]
    #[arg(long, value_name = "FILE", requires = "peer")]
    peer_kernel: Option<PathBuf>,

    /// Device that the peer attaches its root image as
    #[arg(long, value_name = "DEVICE", requires = "peer", default_value = "blk")]
    peer_root: RootDevice,
}

impl PeerArgs {
    /// Returns the peer, if one is asked for, after checking that its files exist.
    pub fn find_peer(&self, vcpus: u32, memory_mib: u64) -> Result<Option<Peer>, PeerError> {
        let Some(PeerProgram(binary)) = &self.peer else { return Ok(None) };
        let artifacts = Artifacts::locate();
        let kernel = self.peer_kernel.clone().unwrap_or(artifacts.kernel);
        let resolve = |object, path: &Path| {
            path.canonicalize().map_err(|source| PeerError::Missing {
                object,
                path: path.into(),
                source,
            })
        };
        let (binary, version) = read_version(binary)?;
        Ok(Some(Peer {
            binary,
            version,
            kernel: resolve(PeerFile::Kernel, &kernel)?,
            image: resolve(PeerFile::RootImage, &artifacts.root_image)?,
            root: self.peer_root,
            vcpus,
            memory_mib,
            scratch: tempfile::Builder::new()
                .prefix("chitin-peer-")
                .tempdir()
                .map_err(failed("create a directory for temporary files (see TMPDIR)"))?,
        }))
    }
}

/// The value of `--peer`: a path after `firecracker=`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerProgram(PathBuf);

/// A value of `--peer` that names no Firecracker binary.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the only peer is `firecracker=BIN`: {REMEDY}")]
pub struct ParsePeerError;

impl FromStr for PeerProgram {
    type Err = ParsePeerError;

    fn from_str(text: &str) -> Result<Self, ParsePeerError> {
        match text.split_once('=') {
            Some(("firecracker", path)) if !path.is_empty() => Ok(PeerProgram(path.into())),
            _ => Err(ParsePeerError),
        }
    }
}

/// The device through which the peer's guest sees its root image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RootDevice {
    /// virtio-blk: read into the guest's page cache
    Blk,
    /// virtio-pmem with DAX: used in place
    Pmem,
}

/// A file that a peer needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerFile {
    Program,
    Kernel,
    RootImage,
}

impl PeerFile {
    fn name(self) -> &'static str {
        match self {
            PeerFile::Program => "program",
            PeerFile::Kernel => "guest kernel",
            PeerFile::RootImage => "root image",
        }
    }
}

/// A failure of a peer.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// A file that it needs cannot be opened.
    #[error("--peer: find the {} {}", object.name(), path.display())]
    Missing { object: PeerFile, path: PathBuf, source: io::Error },
    /// The program is not Firecracker.
    #[error(
        "--peer: `{} --version` does not name a version of Firecracker: {REMEDY}",
        path.display()
    )]
    Version { path: PathBuf },
    /// An operation on it failed.
    #[error("{operation}")]
    Io { operation: &'static str, source: io::Error },
    /// It refused a request to its API.
    #[error("Firecracker refuses {request}: {answer}")]
    Refused { request: &'static str, answer: String },
    /// It ended, or its guest did not come up.
    #[error("Firecracker {event}; end of its log: {log}")]
    Failed { event: &'static str, log: String },
}

fn failed(operation: &'static str) -> impl Fn(io::Error) -> PeerError {
    move |source| PeerError::Io { operation, source }
}

/// Another monitor, and the files and size of its guests.
pub struct Peer {
    binary: PathBuf,
    version: String,
    kernel: PathBuf,
    image: PathBuf,
    root: RootDevice,
    vcpus: u32,
    memory_mib: u64,
    scratch: TempDir,
}

/// The peer in a report.
#[derive(Serialize)]
pub struct PeerInfo {
    version: String,
    kernel: PathBuf,
    root: RootDevice,
}

impl PeerInfo {
    /// Returns the same as a heading.
    pub fn title(&self) -> String {
        let device = match self.root {
            RootDevice::Blk => "virtio-blk",
            RootDevice::Pmem => "virtio-pmem",
        };
        format!("{}, root over {device}, kernel {}", self.version, self.kernel.display())
    }
}

impl Peer {
    /// Returns the guest kernel.
    pub fn kernel(&self) -> &Path {
        &self.kernel
    }

    /// Describes the peer for a report.
    pub fn info(&self) -> PeerInfo {
        PeerInfo { version: self.version.clone(), kernel: self.kernel.clone(), root: self.root }
    }

    /// Returns whether a mapping of the process belongs to its guest: its file is the root image,
    /// or it is as large as guest memory.
    pub fn is_guest_mapping(&self, path: &str, bytes: u64) -> bool {
        Path::new(path) == self.image || bytes == self.memory_mib << 20
    }
}

/// Runs `--version`; returns the absolute path of the program and its version.
fn read_version(binary: &Path) -> Result<(PathBuf, String), PeerError> {
    let missing =
        |source| PeerError::Missing { object: PeerFile::Program, path: binary.into(), source };
    let binary = binary.canonicalize().map_err(missing)?;
    let output =
        Command::new(&binary).arg("--version").stdin(Stdio::null()).output().map_err(missing)?;
    let text = String::from_utf8_lossy(&output.stdout);
    match text.lines().next() {
        Some(line) if line.starts_with("Firecracker ") => {
            let version = line.to_owned();
            Ok((binary, version))
        }
        _ => Err(PeerError::Version { path: binary }),
    }
}

/// Encodes a command for a guest: each word ends in NUL.
pub fn encode_argv(argv: &[OsString]) -> Vec<u8> {
    argv.iter().flat_map(|word| [word.as_bytes(), b"\0"].concat()).collect()
}

#[cfg(test)]
#[path = "peer_test.rs"]
mod tests;
