//! A private root of a container whose policy needs mount points that the image does not have.
//!
//! The directories on the way to a mount point are created new, and every other entry of them is
//! mounted from the image, read-only. The shared root stays unchanged.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};

/// Directories that every container mounts over.
const MOUNTED: [&str; 5] = ["/dev", "/proc", "/sys", "/tmp", "/work"];

/// Directories and empty files that serve as mount points. Dropping it removes them.
#[derive(Debug)]
pub(super) struct Tree {
    path: PathBuf,
    /// Entries of the image and their mount points in the container.
    pub image_mounts: Vec<(PathBuf, PathBuf)>,
    /// Mount points of new file systems.
    pub mount_points: Vec<PathBuf>,
}

impl Tree {
    pub fn create(path: PathBuf, root: &Path, mount_points: &[PathBuf]) -> io::Result<Tree> {
        let mut tree =
            Tree { path, image_mounts: Vec::new(), mount_points: mount_points.to_owned() };
        tree.create_directory(root, Path::new("/"))?;
        Ok(tree)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Creates a directory that is above a mount point.
    fn create_directory(&mut self, root: &Path, at: &Path) -> io::Result<()> {
        let directory = |path: &Path| fs::DirBuilder::new().mode(0o755).create(path);
        directory(&below(&self.path, at))?;
        for entry in fs::read_dir(below(root, at))? {
            let entry = entry?;
            let (inner, kind) = (at.join(entry.file_name()), entry.file_type()?);
            let target = below(&self.path, &inner);
            if kind.is_symlink() {
                symlink(fs::read_link(entry.path())?, target)?;
            } else if self.mount_points.contains(&inner) {
                directory(&target)?;
            } else if kind.is_dir()
                && self.mount_points.iter().any(|point| point.starts_with(&inner))
            {
                self.create_directory(root, &inner)?;
            } else {
                match kind.is_dir() {
                    true => directory(&target)?,
                    false => drop(fs::File::create_new(&target)?),
                }
                if !MOUNTED.iter().any(|mounted| inner == Path::new(mounted)) {
                    self.image_mounts.push((entry.path(), inner));
                }
            }
        }
        for point in self.mount_points.iter().filter(|point| point.parent() == Some(at)) {
            match directory(&below(&self.path, point)) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                created => created?,
            }
        }
        Ok(())
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        // The next start removes leftovers.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Returns a path of the container below a directory of the host.
fn below(directory: &Path, path: &Path) -> PathBuf {
    directory.join(path.strip_prefix("/").unwrap_or(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tree_creates_only_the_way_to_mount_points() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        for name in ["usr/bin", "usr/share/doc", "etc/ssl", "mnt", "proc"] {
            fs::create_dir_all(root.join(name)).unwrap();
        }
        fs::write(root.join("init"), "").unwrap();
        fs::write(root.join("etc/passwd"), "").unwrap();
        symlink("usr/bin", root.join("bin")).unwrap();
        let mount_points = ["/shared", "/etc/app", "/mnt"].map(PathBuf::from);
        let path = dir.path().join("tree");
        let tree = Tree::create(path.clone(), &root, &mount_points).unwrap();
        let mut image_mounts: Vec<_> =
            tree.image_mounts.iter().map(|(_, to)| to.to_str().unwrap()).collect();
        image_mounts.sort_unstable();
        assert_eq!(image_mounts, ["/etc/passwd", "/etc/ssl", "/init", "/usr"]);
        assert!(tree.image_mounts.contains(&(root.join("etc/ssl"), "/etc/ssl".into())));
        for point in mount_points {
            assert!(below(&path, &point).is_dir(), "{}", point.display());
        }
        assert_eq!(fs::read_link(path.join("bin")).unwrap(), Path::new("usr/bin"));
        assert!(
            path.join("init").is_file() && path.join("usr").is_dir() && path.join("proc").is_dir()
        );
        assert!(!path.join("usr/bin").exists());
        drop(tree);
        assert!(!path.exists());
    }
}
