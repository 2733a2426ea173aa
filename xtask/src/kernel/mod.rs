//! `cargo xtask kernel`: the guest kernel, from Debian's kernel source and `kernel-config/`.
//!
//! The result is cached under the hash of source version, configuration, patches and compiler. The
//! same four give the same bytes: time, user and host of the build are fixed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;

use anyhow::{Context, Result, ensure};

use crate::debian::{self, Package};
use crate::process::{capture_output, new_command, query_version};
use crate::progress::{Progress, print_note};
use crate::{cache, workspace};

mod config;

/// The Debian package of the kernel source, and its version.
pub const SOURCE: &str = "linux-source-6.12";
pub const SOURCE_VERSION: &str = "6.12.117-1~deb12u1";
/// Steps that make prints for this configuration: only the length of the progress bar.
const STEPS: u64 = 1450;

/// Build the guest kernel, target/artifacts/vmlinux
#[derive(Debug, Default, clap::Args)]
pub struct Args {
    /// Print the path of the cache entry, which has vmlinux, its .config and its System.map
    #[arg(long)]
    print_entry: bool,
}

/// Builds the kernel if it is not in the cache, and publishes it.
pub fn run(args: &Args) -> Result<ExitCode> {
    let entry = find_or_build()?;
    let published = cache::publish_file(&entry.join("vmlinux"), "vmlinux")?;
    if args.print_entry {
        println!("{}", entry.display());
    } else {
        print_note(&format!("{}", published.display()));
    }
    Ok(ExitCode::SUCCESS)
}

/// Returns the cache entry with `vmlinux`, `config` and `System.map`.
fn find_or_build() -> Result<PathBuf> {
    let fragments = config::read_fragments(&workspace::root_dir().join("kernel-config"))?;
    let patches = workspace::list_patches("kernel-config/patches")?;
    let patch_key = cache::Key::new("patches", 1).with_files(&patches)?.into_hex();
    let (compiler, linker) = (query_version("gcc")?, query_version("ld")?);
    let key = |source: &Package| {
        let key = cache::Key::new("kernel", 1).with_text("source", &source.to_string());
        let key = key.with_text("config", &fragments.text).with_text("patches", &patch_key);
        key.with_text("compiler", &compiler).with_text("linker", &linker)
    };

    let package = Package::resolve_pinned(SOURCE, SOURCE_VERSION)?;
    debian::find_or_build("kernel", &package, key, |dir| build(dir, &package, &patches, &fragments))
}

fn build(
    dir: &Path,
    package: &Package,
    patches: &[PathBuf],
    fragments: &config::Fragments,
) -> Result<Package> {
    let scratch = debian::create_scratch_dir(dir, "build")?;
    let progress = Progress::start(&format!("Fetching and unpacking {package}"), 0);
    let (used, deb) = package.download_binary(&scratch, || debian::find_candidate(SOURCE))?;
    debian::unpack_package(&deb, &scratch)?;
    debian::unpack_source(&scratch.join(format!("usr/src/{SOURCE}.tar.xz")), &scratch)?;
    debian::apply_patches(&scratch, patches)?;
    progress.finish();

    configure(&scratch, fragments)?;
    compile(&scratch)?;
    for (from, to) in [("vmlinux", "vmlinux"), (".config", "config"), ("System.map", "System.map")]
    {
        fs::rename(scratch.join(from), dir.join(to))
            .with_context(|| format!("the build made no {from}"))?;
    }
    cache::remove_tree(&scratch)?;
    Ok(used)
}

/// Generates `.config` from "everything off" plus the fragments, and checks it against them.
fn configure(source: &Path, fragments: &config::Fragments) -> Result<()> {
    fs::write(source.join("chitin.config"), &fragments.text)?;
    capture_output(
        new_command("make", ["--silent", "allnoconfig", "KCONFIG_ALLCONFIG=chitin.config"])
            .current_dir(source),
    )?;
    let result =
        fs::read_to_string(source.join(".config")).context("make allnoconfig left no .config")?;
    let broken = config::list_mismatches(&fragments.options, &config::parse_config(&result));
    ensure!(
        broken.is_empty(),
        "Kconfig did not accept {} options of kernel-config (a dependency is missing, or another \
         option selects them):\n{}",
        broken.len(),
        broken.join("\n")
    );
    Ok(())
}

fn compile(source: &Path) -> Result<()> {
    let jobs = thread::available_parallelism().map_or(2, usize::from);
    let mut make = new_command("make", [format!("-j{jobs}").as_str(), "vmlinux"]);
    make.current_dir(source);
    // These would differ from one build to the next.
    make.env("KBUILD_BUILD_TIMESTAMP", "2026-01-01T00:00:00Z").env("KBUILD_BUILD_USER", "chitin");
    make.env("KBUILD_BUILD_HOST", "chitin").env("KBUILD_BUILD_VERSION", "1").env("LC_ALL", "C");
    // One line for each step: "  CC      kernel/fork.o".
    Progress::follow(&mut make, "Building the guest kernel", STEPS, |line| line.starts_with("  "))
}
