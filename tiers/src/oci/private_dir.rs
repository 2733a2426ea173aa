//! Directories of root that no other user can change.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, Uid, fchmod, fstat, mkdir, open};
use rustix::io::Errno;

use crate::trusted_path::{UntrustedReason, check_closed_path};

/// A directory that another user could have changed.
fn untrusted(path: &Path, reason: &str) -> io::Error {
    let message =
        format!("{}: {reason}: remove it, or give it to root with mode 0755", path.display());
    io::Error::new(io::ErrorKind::PermissionDenied, message)
}

/// Creates a directory with this mode, or sets the mode of an existing one, and returns it.
///
/// # Errors
/// The directory is a link, belongs to another user, or other users can write to it or to a
/// directory above it.
pub(super) fn open_private_dir(path: &Path, mode: u32) -> io::Result<OwnedFd> {
    if let Some(parent) = path.parent() {
        create_parents(parent)?;
    }
    let mode = Mode::from_raw_mode(mode);
    match mkdir(path, mode) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(errno.into()),
    }
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = match open(path, flags, Mode::empty()) {
        Err(Errno::LOOP | Errno::NOTDIR) => return Err(untrusted(path, "it is not a directory")),
        opened => opened?,
    };
    let status = fstat(&directory)?;
    if Uid::from_raw(status.st_uid) != rustix::process::geteuid() {
        return Err(untrusted(path, "it belongs to another user"));
    }
    if status.st_mode & 0o022 != 0 {
        return Err(untrusted(path, "other users can change it"));
    }
    if status.st_mode & 0o7777 != mode.as_raw_mode() {
        // The umask, or an earlier version.
        fchmod(&directory, mode)?;
    }
    Ok(directory)
}

/// Creates missing directories, and checks that only root can rename the existing ones.
fn create_parents(path: &Path) -> io::Result<()> {
    fs::create_dir_all(path)?;
    check_ancestors(path)
}

/// Checks that only root can replace a file or a directory, or one above it.
fn check_ancestors(path: &Path) -> io::Result<()> {
    check_closed_path(path).map_err(|error| match error.reason {
        UntrustedReason::Inspect(source) => source,
        reason => untrusted(&error.path, &reason.to_string()),
    })
}

/// Returns the path without links, if only root can change what it leads to.
pub(super) fn resolve_trusted(path: &Path) -> io::Result<PathBuf> {
    check_ancestors(path)?;
    path.canonicalize()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn is_refused<T>(outcome: io::Result<T>) -> bool {
        outcome.is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
    }

    #[test]
    fn private_directory_follows_no_link() {
        let dir = tempfile::tempdir().unwrap();
        let (victim, link) = (dir.path().join("victim"), dir.path().join("link"));
        fs::create_dir(&victim).unwrap();
        symlink(&victim, &link).unwrap();
        assert!(is_refused(open_private_dir(&link, 0o700)));
        let private = dir.path().join("a/private");
        open_private_dir(&private, 0o700).unwrap();
        assert_eq!(fs::metadata(&private).unwrap().mode() & 0o7777, 0o700);
        set_mode(&private, 0o755);
        open_private_dir(&private, 0o700).unwrap();
        assert_eq!(fs::metadata(&private).unwrap().mode() & 0o7777, 0o700);
    }

    #[test]
    fn directory_of_another_user_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let shared = dir.path().join("shared");
        fs::create_dir(&shared).unwrap();
        set_mode(&shared, 0o777);
        assert!(is_refused(open_private_dir(&shared, 0o700)));
        assert!(is_refused(open_private_dir(&shared.join("below"), 0o700)));
        set_mode(&shared, 0o755);
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&shared, Some(1000), None).unwrap();
            assert!(is_refused(open_private_dir(&shared, 0o700)));
            assert!(is_refused(open_private_dir(&shared.join("below"), 0o700)));
        }
    }

    #[test]
    fn file_that_others_can_replace_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let bin = dir.path().join("bin");
        fs::create_dir(&bin).unwrap();
        let program = bin.join("runsc");
        fs::write(&program, "").unwrap();
        set_mode(&program, 0o755);
        assert_eq!(resolve_trusted(&program).unwrap(), program.canonicalize().unwrap());
        set_mode(&program, 0o775);
        assert!(is_refused(resolve_trusted(&program)));
        set_mode(&program, 0o755);
        set_mode(&bin, 0o777);
        assert!(is_refused(resolve_trusted(&program)));
        // A link in a trusted directory leads to a file that others can replace.
        let link = dir.path().join("link");
        symlink(&program, &link).unwrap();
        assert!(is_refused(resolve_trusted(&link)));
    }
}
