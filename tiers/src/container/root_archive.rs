//! The archive of the root, from which every container's root is made.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use sha2::{Digest, Sha256};

use chitin_vmm::HostError;

use crate::archive::{ArchiveError, Content, read_entries};
use crate::artifacts::check_artifact;
use crate::error::PathError;
use crate::{ArtifactKind, Artifacts, Error, ReadOnlyPath, Unavailable};

/// The archive of the root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RootArchive {
    /// Path of the archive.
    pub path: PathBuf,
    /// SHA-256 of the archive, in hexadecimal.
    pub digest: String,
}

impl RootArchive {
    /// Finds the archive next to the root image, and its digest in the manifest.
    pub fn find(artifacts: &Artifacts) -> Result<RootArchive, Unavailable> {
        #[derive(Deserialize)]
        struct Manifest {
            tar_sha256: String,
        }
        let path = artifacts.root_image.with_extension("tar");
        let missing =
            |reason| Unavailable { reason, remedy: "build it with `cargo xtask rootfs`".into() };
        if !path.is_file() {
            return Err(missing(format!("no archive of the root at {}", path.display())));
        }
        let manifest = artifacts.root_image.with_extension("json");
        for file in [&path, &manifest] {
            if let Err(error @ Error::UntrustedArtifact { .. }) =
                check_artifact(ArtifactKind::RootImage, file)
            {
                let reason = error.to_string();
                return Err(Unavailable { reason, remedy: "see `chitin doctor`".into() });
            }
        }
        let read = std::fs::read(&manifest).map_err(|error| error.to_string());
        let digest = read.and_then(|json| {
            serde_json::from_slice::<Manifest>(&json).map_err(|error| error.to_string())
        });
        match digest {
            Ok(Manifest { tar_sha256: digest }) if is_digest(&digest) => {
                Ok(RootArchive { path, digest })
            }
            Ok(_) => Err(missing(format!("no SHA-256 in {}", manifest.display()))),
            Err(error) => Err(missing(format!("{}: {error}", manifest.display()))),
        }
    }

    /// Checks the digest of the file against the manifest.
    pub fn check(&self) -> Result<(), String> {
        let failed = |error: io::Error| format!("{}: {error}", self.path.display());
        let mut hash = Sha256::new();
        io::copy(&mut File::open(&self.path).map_err(failed)?, &mut hash).map_err(failed)?;
        self.check_digest(&format!("{:x}", hash.finalize()))
    }

    /// Checks a digest of the file against the manifest.
    pub fn check_digest(&self, found: &str) -> Result<(), String> {
        match found == self.digest {
            true => Ok(()),
            false => Err(format!(
                "{} differs from root.json: its SHA-256 is {found}",
                self.path.display()
            )),
        }
    }

    /// Returns the directories that need a mount, so that the agent can copy these files into a
    /// root that is read-only for the agent too.
    ///
    /// Each is the topmost directory on the way that the image does not have, or has empty. No
    /// mount hides a file of the image.
    pub fn mount_points(&self, wanted: &[ReadOnlyPath]) -> Result<Vec<PathBuf>, Error> {
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        let failed = HostError::during("read the archive of the root");
        let entries = File::open(&self.path)
            .and_then(|file| list_entries(file).map_err(io::Error::other))
            .map_err(failed)?;
        let mut mount_points = Vec::new();
        for path in wanted {
            let mount_point = find_mount_point(&entries, path)?;
            if !mount_points.contains(&mount_point) {
                mount_points.push(mount_point);
            }
        }
        Ok(mount_points)
    }
}

/// The kind of an entry of the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Entry {
    EmptyDirectory,
    FilledDirectory,
    /// A file or a link.
    Other,
}

/// Returns every path of an archive, without the leading slash.
fn list_entries(archive: File) -> Result<BTreeMap<PathBuf, Entry>, ArchiveError> {
    let mut entries = BTreeMap::new();
    read_entries(archive, |entry| {
        for above in entry.path.ancestors().skip(1) {
            entries.insert(above.to_owned(), Entry::FilledDirectory);
        }
        let directory = matches!(entry.content, Content::Directory);
        let kind = if directory { Entry::EmptyDirectory } else { Entry::Other };
        entries.entry(entry.path).or_insert(kind);
        Ok(())
    })?;
    Ok(entries)
}

fn find_mount_point(
    entries: &BTreeMap<PathBuf, Entry>,
    ReadOnlyPath { path, directory }: &ReadOnlyPath,
) -> Result<PathBuf, Error> {
    let refused = |reason| Err(Error::Path { path: path.clone(), reason });
    let inner: PathBuf = path.components().skip(1).collect();
    let mut mount_point = PathBuf::new();
    for part in inner.components() {
        mount_point.push(part);
        match entries.get(&mount_point) {
            Some(Entry::FilledDirectory) => {}
            Some(Entry::Other) => {
                let other = Path::new("/").join(mount_point);
                return refused(PathError::NotADirectory(other));
            }
            None | Some(Entry::EmptyDirectory) if mount_point != inner || *directory => {
                return Ok(Path::new("/").join(mount_point));
            }
            None | Some(Entry::EmptyDirectory) => break,
        }
    }
    let parent = inner.parent().unwrap_or(Path::new(""));
    refused(PathError::ImageDirectory(Path::new("/").join(parent)))
}

/// Returns true for a SHA-256 in lower case. The text names a directory and an image.
fn is_digest(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_point_is_absent_or_empty_in_the_image() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("root.tar");
        let mut tar = tar::Builder::new(File::create(&path).unwrap());
        for name in ["./", "./mnt/", "./etc/", "./usr/", "./usr/share/"] {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(tar::EntryType::Directory);
            header.set_size(0);
            header.set_mode(0o755);
            tar.append_data(&mut header, name, io::empty()).unwrap();
        }
        let mut header = tar::Header::new_gnu();
        header.set_size(5);
        header.set_mode(0o644);
        tar.append_data(&mut header, "./etc/passwd", "root\n".as_bytes()).unwrap();
        tar.into_inner().unwrap();
        let archive = RootArchive { path, digest: String::new() };
        let mount_points = |wanted: &[(&str, bool)]| {
            let wanted: Vec<ReadOnlyPath> = wanted
                .iter()
                .map(|(path, directory)| ReadOnlyPath { path: path.into(), directory: *directory })
                .collect();
            archive.mount_points(&wanted)
        };
        let paths = |list: &[&str]| list.iter().map(PathBuf::from).collect::<Vec<_>>();
        assert_eq!(
            mount_points(&[("/shared/a/b", false), ("/shared/c", true)]).unwrap(),
            paths(&["/shared"])
        );
        assert_eq!(
            mount_points(&[("/mnt/a", false), ("/data", true)]).unwrap(),
            paths(&["/mnt", "/data"])
        );
        assert_eq!(mount_points(&[("/etc/app/a", false)]).unwrap(), paths(&["/etc/app"]));
        assert_eq!(mount_points(&[("/usr/share/a", false)]).unwrap(), paths(&["/usr/share"]));
        for (wanted, directory, expected) in [
            ("/config", false, PathError::ImageDirectory("/".into())),
            ("/etc/config", false, PathError::ImageDirectory("/etc".into())),
            ("/etc", true, PathError::ImageDirectory("/".into())),
            ("/etc/passwd/a", false, PathError::NotADirectory("/etc/passwd".into())),
        ] {
            match mount_points(&[(wanted, directory)]) {
                Err(Error::Path { path, reason }) => {
                    assert_eq!((path, reason), (wanted.into(), expected));
                }
                other => panic!("{wanted}: {other:?}"),
            }
        }
    }

    #[test]
    fn malformed_digests_are_refused() {
        assert!(is_digest(&"0f".repeat(32)));
        for bad in ["", "0f", &"0F".repeat(32), &"..".repeat(32), &"0f".repeat(33)] {
            assert!(!is_digest(bad), "{bad}");
        }
    }
}
