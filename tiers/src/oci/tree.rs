//! A root of one container's own, where a policy has a place that the image does not: on the way to it the image's directories
//! are made anew, and whatever else is in them is mounted from it, read-only. The root that all share stays as it is.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};

/// Open to all, as the roots are: a runtime looks for it as the container's own root user.
const TREES: &str = "/var/cache/chitin/trees";

/// Mounted over anyway.
const MOUNTED: [&str; 5] = ["/dev", "/proc", "/sys", "/tmp", "/work"];

/// Directories and empty files to be mounted on. Dropping it removes it.
#[derive(Debug)]
pub(super) struct Tree {
    path: PathBuf,
    /// From the image, and where to.
    pub borrowed: Vec<(PathBuf, PathBuf)>,
    /// What is mounted new.
    pub places: Vec<PathBuf>,
}

impl Tree {
    pub fn create(name: &str, root: &Path, places: &[PathBuf]) -> io::Result<Tree> {
        fs::DirBuilder::new().recursive(true).mode(0o755).create(TREES)?;
        Tree::create_at(Path::new(TREES).join(name), root, places)
    }

    fn create_at(path: PathBuf, root: &Path, places: &[PathBuf]) -> io::Result<Tree> {
        let mut tree = Tree { path, borrowed: Vec::new(), places: places.to_owned() };
        tree.grow(root, Path::new("/"))?;
        Ok(tree)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes one that its owner has left.
    pub fn remove(name: &OsStr) {
        let _ = fs::remove_dir_all(Path::new(TREES).join(name));
    }

    /// Makes a directory that a place is below.
    fn grow(&mut self, root: &Path, at: &Path) -> io::Result<()> {
        let directory = |path: &Path| fs::DirBuilder::new().mode(0o755).create(path);
        directory(&below(&self.path, at))?;
        for entry in fs::read_dir(below(root, at))? {
            let entry = entry?;
            let (inner, kind) = (at.join(entry.file_name()), entry.file_type()?);
            let made = below(&self.path, &inner);
            if kind.is_symlink() {
                symlink(fs::read_link(entry.path())?, made)?;
            } else if self.places.contains(&inner) {
                directory(&made)?;
            } else if kind.is_dir() && self.places.iter().any(|place| place.starts_with(&inner)) {
                self.grow(root, &inner)?;
            } else {
                match kind.is_dir() {
                    true => directory(&made)?,
                    false => drop(fs::File::create(&made)?),
                }
                if !MOUNTED.iter().any(|mounted| inner == Path::new(mounted)) {
                    self.borrowed.push((entry.path(), inner));
                }
            }
        }
        for place in self.places.iter().filter(|place| place.parent() == Some(at)) {
            match directory(&below(&self.path, place)) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                made => made?,
            }
        }
        Ok(())
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        // What is left is swept by the next start.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// A path of the container, as it lies in that directory of the host.
fn below(directory: &Path, path: &Path) -> PathBuf {
    directory.join(path.strip_prefix("/").unwrap_or(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_on_the_way_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        for name in ["usr/bin", "usr/share/doc", "etc/ssl", "mnt", "proc"] {
            fs::create_dir_all(root.join(name)).unwrap();
        }
        fs::write(root.join("init"), "").unwrap();
        fs::write(root.join("etc/passwd"), "").unwrap();
        symlink("usr/bin", root.join("bin")).unwrap();
        let places = ["/shared", "/etc/app", "/mnt"].map(PathBuf::from);
        let path = dir.path().join("tree");
        let tree = Tree::create_at(path.clone(), &root, &places).unwrap();
        let mut borrowed: Vec<_> =
            tree.borrowed.iter().map(|(_, to)| to.to_str().unwrap()).collect();
        borrowed.sort_unstable();
        assert_eq!(borrowed, ["/etc/passwd", "/etc/ssl", "/init", "/usr"]);
        assert!(tree.borrowed.contains(&(root.join("etc/ssl"), "/etc/ssl".into())));
        for place in places {
            assert!(below(&path, &place).is_dir(), "{}", place.display());
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
