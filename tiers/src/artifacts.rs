//! The files that every microVM is made of.

use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::Error;
use crate::trusted_path::check_trusted_path;

/// The files that every microVM is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Artifacts {
    /// The guest kernel, an ELF `vmlinux`.
    pub kernel: PathBuf,
    /// The read-only root image, EROFS.
    pub root_image: PathBuf,
    /// The monitor, `chitin-vmm`.
    pub monitor: PathBuf,
}

/// The kind of a file of [`Artifacts`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ArtifactKind {
    /// The guest kernel.
    Kernel,
    /// The root image.
    RootImage,
    /// The monitor.
    Monitor,
}

impl ArtifactKind {
    /// Returns the remedy for a missing file.
    pub fn remedy(self) -> &'static str {
        match self {
            ArtifactKind::Kernel | ArtifactKind::RootImage => {
                "build it with `cargo xtask setup && cargo xtask kernel && cargo xtask rootfs`, or \
                 set CHITIN_ARTIFACTS to its directory"
            }
            ArtifactKind::Monitor => {
                "build it with `cargo xtask build`, or set CHITIN_VMM to its path"
            }
        }
    }
}

impl fmt::Display for ArtifactKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ArtifactKind::Kernel => "guest kernel",
            ArtifactKind::RootImage => "root image",
            ArtifactKind::Monitor => "monitor",
        })
    }
}

impl ArtifactKind {
    /// All kinds.
    pub const ALL: [ArtifactKind; 3] =
        [ArtifactKind::Kernel, ArtifactKind::RootImage, ArtifactKind::Monitor];

    /// Returns the variable that names its location.
    pub fn variable(self) -> &'static str {
        match self {
            ArtifactKind::Kernel | ArtifactKind::RootImage => "CHITIN_ARTIFACTS",
            ArtifactKind::Monitor => "CHITIN_VMM",
        }
    }
}

impl Artifacts {
    /// Returns the paths of the artifacts.
    ///
    /// Kernel and root image are in `$CHITIN_ARTIFACTS`, or in `../artifacts` relative to the
    /// running program (a build tree), or in `../lib/chitin` (an installation). The monitor is
    /// `$CHITIN_VMM`, or next to the running program.
    ///
    /// This does not check the files, so that a builder can replace a path first: see
    /// [`check`](Artifacts::check).
    pub fn locate() -> Artifacts {
        let here = Program::find().map(|program| program.dir).unwrap_or_default();
        let dir = std::env::var_os(ArtifactKind::Kernel.variable())
            .map(PathBuf::from)
            .unwrap_or_else(|| {
                let [built, installed] = list_artifact_dirs(&here);
                if built.is_dir() { built } else { installed }
            });
        Artifacts {
            kernel: dir.join("vmlinux"),
            root_image: dir.join("root.img"),
            monitor: std::env::var_os(ArtifactKind::Monitor.variable())
                .map(PathBuf::from)
                .unwrap_or_else(|| here.join("chitin-vmm")),
        }
    }

    /// Checks that every file exists, and that no other user can replace one that was found
    /// relative to the running program.
    ///
    /// # Errors
    /// [`Error::Artifact`] or [`Error::UntrustedArtifact`] for the first one.
    pub fn check(&self) -> Result<(), Error> {
        ArtifactKind::ALL.into_iter().try_for_each(|kind| self.check_file(kind))
    }

    /// Does the same for one file.
    ///
    /// # Errors
    /// As for [`check`](Artifacts::check).
    pub fn check_file(&self, kind: ArtifactKind) -> Result<(), Error> {
        check_artifact(kind, self.path(kind))
    }

    /// Returns the path of a file.
    pub fn path(&self, kind: ArtifactKind) -> &Path {
        match kind {
            ArtifactKind::Kernel => &self.kernel,
            ArtifactKind::RootImage => &self.root_image,
            ArtifactKind::Monitor => &self.monitor,
        }
    }
}

/// Checks a file that belongs to an artifact: exists, and is trusted if it was found.
pub(crate) fn check_artifact(kind: ArtifactKind, path: &Path) -> Result<(), Error> {
    if !path.is_file() {
        return Err(Error::Artifact { kind, path: path.to_owned() });
    }
    // A path that the caller or a variable has named is the user's choice.
    if std::env::var_os(kind.variable()).is_some() {
        return Ok(());
    }
    match Program::find() {
        Some(program) => program.check_found(kind, path),
        None => Ok(()),
    }
}

/// The running program.
struct Program {
    /// Its directory, without links.
    dir: PathBuf,
    /// The user who could replace it anyway.
    owner: u32,
}

impl Program {
    fn find() -> Option<Program> {
        let exe = std::env::current_exe().ok()?;
        // The file that runs, also if its path has another one by now.
        let owner = std::fs::metadata("/proc/self/exe").ok()?.uid();
        Some(Program { dir: exe.parent()?.to_owned(), owner })
    }

    /// Checks that no other user can replace a file, if it was found relative to this program. A
    /// program can run from a directory in which everybody may create `../artifacts`.
    ///
    /// The directories that hold the program as well may belong to anybody: their owner can replace
    /// the program.
    fn check_found(&self, kind: ArtifactKind, path: &Path) -> Result<(), Error> {
        let Some(parent) = path.parent() else { return Ok(()) };
        let (base, found) = match kind {
            ArtifactKind::Monitor => (self.dir.as_path(), parent == self.dir),
            ArtifactKind::Kernel | ArtifactKind::RootImage => {
                let found = list_artifact_dirs(&self.dir).iter().any(|dir| parent == dir);
                (self.dir.parent().unwrap_or(&self.dir), found)
            }
        };
        if !found {
            return Ok(());
        }
        let owners = [rustix::process::geteuid().as_raw(), self.owner];
        let path = path.to_owned();
        check_trusted_path(&path, base, &owners).map_err(|cause| Error::UntrustedArtifact {
            kind,
            path,
            cause,
        })
    }
}

/// Returns the directories of kernel and root image for a program in `here`: of a build tree, and
/// of an installation.
fn list_artifact_dirs(here: &Path) -> [PathBuf; 2] {
    let up = here.parent().unwrap_or(here);
    [up.join("artifacts"), up.join("lib/chitin")]
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// A tree with a program and artifacts, as cargo leaves it.
    fn create_build_tree() -> (tempfile::TempDir, Program) {
        let tree = tempfile::tempdir().unwrap();
        for dir in ["release", "artifacts"] {
            fs::create_dir(tree.path().join(dir)).unwrap();
        }
        for file in ["release/chitin-vmm", "artifacts/vmlinux", "artifacts/root.img"] {
            fs::write(tree.path().join(file), "").unwrap();
            fs::set_permissions(tree.path().join(file), Permissions::from_mode(0o755)).unwrap();
        }
        let dir = tree.path().join("release");
        let owner = fs::metadata(&dir).unwrap().uid();
        (tree, Program { dir, owner })
    }

    const FILES: [(ArtifactKind, &str); 3] = [
        (ArtifactKind::Kernel, "artifacts/vmlinux"),
        (ArtifactKind::RootImage, "artifacts/root.img"),
        (ArtifactKind::Monitor, "release/chitin-vmm"),
    ];

    #[test]
    fn build_tree_of_this_user_is_trusted() {
        let (tree, program) = create_build_tree();
        for (kind, file) in FILES {
            program.check_found(kind, &tree.path().join(file)).unwrap();
        }
    }

    #[test]
    fn artifacts_that_others_can_replace_are_refused() {
        for (kind, file) in FILES {
            let (tree, program) = create_build_tree();
            let path = tree.path().join(file);
            for place in [path.as_path(), path.parent().unwrap(), tree.path()] {
                let before = fs::metadata(place).unwrap().permissions();
                fs::set_permissions(place, Permissions::from_mode(0o777)).unwrap();
                let error = program.check_found(kind, &path).unwrap_err();
                let Error::UntrustedArtifact { cause, .. } = error else { panic!("{error:?}") };
                assert_eq!(cause.path, place);
                fs::set_permissions(place, before).unwrap();
            }
            program.check_found(kind, &path).unwrap();
        }
    }

    #[test]
    fn artifacts_that_the_caller_names_are_used() {
        let (_tree, program) = create_build_tree();
        let chosen = tempfile::tempdir().unwrap();
        fs::set_permissions(chosen.path(), Permissions::from_mode(0o777)).unwrap();
        for (kind, _) in FILES {
            program.check_found(kind, &chosen.path().join("file")).unwrap();
        }
    }

    #[test]
    fn missing_artifact_is_an_error_of_its_kind() {
        let missing = Path::new("/nonexistent/vmlinux");
        let error = check_artifact(ArtifactKind::Kernel, missing).unwrap_err();
        assert!(matches!(error, Error::Artifact { kind: ArtifactKind::Kernel, .. }));
    }
}
