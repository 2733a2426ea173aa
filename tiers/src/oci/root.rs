//! The unpacked root, which all containers share read-only.

use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::container::RootArchive;

/// Directory of the unpacked roots. Every user namespace must be able to enter it, so it is open to
/// all; it holds nothing that is not in every sandbox.
const ROOTS: &str = "/var/cache/chitin/roots";

/// Returns the directory with the content of the archive, and unpacks it if it does not exist.
pub(crate) fn unpack_once(archive: &RootArchive) -> Result<PathBuf, String> {
    let roots = Path::new(ROOTS);
    let root = roots.join(&archive.digest);
    if root.is_dir() {
        return Ok(root);
    }
    let failed = |path: &Path| {
        let path = path.display().to_string();
        move |error: io::Error| format!("{path}: {error}")
    };
    fs::DirBuilder::new().recursive(true).mode(0o755).create(roots).map_err(failed(roots))?;
    let partial = roots.join(format!("{}.partial-{}", archive.digest, std::process::id()));
    let _ = fs::remove_dir_all(&partial);
    let outcome = unpack(archive, &partial).and_then(|()| match fs::rename(&partial, &root) {
        // Another process was faster.
        Err(_) if root.is_dir() => Ok(()),
        renamed => renamed.map_err(failed(&root)),
    });
    let _ = fs::remove_dir_all(&partial);
    outcome.map(|()| root)
}

fn unpack(archive: &RootArchive, partial: &Path) -> Result<(), String> {
    let file = File::open(&archive.path)
        .map_err(|error| format!("{}: {error}", archive.path.display()))?;
    let mut hashed =
        HashingReader { inner: BufReader::with_capacity(1 << 18, file), hash: Sha256::new() };
    let mut tar = tar::Archive::new(&mut hashed);
    tar.set_preserve_permissions(true);
    tar.set_preserve_ownerships(true);
    fs::create_dir(partial).and_then(|()| tar.unpack(partial)).map_err(|error| {
        let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
        format!("{error}{}", cause.unwrap_or_default())
    })?;
    // The padding after the last entry is a part of the file.
    io::copy(&mut hashed, &mut io::sink()).map_err(|error| error.to_string())?;
    archive.check_digest(&format!("{:x}", hashed.hash.finalize()))
}

/// Hashes all bytes that are read through it.
struct HashingReader<R> {
    inner: R,
    hash: Sha256,
}

impl<R: Read> Read for HashingReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hash.update(&buffer[..count]);
        Ok(count)
    }
}
