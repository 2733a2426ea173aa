//! The destination of a copy on the host, before there is anything to copy.

use std::path::Path;

use rustix::fs::{Access, AtFlags, accessat, statat};
use rustix::io::Errno;

use crate::current_path::CurrentPath;
use crate::location::{Location, file_kind};
use crate::{Error, FileKind, Lookup, Refusal};

/// The umask of a process that cannot read its own: nothing for other users.
const CAUTIOUS_UMASK: u16 = 0o077;

/// Checks that [`receive`](crate::receive) could create or replace the file or directory at `path`,
/// with the options of the host.
///
/// # Errors
/// The parent directory is missing or read-only, a link leads nowhere, or the existing entry is
/// neither a file nor a directory.
pub fn check_target(path: impl AsRef<Path>) -> Result<(), Error> {
    let current = CurrentPath::new(path.as_ref());
    let location = Location::resolve(path.as_ref(), Lookup::FollowLinks, &current)?;
    let existing = match statat(&location.dir, &location.name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Some(file_kind(stat.st_mode)),
        Err(Errno::NOENT) => None,
        Err(errno) => return Err(current.filesystem_error("examine")(errno)),
    };
    // A directory is merged into; anything else gets a new entry in its parent.
    let changed = match existing {
        Some(FileKind::Directory) => location.name.as_slice(),
        Some(FileKind::File | FileKind::Symlink) | None => b".",
        Some(existing) => {
            let incoming = FileKind::File;
            return Err(current.refusal(Refusal::KindMismatch { existing, incoming }));
        }
    };
    let access = Access::WRITE_OK | Access::EXEC_OK;
    accessat(&location.dir, changed, access, AtFlags::empty())
        .map_err(current.filesystem_error("write to"))
}

/// Returns the umask of this process.
///
/// `umask(2)` could only read it by changing it, which other threads would notice.
pub fn read_umask() -> u16 {
    std::fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|status| parse_umask(&status))
        .unwrap_or(CAUTIOUS_UMASK)
}

fn parse_umask(status: &str) -> Option<u16> {
    let line = status.lines().find_map(|line| line.strip_prefix("Umask:"))?;
    u16::from_str_radix(line.trim(), 8).ok().filter(|umask| *umask <= 0o777)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn umask_is_read_as_octal() {
        assert_eq!(parse_umask("Name:\tx\nUmask:\t0027\nState:\tR\n"), Some(0o027));
        assert_eq!(parse_umask("Umask:\t9\n"), None);
        assert_eq!(parse_umask("Name:\tx\n"), None);
    }
}
