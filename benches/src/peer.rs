//! Another monitor, measured in the same run.
//!
//! Both run the same kernel, unless another one is named, the same root image and the same commands. What the peer's guest has
//! for an init does nothing but run them (`benches/peer/`): what Chitin's agent does beside that (file systems, a
//! lock-down, new entropy for each copy) is Chitin's own cost, as its jail is.

mod firecracker;
mod guest;

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr;
use std::time::Duration;

use chitin::{Artifacts, ECHO};
use serde::Serialize;

pub use firecracker::{Guest, Saved};

/// As for a sandbox of our own: on an emulated, loaded host a boot takes long.
const BOOT_LIMIT: Duration = Duration::from_secs(120);

/// How to get one.
const REMEDY: &str = "name a binary of Firecracker, from its releases or built from its source with `cargo build --release`";

/// Options of benchmarks that can measure a peer.
#[derive(clap::Args, Clone)]
pub struct PeerArgs {
    /// Measure another monitor too, in turns with this one
    #[arg(long, value_name = "firecracker=BIN")]
    peer: Option<Program>,

    /// The peer's guest kernel, an ELF `vmlinux`, if not the same as ours
    #[arg(long, value_name = "FILE", requires = "peer")]
    peer_kernel: Option<PathBuf>,

    /// What the peer's root image is a device of
    #[arg(long, value_name = "DEVICE", requires = "peer", default_value = "blk")]
    peer_root: Root,
}

impl PeerArgs {
    /// The peer, if one is asked for and all is there.
    pub fn peer(&self, vcpus: u32, memory_mib: u64) -> Result<Option<Peer>, PeerError> {
        let Some(Program(binary)) = &self.peer else { return Ok(None) };
        let artifacts = Artifacts::locate();
        let kernel = self.peer_kernel.clone().unwrap_or(artifacts.kernel);
        let absolute = |what, path: &Path| {
            path.canonicalize().map_err(|source| PeerError::Missing {
                what,
                path: path.into(),
                source,
            })
        };
        let (binary, version) = ask(binary)?;
        Ok(Some(Peer {
            binary,
            version,
            kernel: absolute("guest kernel", &kernel)?,
            image: absolute("root image", &artifacts.root_image)?,
            root: self.peer_root,
            vcpus,
            memory_mib,
            scratch: Scratch::new("peer")?,
        }))
    }
}

/// A path after `firecracker=`.
#[derive(Debug, Clone)]
pub struct Program(PathBuf);

impl FromStr for Program {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some(("firecracker", path)) if !path.is_empty() => Ok(Program(path.into())),
            _ => Err(format!("the one peer there is, is `firecracker=BIN`: {REMEDY}")),
        }
    }
}

/// How the peer's guest sees its root image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Root {
    /// virtio-blk: read into the guest's page cache
    Blk,
    /// virtio-pmem with DAX: used in place
    Pmem,
}

/// What can be wrong with a peer.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// A file it needs.
    #[error("--peer: there is no {what} {}", path.display())]
    Missing {
        /// What it is to it.
        what: &'static str,
        /// Where it was looked for.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// It is no Firecracker.
    #[error("--peer: `{} --version` does not name a version of Firecracker: {REMEDY}", path.display())]
    Version {
        /// The program.
        path: PathBuf,
    },
    /// It could not be started or spoken to.
    #[error("{what}")]
    Io {
        /// What was done.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// It refused something.
    #[error("Firecracker refuses {request}: {answer}")]
    Refused {
        /// What was asked.
        request: &'static str,
        /// What it said.
        answer: String,
    },
    /// It ended, or its guest did not come up.
    #[error("Firecracker {what}; it said last: {said}")]
    Failed {
        /// What it did.
        what: &'static str,
        /// The end of its log.
        said: String,
    },
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> PeerError {
    move |source| PeerError::Io { what, source }
}

/// Another monitor, and what its guests are made of.
pub struct Peer {
    binary: PathBuf,
    version: String,
    kernel: PathBuf,
    image: PathBuf,
    root: Root,
    vcpus: u32,
    memory_mib: u64,
    scratch: Scratch,
}

/// What a report says of it.
#[derive(Serialize)]
pub struct Described {
    version: String,
    kernel: PathBuf,
    root: Root,
}

impl Peer {
    /// Its guest kernel.
    pub fn kernel(&self) -> &Path {
        &self.kernel
    }

    /// For reports.
    pub fn described(&self) -> Described {
        Described { version: self.version.clone(), kernel: self.kernel.clone(), root: self.root }
    }

    /// The same as a heading.
    pub fn title(&self) -> String {
        let device = match self.root {
            Root::Blk => "virtio-blk",
            Root::Pmem => "virtio-pmem",
        };
        format!("{}, root over {device}, kernel {}", self.version, self.kernel.display())
    }

    /// What of a process's memory is its guest's: files of that name, and whatever is as large as the guest's memory.
    pub fn is_guests(&self, path: &str, bytes: u64) -> bool {
        Path::new(path) == self.image || bytes == self.memory_mib << 20
    }
}

/// Finds the program, and has it say what it is.
fn ask(binary: &Path) -> Result<(PathBuf, String), PeerError> {
    let missing = |source| PeerError::Missing { what: "program", path: binary.into(), source };
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

/// The words of a command: what is asked for, else an echo of some bytes.
pub fn words(argv: &[std::ffi::OsString]) -> Vec<u8> {
    use std::os::unix::ffi::OsStrExt;
    let own = [ECHO.into(), "chitin".into()];
    let argv = if argv.is_empty() { &own[..] } else { argv };
    argv.iter().flat_map(|word| [word.as_bytes(), b"\0"].concat()).collect()
}

/// A directory that is there as long as this is.
pub struct Scratch(PathBuf);

impl Scratch {
    /// Makes one for a purpose, among the system's temporary files.
    pub fn new(what: &str) -> Result<Scratch, PeerError> {
        use std::os::unix::fs::DirBuilderExt;
        let path = std::env::temp_dir().join(format!("chitin-{what}-{}", std::process::id()));
        let made = std::fs::DirBuilder::new().mode(0o700).create(&path);
        made.map_err(failed("make a directory for temporary files (TMPDIR says where)"))?;
        Ok(Scratch(path))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What is left is named after this process, and below the directory for what may be left.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
#[path = "peer_test.rs"]
mod tests;
