use std::path::{Path, PathBuf};

use crate::Error;

const BUILD_ARTIFACTS: &str = "build it with `cargo xtask setup && cargo xtask kernel && cargo xtask rootfs`, or name \
                               the directory that holds it in CHITIN_ARTIFACTS";
const BUILD_MONITOR: &str = "build it with `cargo xtask build`, or name it in CHITIN_VMM";

/// The files every microVM is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Artifacts {
    /// The guest kernel, an ELF `vmlinux`.
    pub kernel: PathBuf,
    /// The read-only root image, EROFS.
    pub root_image: PathBuf,
    /// The monitor, `chitin-vmm`.
    pub monitor: PathBuf,
}

impl Artifacts {
    /// Finds them: in `$CHITIN_ARTIFACTS`, else in `../artifacts` seen from the running program (a build tree), else in
    /// `../lib/chitin` (an installation). The monitor is `$CHITIN_VMM`, else beside the running program.
    ///
    /// Nothing is checked to exist: [`check`](Artifacts::check) does that, and a builder may replace a path first.
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

    /// Says which file is missing and how to get it.
    ///
    /// # Errors
    /// [`Error::Artifact`] for the first one that is not a file.
    pub fn check(&self) -> Result<(), Error> {
        for (what, path, remedy) in [
            ("guest kernel", &self.kernel, BUILD_ARTIFACTS),
            ("root image", &self.root_image, BUILD_ARTIFACTS),
            ("monitor", &self.monitor, BUILD_MONITOR),
        ] {
            if !path.is_file() {
                return Err(Error::Artifact { what, path: path.clone(), remedy });
            }
        }
        Ok(())
    }
}
