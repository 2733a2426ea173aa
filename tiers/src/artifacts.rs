//! The files that every microVM is made of.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::Error;

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

impl Artifacts {
    /// Returns the paths of the artifacts.
    ///
    /// Kernel and root image are in `$CHITIN_ARTIFACTS`, or in `../artifacts` relative to the
    /// running program (a build tree), or in `../lib/chitin` (an installation). The monitor is
    /// `$CHITIN_VMM`, or next to the running program.
    ///
    /// This does not check that the files exist, so that a builder can replace a path first: see
    /// [`check`](Artifacts::check).
    pub fn locate() -> Artifacts {
        let here = std::env::current_exe()
            .ok()
            .and_then(|exe| exe.parent().map(Path::to_owned))
            .unwrap_or_default();
        let dir = std::env::var_os("CHITIN_ARTIFACTS").map(PathBuf::from).unwrap_or_else(|| {
            let up = here.parent().unwrap_or(&here);
            let built = up.join("artifacts");
            if built.is_dir() { built } else { up.join("lib/chitin") }
        });
        Artifacts {
            kernel: dir.join("vmlinux"),
            root_image: dir.join("root.img"),
            monitor: std::env::var_os("CHITIN_VMM")
                .map(PathBuf::from)
                .unwrap_or_else(|| here.join("chitin-vmm")),
        }
    }

    /// Checks that every file exists.
    ///
    /// # Errors
    /// [`Error::Artifact`] for the first one that is not a file.
    pub fn check(&self) -> Result<(), Error> {
        for (kind, path) in [
            (ArtifactKind::Kernel, &self.kernel),
            (ArtifactKind::RootImage, &self.root_image),
            (ArtifactKind::Monitor, &self.monitor),
        ] {
            if !path.is_file() {
                return Err(Error::Artifact { kind, path: path.clone() });
            }
        }
        Ok(())
    }
}
