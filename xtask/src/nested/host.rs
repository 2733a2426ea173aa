//! The kernel and the initrd of the emulated machine: Debian's kernel, our PID 1.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::initrd::{Initrd, parse_dependencies};
use crate::debian::{self, Package};
use crate::process::{capture_output, new_command};
use crate::progress::Progress;
use crate::{cache, static_build, workspace};

/// The generic flavour: the cloud flavour has no 9p.
const KERNEL: &str = "linux-image-6.12.117+deb12-amd64";
const KERNEL_VERSION: &str = "6.12.117-1~deb12u1";
/// The modules that the machine needs in addition to built-in code. Dependencies are followed.
const MODULES: [&str; 4] = ["9pnet_virtio", "9p", "overlay", "kvm-amd"];
/// The files that PID 1 is built from, below `integration/nested-init`.
const INIT_SOURCES: [&str; 6] =
    ["Cargo.toml", "src/failure.rs", "src/lib.rs", "src/main.rs", "src/mounts.rs", "src/ports.rs"];
/// Crates that Cargo compiles for PID 1: only the length of the progress bar.
const INIT_CRATES: u64 = 6;

/// The files that QEMU boots.
pub struct Host {
    /// Debian's vmlinuz.
    pub kernel: PathBuf,
    /// Modules and PID 1.
    pub initrd: PathBuf,
}

/// Finds both in the cache, or builds them.
pub fn find_or_build() -> Result<Host> {
    let kernel = find_or_fetch_kernel()?;
    let init_dir = workspace::root_dir().join("integration/nested-init");
    let mut key =
        cache::Key::new("nested-initrd", 1).with_text("kernel", &kernel.to_string_lossy());
    for source in INIT_SOURCES {
        key = key.with_file(&init_dir.join(source))?;
    }
    let initrd = cache::find_or_build("nested-initrd", key, |dir| build_initrd(&kernel, dir))?;
    Ok(Host { kernel: kernel.join("vmlinuz"), initrd: initrd.join("initrd.img") })
}

fn build_initrd(kernel: &Path, dir: &Path) -> Result<()> {
    let mut initrd = Initrd::default();
    for dir in ["dev", "proc", "sys", "modules"] {
        initrd.add_directory(dir);
    }
    initrd.add_console();
    initrd.add_file("init", 0o755, &build_init()?);
    let modules = fs::read_dir(kernel.join("modules")).context("list the modules")?;
    let mut modules: Vec<PathBuf> =
        modules.map(|module| Ok(module?.path())).collect::<Result<_>>()?;
    modules.sort();
    for module in modules {
        let name = module.file_name().context("a module has a name")?.to_string_lossy();
        let content = fs::read(&module).with_context(|| format!("read {}", module.display()))?;
        initrd.add_file(&format!("modules/{name}"), 0o644, &content);
    }
    fs::write(dir.join("initrd.img"), initrd.finish()).context("write initrd.img")
}

/// Returns the cache entry with `vmlinuz` and `modules/NN-name.ko`, numbered in the order of
/// loading.
fn find_or_fetch_kernel() -> Result<PathBuf> {
    let package = Package::resolve_pinned(KERNEL, KERNEL_VERSION)?;
    let modules = MODULES.join(" ");
    let key = |package: &Package| {
        cache::Key::new("nested-kernel", 1)
            .with_text("kernel", &package.to_string())
            .with_text("modules", &modules)
    };
    debian::find_or_build("nested-kernel", &package, key, |dir| {
        let progress = Progress::start(&format!("Fetching {package}"), 0);
        let scratch = debian::create_scratch_dir(dir, "unpacked")?;
        let (used, deb) = package.download_binary(&scratch, find_newest)?;
        debian::unpack_package(&deb, &scratch)?;
        extract(&scratch, dir)?;
        cache::remove_tree(&scratch)?;
        progress.finish();
        Ok(used)
    })
}

/// Returns the newest 6.12 kernel that apt has: the metapackage of that series depends on it.
fn find_newest() -> Result<Package> {
    let depends =
        capture_output(&mut new_command("apt-cache", ["depends", "linux-image-6.12-amd64"]))?;
    let name = depends.lines().find_map(|line| line.trim().strip_prefix("Depends: linux-image-"));
    let name =
        name.context("apt knows no linux-image-6.12-amd64: is bookworm-security in its sources?")?;
    debian::find_candidate(&format!("linux-image-{name}"))
}

/// Copies kernel and modules of an unpacked package.
fn extract(package: &Path, into: &Path) -> Result<()> {
    fs::copy(find_in(package, "boot", "vmlinuz-")?, into.join("vmlinuz"))
        .context("copy vmlinuz")?;
    let mut files = Vec::new();
    list_files(&find_in(package, "lib/modules", "6.")?, &mut files)?;
    let modules = into.join("modules");
    fs::create_dir(&modules).with_context(|| format!("create {}", modules.display()))?;
    extract_modules(&files, &modules)
}

/// Returns the path in a directory of the package whose name begins with `prefix`.
fn find_in(package: &Path, dir: &str, prefix: &str) -> Result<PathBuf> {
    let items = fs::read_dir(package.join(dir))
        .with_context(|| format!("list {dir} of the kernel package"))?;
    items
        .filter_map(|item| Some(item.ok()?.path()))
        .find(|path| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix))
        })
        .with_context(|| format!("the kernel package has no {dir}/{prefix}*"))
}

/// Copies [`MODULES`] and their dependencies, numbered in the order of loading.
fn extract_modules(files: &[PathBuf], into: &Path) -> Result<()> {
    let mut loaded: Vec<String> = Vec::new();
    let mut wanted: Vec<String> = MODULES.iter().rev().map(|name| (*name).to_owned()).collect();
    // Depth first: a module goes back on the list, after its dependencies, until those are loaded.
    while let Some(name) = wanted.pop() {
        if loaded.contains(&name) {
            continue;
        }
        let module = read_module(files, &name)?;
        let missing: Vec<String> =
            parse_dependencies(&module).into_iter().filter(|d| !loaded.contains(d)).collect();
        if missing.is_empty() {
            let file = into.join(format!("{:02}-{name}.ko", loaded.len()));
            fs::write(&file, &module).with_context(|| format!("write {}", file.display()))?;
            loaded.push(name);
        } else {
            ensure!(
                !missing.iter().any(|m| wanted.contains(m)),
                "the dependencies of module {name} form a cycle"
            );
            wanted.push(name);
            wanted.extend(missing);
        }
    }
    Ok(())
}

fn list_files(dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for item in fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))? {
        let item = item?;
        if item.file_type()?.is_dir() {
            list_files(&item.path(), files)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_covers_all_sources_of_pid_1() {
        let dir = workspace::root_dir().join("integration/nested-init/src");
        for source in fs::read_dir(dir).unwrap() {
            let name = source.unwrap().file_name().into_string().unwrap();
            let listed = INIT_SOURCES.contains(&format!("src/{name}").as_str());
            assert!(listed || name.ends_with("_test.rs"), "{name}");
        }
    }
}
