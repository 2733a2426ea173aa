//! The emulated machine's kernel and initrd: Debian's own kernel, our PID 1.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::initrd::{Initrd, dependencies};
use crate::debian::{self, Package};
use crate::process::{capture_output, new_command};
use crate::progress::Progress;
use crate::{cache, static_build, workspace};

/// The generic flavour: the cloud flavour has no 9p.
const KERNEL: &str = "linux-image-6.12.117+deb12-amd64";
const KERNEL_VERSION: &str = "6.12.117-1~deb12u1";
/// What the machine needs beyond what is built in. Dependencies are followed.
const MODULES: [&str; 4] = ["9pnet_virtio", "9p", "overlay", "kvm-amd"];

/// Crates that Cargo compiles for PID 1: only the length of the progress bar.
const INIT_CRATES: u64 = 6;

/// Files QEMU boots.
pub struct Host {
    /// Debian's vmlinuz.
    pub kernel: PathBuf,
    /// Modules and PID 1.
    pub initrd: PathBuf,
}

/// Finds both in the cache, or makes them.
pub fn find_or_build() -> Result<Host> {
    let kernel = kernel()?;
    let init_dir = workspace::root_dir().join("integration/nested-init");
    let mut key = cache::Key::new("nested-initrd", 1).text("kernel", &kernel.to_string_lossy());
    for source in ["Cargo.toml", "src/lib.rs", "src/main.rs"] {
        key = key.file(&init_dir.join(source))?;
    }
    let initrd = cache::find_or_build("nested-initrd", key, |dir| {
        let mut initrd = Initrd::default();
        for dir in ["dev", "proc", "sys", "modules"] {
            initrd.directory(dir);
        }
        initrd.console();
        initrd.file("init", 0o755, &build_init()?);
        let mut modules: Vec<PathBuf> =
            fs::read_dir(kernel.join("modules"))?.map(|m| Ok(m?.path())).collect::<Result<_>>()?;
        modules.sort();
        for module in modules {
            let name =
                module.file_name().context("a module has a name")?.to_string_lossy().into_owned();
            initrd.file(&format!("modules/{name}"), 0o644, &fs::read(&module)?);
        }
        Ok(fs::write(dir.join("initrd.img"), initrd.finish())?)
    })?;
    Ok(Host { kernel: kernel.join("vmlinuz"), initrd: initrd.join("initrd.img") })
}

/// The cache entry with `vmlinuz` and `modules/NN-name.ko`, numbered in the order they load.
fn kernel() -> Result<PathBuf> {
    let package = Package::resolve(KERNEL, KERNEL_VERSION)?;
    let modules = MODULES.join(" ");
    let key = |package: &Package| {
        cache::Key::new("nested-kernel", 1)
            .text("kernel", &package.to_string())
            .text("modules", &modules)
    };
    debian::find_or_build("nested-kernel", &package, key, |dir| {
        let progress = Progress::start(&format!("Fetching {package}"), 0);
        let scratch = debian::create_scratch_dir(dir, "unpacked")?;
        let (used, deb) = package.download(&scratch, newest)?;
        debian::unpack_package(&deb, &scratch)?;
        extract(&scratch, dir)?;
        cache::remove_tree(&scratch)?;
        progress.finish();
        Ok(used)
    })
}

/// The newest 6.12 kernel that apt has: what the metapackage of that series depends on.
fn newest() -> Result<Package> {
    let depends =
        capture_output(&mut new_command("apt-cache", ["depends", "linux-image-6.12-amd64"]))?;
    let name = depends.lines().find_map(|line| line.trim().strip_prefix("Depends: linux-image-"));
    let name =
        name.context("apt knows no linux-image-6.12-amd64: is bookworm-security in its sources?")?;
    debian::find_candidate(&format!("linux-image-{name}"))
}

fn extract(package: &Path, into: &Path) -> Result<()> {
    let find = |dir: &str, prefix: &str| -> Result<PathBuf> {
        let items = fs::read_dir(package.join(dir))
            .with_context(|| format!("list {dir} of the kernel package"))?;
        let mut paths = items.filter_map(|item| Some(item.ok()?.path()));
        paths
            .find(|path| {
                path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix))
            })
            .with_context(|| format!("the kernel package has no {dir}/{prefix}*"))
    };
    fs::copy(find("boot", "vmlinuz-")?, into.join("vmlinuz"))?;
    let tree = find("lib/modules", "6.")?;
    let mut files = Vec::new();
    list(&tree, &mut files)?;
    fs::create_dir(into.join("modules"))?;

    let mut loaded: Vec<String> = Vec::new();
    let mut wanted: Vec<String> = MODULES.iter().rev().map(|name| (*name).to_owned()).collect();
    // Depth first: a module is on the list again, behind its dependencies, until those are loaded.
    while let Some(name) = wanted.pop() {
        if loaded.contains(&name) {
            continue;
        }
        let module = read_module(&files, &name)?;
        let missing: Vec<String> =
            dependencies(&module).into_iter().filter(|d| !loaded.contains(d)).collect();
        if missing.is_empty() {
            fs::write(into.join(format!("modules/{:02}-{name}.ko", loaded.len())), &module)?;
            loaded.push(name);
        } else {
            anyhow::ensure!(
                !missing.iter().any(|m| wanted.contains(m)),
                "modules depend on each other: {name}"
            );
            wanted.push(name);
            wanted.extend(missing);
        }
    }
    Ok(())
}

fn list(dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for item in fs::read_dir(dir)? {
        let item = item?;
        if item.file_type()?.is_dir() {
            list(&item.path(), files)?;
        } else {
            files.push(item.path());
        }
    }
    Ok(())
}

fn read_module(files: &[PathBuf], name: &str) -> Result<Vec<u8>> {
    let matches = |path: &&PathBuf| {
        let file = path.file_name().unwrap_or_default().to_string_lossy().replace('_', "-");
        let stem = name.replace('_', "-");
        file == format!("{stem}.ko.xz") || file == format!("{stem}.ko")
    };
    let path = files
        .iter()
        .find(matches)
        .with_context(|| format!("the kernel package has no module {name}"))?;
    if path.extension().is_some_and(|extension| extension == "xz") {
        capture_output(new_command("xz", ["--decompress", "--keep", "--force"]).arg(path))?;
        return Ok(fs::read(path.with_extension(""))?);
    }
    Ok(fs::read(path)?)
}

fn build_init() -> Result<Vec<u8>> {
    let label = "Building PID 1 of the emulated machine";
    let dir = static_build::build_static(&["chitin-nested-init"], label, INIT_CRATES)?;
    let binary = dir.join("chitin-nested-init");
    fs::read(&binary).with_context(|| format!("read {}", binary.display()))
}
