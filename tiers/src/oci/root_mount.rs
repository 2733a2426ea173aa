//! The root of one container: a read-only mount of the unpacked image, in a directory that only
//! root and the container's users can enter.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{Gid, Mode, Uid, chmod, chown, mkdir};
use rustix::mount::{MountFlags, UnmountFlags, mount_bind, mount_remount, unmount};

use super::RUN;
use super::engine::Engine;
use super::private_dir::open_private_dir;
use super::tree::Tree;

/// Directory of the roots of containers. Their users pass through it and cannot list it.
const MOUNTS: &str = "/run/chitin/mounts";

/// A directory with the root of a container. Dropping it removes the directory; a container that
/// runs has mounts of its own.
#[derive(Debug)]
pub(super) struct RootMount {
    path: PathBuf,
    tree: Option<Tree>,
}

impl RootMount {
    /// Mounts an unpacked image for a container with these users.
    pub fn create(
        name: &str,
        engine: &Engine,
        image: &Path,
        first_user: u32,
        mount_points: &[PathBuf],
    ) -> io::Result<RootMount> {
        open_private_dir(Path::new(RUN), 0o711)?;
        open_private_dir(Path::new(MOUNTS), 0o711)?;
        let path = Path::new(MOUNTS).join(name);
        mkdir(&path, Mode::RWXU)?;
        let mut mount = RootMount { path, tree: None };
        // A runtime enters its root as the container's root user.
        chown(&mount.path, Some(Uid::ROOT), Some(Gid::from_raw(first_user)))?;
        chmod(&mount.path, Mode::from_raw_mode(0o710))?;
        let root = mount.image();
        mkdir(&root, Mode::RWXU)?;
        mount_bind(image, &root)?;
        mount_remount(&root, MountFlags::BIND | image_flags(engine), c"")?;
        if !mount_points.is_empty() {
            mount.tree = Some(Tree::create(mount.path.join("tree"), &root, mount_points)?);
        }
        Ok(mount)
    }

    fn image(&self) -> PathBuf {
        self.path.join("root")
    }

    /// Returns the root of the container.
    pub fn path(&self) -> PathBuf {
        self.tree.as_ref().map_or_else(|| self.image(), |tree| tree.path().to_owned())
    }

    pub fn tree(&self) -> Option<&Tree> {
        self.tree.as_ref()
    }

    /// Removes an abandoned root.
    pub fn remove(name: &OsStr) {
        remove_dir(&Path::new(MOUNTS).join(name));
    }
}

/// Returns the flags of the mount. A file of the image changes no user, and is no device.
///
/// gVisor opens files for its own kernel, which ignores both on its host; a version of 2022 cannot
/// make a mount read-only that has more flags.
fn image_flags(engine: &Engine) -> MountFlags {
    match engine.has_own_kernel() {
        true => MountFlags::RDONLY,
        false => MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV,
    }
}

impl Drop for RootMount {
    fn drop(&mut self) {
        // The next start removes leftovers.
        self.tree = None;
        remove_dir(&self.path);
    }
}

/// Removes the directory of a root. The image itself is never removed: its mount point must be
/// empty.
fn remove_dir(path: &Path) {
    let root = path.join("root");
    let _ = unmount(&root, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
    if fs::remove_dir(&root).is_ok() || !root.exists() {
        let _ = fs::remove_dir_all(path);
    }
}
