//! The unpacked root, which all containers share read-only.

use std::fs::{self, File};
use std::io::{self, BufReader, Read, Seek, Write};
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use sha2::{Digest, Sha256};

use super::private_dir::open_private_dir;
use crate::archive::{self, IMAGE_ID};
use crate::container::RootArchive;

/// Directory of the unpacked roots. Only root can enter it.
const IMAGES: &str = "/var/cache/chitin/images";

/// Returns the directory with the content of the archive, and unpacks it if it does not exist.
pub(crate) fn unpack_once(archive: &RootArchive) -> Result<PathBuf, String> {
    unpack_once_in(Path::new(IMAGES), archive, Some(IMAGE_ID))
}

fn unpack_once_in(
    images: &Path,
    archive: &RootArchive,
    owner: Option<u32>,
) -> Result<PathBuf, String> {
    open_private_dir(images, 0o700).map_err(|error| error.to_string())?;
    let root = images.join(&archive.digest);
    if root.is_dir() {
        return Ok(root);
    }
    // Removed on drop. The name is random, and the directory is created, never opened.
    let partial = tempfile::Builder::new().prefix(".partial-").tempdir_in(images);
    let partial = partial.map_err(|error| format!("{}: {error}", images.display()))?;
    let unpacked = partial.path().join("root");
    let verified = copy_verified(archive, images)?;
    archive::unpack(verified, &unpacked, owner)
        .map_err(|error| chitin_text::error_chain(&error))?;
    match fs::rename(&unpacked, &root) {
        // Another process was faster.
        Err(_) if root.is_dir() => {}
        renamed => renamed.map_err(|error| format!("{}: {error}", root.display()))?,
    }
    Ok(root)
}

/// Copies the archive into a file without a name and returns it, if it has the digest of the
/// manifest. So the bytes that are unpacked are those that were checked, even if the archive is
/// changed in between.
fn copy_verified(archive: &RootArchive, dir: &Path) -> Result<File, String> {
    let failed = |error: io::Error| format!("{}: {error}", archive.path.display());
    let file = File::open(&archive.path).map_err(failed)?;
    if file.metadata().map_err(failed)?.len() > archive::MAX_BYTES {
        return Err(format!("{} is larger than 8 GiB", archive.path.display()));
    }
    let mut copy = tempfile::tempfile_in(dir).map_err(failed)?;
    rustix::fs::fchmod(&copy, Mode::RUSR).map_err(|errno| failed(errno.into()))?;
    let mut input = BufReader::new(file.take(archive::MAX_BYTES));
    let (mut hash, mut chunk) = (Sha256::new(), vec![0; 1 << 18]);
    loop {
        let count = input.read(&mut chunk).map_err(failed)?;
        let bytes = chunk.get(..count).unwrap_or_default();
        if bytes.is_empty() {
            break;
        }
        hash.update(bytes);
        copy.write_all(bytes).map_err(failed)?;
    }
    archive.check_digest(&format!("{:x}", hash.finalize()))?;
    copy.rewind().map_err(failed)?;
    Ok(copy)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;

    fn write_archive(dir: &Path) -> RootArchive {
        let path = dir.join("root.tar");
        let mut tar = tar::Builder::new(File::create(&path).unwrap());
        let mut header = tar::Header::new_gnu();
        header.set_size(5);
        header.set_mode(0o4755);
        header.set_uid(0);
        header.set_gid(0);
        tar.append_data(&mut header, "./sh", "#!/x\n".as_bytes()).unwrap();
        drop(tar.into_inner().unwrap());
        let digest = format!("{:x}", Sha256::digest(fs::read(&path).unwrap()));
        RootArchive { path, digest }
    }

    #[test]
    fn archive_is_verified_before_it_is_unpacked() {
        let dir = tempfile::tempdir().unwrap();
        let images = dir.path().join("images");
        let archive = write_archive(dir.path());
        let mut bytes = fs::read(&archive.path).unwrap();
        // An entry that could not be created, were it reached.
        bytes[0] = b'/';
        fs::write(&archive.path, bytes).unwrap();
        let error = unpack_once_in(&images, &archive, None).unwrap_err();
        assert!(error.contains("root.json"), "{error}");
        assert_eq!(fs::read_dir(&images).unwrap().count(), 0);
    }

    #[test]
    fn unpacked_root_is_closed_to_other_users() {
        let dir = tempfile::tempdir().unwrap();
        let images = dir.path().join("images");
        let archive = write_archive(dir.path());
        let is_root = rustix::process::geteuid().is_root();
        let owner = is_root.then_some(IMAGE_ID);
        let root = unpack_once_in(&images, &archive, owner).unwrap();
        assert_eq!(fs::metadata(&images).unwrap().mode() & 0o7777, 0o700);
        let file = fs::metadata(root.join("sh")).unwrap();
        assert_eq!(file.mode() & 0o7777, 0o755);
        assert!(!is_root || (file.uid(), file.gid()) == (IMAGE_ID, IMAGE_ID));
        assert_eq!(unpack_once_in(&images, &archive, owner).unwrap(), root);
        assert_eq!(fs::read_dir(&images).unwrap().count(), 1);

        // A directory that others can write to is not used.
        fs::set_permissions(&images, fs::Permissions::from_mode(0o777)).unwrap();
        unpack_once_in(&images, &archive, owner).unwrap_err();
    }
}
