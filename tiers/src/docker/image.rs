//! The images that containers are made of: the root, and one with the agent alone to try a daemon
//! out. Each is imported once, by digest, under a lock.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bollard::query_parameters::CreateImageOptionsBuilder;
use bytes::Bytes;
use chitin_vmm::HostError;
use futures_util::StreamExt;
use rustix::fs::{FlockOperation, OFlags, flock};
use sha2::{Digest, Sha256};
use tokio_util::io::ReaderStream;
use tokio_util::sync::CancellationToken;

use super::daemon::Daemon;
use super::liveness::{CallError, call};
use crate::Error;
use crate::archive::{ArchiveError, Content, Entry, read_entries};
use crate::error::ContainerError;

/// Names of our images. The tag is the digest of the root.
const ROOT_IMAGE: &str = "chitin-root";
const PROBE_IMAGE: &str = "chitin-probe";

/// Label of our images, so that no other one is ever removed. Its value is the digest of the root.
pub(super) const IMAGE_LABEL: &str = "chitin.root";

/// Time limit of an import. Docker takes five seconds for the root on a loaded machine.
const IMPORT_LIMIT: Duration = Duration::from_secs(180);

/// Time between two attempts to get the lock.
const LOCK_INTERVAL: Duration = Duration::from_millis(100);

/// Maximum size of the agent's program, which is read into memory.
const MAX_AGENT: u64 = 32 << 20;

/// Bytes of one read.
const CHUNK: usize = 64 * 1024;

/// An image of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ImageKind {
    /// The whole root.
    Root,
    /// The agent alone.
    Probe,
}

impl ImageKind {
    /// Returns `NAME:TAG`.
    pub fn reference(self, digest: &str) -> String {
        let name = match self {
            ImageKind::Root => ROOT_IMAGE,
            ImageKind::Probe => PROBE_IMAGE,
        };
        format!("{name}:{}", &digest[..32.min(digest.len())])
    }
}

/// An archive to be sent to the daemon.
enum Archive {
    File(tokio::fs::File),
    Bytes(Bytes),
}

impl Daemon {
    /// Imports an image, unless another process does so meanwhile.
    pub(super) async fn import_image(
        &self,
        kind: ImageKind,
        abandoned: &CancellationToken,
    ) -> Result<(), Error> {
        let reference = kind.reference(&self.archive.digest);
        let importing = async {
            let _lock = self.lock_import(&reference).await;
            let found = call("inspect the image", self.docker.inspect_image(&reference)).await;
            match found {
                Ok(_) => return Ok(()),
                Err(error) if error.status() == Some(404) => {}
                Err(error) => return Err(self.call_error(&error)),
            }
            match kind {
                ImageKind::Root => self.import_root(&reference).await,
                ImageKind::Probe => self.import_probe(&reference).await,
            }
        };
        tokio::select! {
            imported = tokio::time::timeout(IMPORT_LIMIT, importing) => match imported {
                Ok(imported) => imported,
                Err(_) => {
                    let operation = "import the image of the root";
                    Err(self.call_error(&CallError::TimedOut { operation, limit: IMPORT_LIMIT }))
                }
            },
            // The daemon discards what was not sent to the end.
            () = abandoned.cancelled() => Err(self.error(ContainerError::Cancelled)),
        }
    }

    async fn import_root(&self, reference: &str) -> Result<(), Error> {
        let archive = self.archive.clone();
        let checking = tokio::task::spawn_blocking(move || archive.check());
        let checked = checking.await.map_err(|error| error.to_string()).and_then(|checked| checked);
        checked.map_err(|reason| self.error(ContainerError::Root(reason)))?;
        let file = tokio::fs::File::open(&self.archive.path)
            .await
            .map_err(HostError::during("open the archive of the root"))?;
        self.send_archive(reference, Archive::File(file)).await
    }

    async fn import_probe(&self, reference: &str) -> Result<(), Error> {
        let path = self.archive.path.clone();
        let packing = tokio::task::spawn_blocking(move || pack_agent(&path));
        let packed = packing.await.map_err(io::Error::other).and_then(|packed| packed);
        let packed = packed.map_err(HostError::during("read the archive of the root"))?;
        self.send_archive(reference, Archive::Bytes(packed.into())).await
    }

    async fn send_archive(&self, reference: &str, archive: Archive) -> Result<(), Error> {
        let body = match archive {
            Archive::File(file) => {
                bollard::body_try_stream(ReaderStream::with_capacity(file, CHUNK))
            }
            Archive::Bytes(bytes) => bollard::body_full(bytes),
        };
        // Podman ignores the parameter `tag`, and both accept the tag in `repo`.
        let options = CreateImageOptionsBuilder::default()
            .from_src("-")
            .repo(reference)
            .changes(vec![format!("LABEL {IMAGE_LABEL}={}", self.archive.digest)])
            .build();
        let mut progress = Box::pin(self.docker.create_image(Some(options), Some(body), None));
        while let Some(step) = progress.next().await {
            step.map_err(|error| self.call_error(&error.into()))?;
        }
        Ok(())
    }

    /// Waits until no other process of this user imports the same image into the same daemon.
    ///
    /// Without the lock, processes that start at once import an image each, and all but one lose
    /// their name. Returns `None` where no file can be locked: the import is right without.
    async fn lock_import(&self, reference: &str) -> Option<File> {
        let id = format!("{:x}", Sha256::digest(format!("{} {reference}", self.address)));
        let dir = runtime_dir()?;
        let lock = open_lock(&dir.join(format!("import-{}.lock", &id[..32]))).ok()?;
        while flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            tokio::time::sleep(LOCK_INTERVAL).await;
        }
        Some(lock)
    }
}

/// Returns the directory for files of this user that last until the next boot.
pub(super) fn runtime_dir() -> Option<PathBuf> {
    let dir = match rustix::process::geteuid().is_root() {
        true => PathBuf::from("/run/chitin/docker"),
        false => {
            let runtime_dir = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
            runtime_dir.filter(|dir| dir.is_absolute())?.join("chitin/docker")
        }
    };
    // A daemon with other user ids reads the file of hosts in it.
    std::fs::DirBuilder::new().recursive(true).mode(0o755).create(&dir).ok()?;
    Some(dir)
}

fn open_lock(path: &Path) -> io::Result<File> {
    let flags = i32::try_from((OFlags::NOFOLLOW | OFlags::CLOEXEC).bits()).unwrap_or_default();
    File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .custom_flags(flags)
        .open(path)
}

/// Returns an archive with the agent of this archive and the directories that its mounts need.
fn pack_agent(archive: &Path) -> io::Result<Vec<u8>> {
    let mut packed = tar::Builder::new(Vec::new());
    for name in ["dev/", "etc/", "proc/", "run/", "run/credentials/", "sys/", "tmp/", "work/"] {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Directory);
        header.set_mode(0o755);
        header.set_size(0);
        packed.append_data(&mut header, name, io::empty())?;
    }
    let agent = read_agent(archive)?;
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o755);
    header.set_size(agent.len() as u64);
    packed.append_data(&mut header, "init", agent.as_slice())?;
    packed.into_inner()
}

/// Reads the agent's program, the file `/init` of the root.
fn read_agent(archive: &Path) -> io::Result<Vec<u8>> {
    let mut agent = None;
    let read = read_entries(File::open(archive)?, |Entry { path, content, .. }| {
        if let Content::File { data, size } = content
            && path == Path::new("init")
            && size <= MAX_AGENT
        {
            let mut program = Vec::new();
            data.take(size).read_to_end(&mut program).map_err(ArchiveError::Read)?;
            agent = Some(program);
        }
        Ok(())
    });
    read.map_err(io::Error::other)?;
    let missing = || io::Error::new(io::ErrorKind::NotFound, "it has no /init of a usual size");
    agent.ok_or_else(missing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probe_image_holds_the_agent_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("root.tar");
        let mut root = tar::Builder::new(File::create(&path).unwrap());
        for (name, content) in [("./etc/passwd", "root"), ("./init", "agent")] {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o755);
            root.append_data(&mut header, name, content.as_bytes()).unwrap();
        }
        root.into_inner().unwrap();
        let packed = pack_agent(&path).unwrap();
        let mut files = Vec::new();
        for entry in tar::Archive::new(packed.as_slice()).entries().unwrap() {
            let mut entry = entry.unwrap();
            if !entry.header().entry_type().is_dir() {
                let mut content = String::new();
                entry.read_to_string(&mut content).unwrap();
                files.push((entry.path().unwrap().into_owned(), content));
            }
        }
        assert_eq!(files, [(PathBuf::from("init"), "agent".to_owned())]);
        assert!(pack_agent(&dir.path().join("none")).is_err());
    }
}
