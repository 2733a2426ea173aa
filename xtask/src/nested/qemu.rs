//! The QEMU of the emulated machine: Debian's source with our patches, limited to the devices of
//! this one machine.
//!
//! It is built and not installed, because no release has both faults of its SVM fixed. In 7.2, the
//! release of Debian 12, a second-stage fault during a walk of the guest's page tables leaves
//! registers as of the middle of an instruction. In all releases up to 10.0, an interrupt that
//! VMRUN injects is occasionally delivered twice (`integration/nested-qemu/patches`).

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, Result};

use crate::debian::{self, Package};
use crate::process::{capture_output, new_command, query_version};
use crate::progress::Progress;
use crate::{cache, pypi, workspace};

const PROGRAM: &str = "qemu-system-x86_64";
/// The release of Debian 13, which is maintained longer than that of Debian 12's backports.
const SUITE: &str = "trixie";
const SOURCE: &str = "qemu";
const SOURCE_VERSION: &str = "1:10.0.13+ds-0+deb13u1";
/// QEMU's build system: that of Debian 12 is too old.
const BUILD_SYSTEM: [pypi::Wheel; 2] = [
    ("meson", "1.11.1", "9b3a023657e393dbc5335b95c561337d49b7a458f5541e47ec44f2cc566e0d80"),
    ("pycotap", "1.3.1", "1c3a25b3ff89e48f4e00f1f71dbbc1642b4f65c65d416524d07e73492fff25ea"),
];
/// Steps of the build: only the length of the progress bar.
const STEPS: u64 = 1320;
const CONFIGURE: [&str; 12] = [
    "--target-list=x86_64-softmmu",
    "--without-default-features",
    "--without-default-devices",
    "--with-devices-x86_64=chitin",
    "--enable-tcg",
    "--enable-virtfs",
    "--enable-attr",
    "--disable-docs",
    "--disable-tools",
    "--disable-guest-agent",
    "--disable-install-blobs",
    "--disable-debug-info",
];
/// The directories of firmware in Debian's packages `qemu-system-data` and `seabios`.
pub const FIRMWARE: [&str; 2] = ["/usr/share/qemu", "/usr/share/seabios"];

/// Returns the program, which is built if it is not in the cache.
pub fn find_or_build() -> Result<PathBuf> {
    let patches = workspace::list_patches("integration/nested-qemu/patches")?;
    let inputs =
        cache::Key::new("patches", 1).with_file(&devices_file())?.with_files(&patches)?.into_hex();
    let compiler = query_version("gcc")?;
    let key = |source: &Package| {
        let key = cache::Key::new("qemu", 1)
            .with_text("source", &source.to_string())
            .with_text("inputs", &inputs);
        key.with_text("configure", &CONFIGURE.join(" ")).with_text("compiler", &compiler)
    };
    let package = Package::resolve_pinned(SOURCE, SOURCE_VERSION)?;
    let entry = debian::find_or_build("qemu", &package, key, |dir| build(dir, &package, &patches))?;
    Ok(entry.join(PROGRAM))
}

fn devices_file() -> PathBuf {
    workspace::root_dir().join("integration/nested-qemu/devices.mak")
}

fn build(dir: &Path, package: &Package, patches: &[PathBuf]) -> Result<Package> {
    let source = debian::create_scratch_dir(dir, "build")?;
    let progress = Progress::start(&format!("Fetching and unpacking {package}"), 0);
    let (used, archive) = package.download_source(SUITE, &source)?;
    debian::unpack_source(&archive, &source)?;
    debian::apply_patches(&source, patches)?;
    fs::copy(devices_file(), source.join("configs/devices/x86_64-softmmu/chitin.mak"))
        .context("add the list of devices to QEMU's source")?;
    progress.finish();

    let build_system = pypi::fetch_wheels("meson", &BUILD_SYSTEM)?;
    let mut configure = new_command(source.join("configure"), CONFIGURE);
    capture_output(configure.current_dir(&source).env("PYTHONPATH", &build_system))?;
    let jobs = thread::available_parallelism().map_or(2, usize::from);
    let mut ninja = new_command("ninja", ["-j", &jobs.to_string(), "-C", "build", PROGRAM]);
    ninja.current_dir(&source).env("PYTHONPATH", &build_system);
    // One line for each step: "[3/1320] Compiling C object …".
    Progress::follow(&mut ninja, "Building QEMU", STEPS, |line| line.starts_with('['))?;
    fs::rename(source.join("build").join(PROGRAM), dir.join(PROGRAM))
        .with_context(|| format!("the build made no {PROGRAM}"))?;
    cache::remove_tree(&source)?;
    Ok(used)
}
