//! `cargo xtask rootfs`: the read-only root image, from Debian packages and our agent.
//!
//! ```text
//! packages.lock ── download ──▶ packages ─┐
//! recipe.toml, overlay/, finish.py ───────┴─ unpack, prune, finish ─▶ base tree ─┐
//! guest-agent/, benches/* ─── cargo build ─▶ /init, /usr/lib/chitin/* ───────────┴─┬─▶ root.img
//!                                                                                  └─▶ root.tar
//! ```
//!
//! Packages, base tree and image are cached separately: a new agent needs neither network nor
//! unpacking.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::cache::{self, Key};
use crate::progress::print_note;
use crate::{static_build, workspace};
use apt::Apt;
use lock::Lock;
pub use lock::Pin;
use recipe::Recipe;

mod apt;
mod base;
#[cfg(test)]
mod document_test;
mod image;
mod lock;
mod recipe;
mod tree;

/// The version of this code. Raise it when the same inputs give another result.
const BUILDER: u32 = 1;

/// Our programs in the image: the package, which is also the name of its binary, and the path in
/// the image.
pub const PROGRAMS: [(&str, &str); 3] = [
    ("chitin-agent", "init"),
    ("chitin-echo", "usr/lib/chitin/echo"),
    ("chitin-peer", "usr/lib/chitin/peer"),
];

/// Crates that Cargo compiles for them: only the length of the progress bar.
const PROGRAM_CRATES: u64 = 40;

/// Arguments of `cargo xtask rootfs`.
#[derive(Debug, Default, clap::Args)]
pub struct Args {
    /// Build everything a second time, in another directory, and compare the digests
    #[arg(long)]
    pub check_reproducible: bool,
    /// Pin the newest package versions in rootfs/packages.lock
    #[arg(long, conflicts_with = "locked")]
    pub update: bool,
    /// Fail if the archives have dropped a pinned package version, instead of using newer ones
    #[arg(long)]
    pub locked: bool,
}

/// The contents of root.json, next to root.img and root.tar.
#[derive(Serialize)]
struct Manifest<'a> {
    sha256: &'a str,
    tar_sha256: &'a str,
    size: u64,
    agent_sha256: &'a str,
    erofs_utils: &'a str,
    builder: u32,
    /// False: rootfs/packages.lock names versions that are gone.
    as_locked: bool,
    packages: &'a [Pin],
}

/// Builds `target/artifacts/root.img`, `root.tar` and `root.json`, unless they are up to date.
pub fn run(args: &Args) -> Result<ExitCode> {
    let started = Instant::now();
    let builder = Builder::open()?;
    let programs = static_build::build_static(
        &PROGRAMS.map(|(package, _)| package),
        "Building the programs of the root image",
        PROGRAM_CRATES,
    )?;
    if args.update {
        builder.update_lock()?;
    }
    let (base, packages) = builder.find_or_build_base(builder.choose_packages(args)?, args)?;
    let entry = builder.find_or_build_image(&base, &packages, &programs)?;
    cache::publish_file(&entry.join("root.json"), "root.json")?;
    cache::publish_file(&entry.join("root.tar"), "root.tar")?;
    let published = cache::publish_file(&entry.join("root.img"), "root.img")?;
    print_note(&format!(
        "rootfs: {} ({} MiB, {} packages, sha256 {}) in {:.1} s",
        published.display(),
        fs::metadata(&published)?.len() >> 20,
        packages.lock.pins.len(),
        read_digest(&entry.join("root.json"))?,
        started.elapsed().as_secs_f32(),
    ));
    if args.check_reproducible {
        builder.check_reproducible(&packages, &programs, &published)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Returns the digest of the image that a manifest describes.
fn read_digest(manifest: &Path) -> Result<String> {
    let manifest_text = read_text(manifest)?;
    let manifest: serde_json::Value = serde_json::from_str(&manifest_text)
        .with_context(|| format!("in {}", manifest.display()))?;
    Ok(manifest["sha256"].as_str().unwrap_or("unknown").to_owned())
}

/// Returns the Debian release of the image, and its pinned packages.
pub fn read_pins() -> Result<(String, Vec<Pin>)> {
    let builder = Builder::open()?;
    let pins = builder.read_lock()?.pins;
    Ok((builder.recipe.suite, pins))
}

/// The packages of an image.
struct Packages {
    lock: Lock,
    /// True if they are those of rootfs/packages.lock.
    as_locked: bool,
}

struct Builder {
    /// The directory `rootfs` of the repository.
    rootfs: PathBuf,
    cache: PathBuf,
    recipe_text: String,
    recipe: Recipe,
}

impl Builder {
    fn open() -> Result<Self> {
        let rootfs = workspace::root_dir().join("rootfs");
        let path = rootfs.join("recipe.toml");
        let recipe_text = read_text(&path)?;
        let recipe =
            Recipe::parse(&recipe_text).with_context(|| format!("in {}", path.display()))?;
        Ok(Self { rootfs, cache: workspace::cache_dir()?, recipe_text, recipe })
    }

    fn lock_path(&self) -> PathBuf {
        self.rootfs.join("packages.lock")
    }

    fn read_lock(&self) -> Result<Lock> {
        let path = self.lock_path();
        Lock::parse(&read_text(&path)?).with_context(|| format!("in {}", path.display()))
    }

    fn update_lock(&self) -> Result<()> {
        let newest = Apt::update(&self.recipe)?.resolve_closure(&self.recipe)?;
        let new = Lock::new(&self.recipe, newest);
        match self.read_lock() {
            Ok(old) => {
                let changes = old.list_changes(&new);
                changes.iter().for_each(|line| eprintln!("rootfs: {line}"));
                eprintln!("rootfs: {} of {} packages have changed", changes.len(), new.pins.len());
            }
            Err(error) => eprintln!("rootfs: writing a new lock file ({error:#})"),
        }
        let path = self.lock_path();
        fs::write(&path, new.to_string()).with_context(|| format!("write {}", path.display()))
    }

    /// Returns the pinned packages, or their substitutes if an earlier run found versions gone.
    fn choose_packages(&self, args: &Args) -> Result<Packages> {
        let pinned = self.read_lock()?;
        pinned.check_against(&self.recipe)?;
        let path = self.substitute_path(&pinned);
        if args.locked || !path.exists() {
            return Ok(Packages { lock: pinned, as_locked: true });
        }
        let lock = Lock::parse(&read_text(&path)?).with_context(|| {
            format!("in {}; remove it to try the pinned versions again", path.display())
        })?;
        print_note(&format!(
            "rootfs: WARNING: the archives have dropped {} pinned package version(s): this is not \
             the pinned image. `cargo xtask rootfs --update` pins the current versions",
            pinned.list_changes(&lock).len()
        ));
        Ok(Packages { lock, as_locked: false })
    }

    /// Returns the path of the lock that replaces one whose versions are gone, so that a second
    /// build needs no network either.
    fn substitute_path(&self, pinned: &Lock) -> PathBuf {
        let digest = format!("{:x}", Sha256::digest(pinned.to_string().as_bytes()));
        self.cache.join(format!("rootfs-substitute-{}.lock", &digest[..16]))
    }

    /// Creates a temporary directory on the file system of the cache.
    fn create_staging(&self, below: &Path) -> Result<tempfile::TempDir> {
        fs::create_dir_all(below).with_context(|| format!("create {}", below.display()))?;
        let staging = tempfile::Builder::new().prefix("rootfs-building-").tempdir_in(below);
        staging.with_context(|| format!("create a directory in {}", below.display()))
    }

    /// Builds image and manifest from the base tree and our programs; returns their directory.
    fn find_or_build_image(
        &self,
        base: &Path,
        packages: &Packages,
        programs: &Path,
    ) -> Result<PathBuf> {
        let erofs_utils = image::query_tools_version()?;
        let agent_sha256 = digest_file(&programs.join("chitin-agent"))?;
        let mut key = Key::new("rootfs", BUILDER)
            .with_text("base", &base.file_name().unwrap_or_default().to_string_lossy())
            .with_text("erofs-utils", &erofs_utils)
            .with_text("archive", "tar, in the format of GNU")
            // The same packages can be pinned for one checkout and substitutes for another.
            .with_text("as locked", &packages.as_locked.to_string());
        for (package, _) in PROGRAMS {
            key = key.with_text(package, &digest_file(&programs.join(package))?);
        }
        cache::find_or_build("rootfs", key, |entry| {
            print_note("rootfs: building the image");
            let image = entry.join("root.img");
            let archive = entry.join("root.tar");
            let size = self.build_image(base, programs, &image, &archive)?;
            let manifest = Manifest {
                sha256: &digest_file(&image)?,
                tar_sha256: &digest_file(&archive)?,
                size,
                agent_sha256: &agent_sha256,
                erofs_utils: &erofs_utils,
                builder: BUILDER,
                as_locked: packages.as_locked,
                packages: &packages.lock.pins,
            };
            let manifest = serde_json::to_string_pretty(&manifest)? + "\n";
            fs::write(entry.join("root.json"), manifest).context("write root.json")
        })
    }

    fn build_image(
        &self,
        base: &Path,
        programs: &Path,
        image: &Path,
        archive: &Path,
    ) -> Result<u64> {
        // A copy, because the base must not change; modes are set, because cached files are
        // read-only.
        let stage = self.create_staging(&self.cache)?;
        let root = stage.path().join("root");
        tree::ensure_directory(&root)?;
        tree::copy_over(base, &root)?;
        for (package, path) in PROGRAMS {
            let to = tree::resolve_inside(&root, path)?;
            fs::create_dir_all(to.parent().unwrap_or(&root))
                .with_context(|| format!("create the directory of /{path}"))?;
            fs::copy(programs.join(package), &to).with_context(|| format!("copy {package}"))?;
            fs::set_permissions(&to, Permissions::from_mode(0o755))
                .with_context(|| format!("make /{path} executable"))?;
        }
        tree::set_modes(&root, &self.recipe.directory)?;
        image::build_image(&root, image, archive, &self.recipe)
    }

    /// Builds tree and image again, in another directory, and compares with the published image.
    fn check_reproducible(
        &self,
        packages: &Packages,
        programs: &Path,
        published: &Path,
    ) -> Result<()> {
        let elsewhere = tempfile::Builder::new().prefix("chitin-rootfs-again-").tempdir()?;
        let tree = elsewhere.path().join("another/tree");
        fs::create_dir_all(&tree).with_context(|| format!("create {}", tree.display()))?;
        self.assemble_base(&packages.lock, &tree)?;
        let image = elsewhere.path().join("again.img");
        let archive = elsewhere.path().join("again.tar");
        self.build_image(&tree, programs, &image, &archive)?;
        let first =
            [digest_file(published)?, digest_file(&published.with_extension("tar"))?].join(" ");
        let second = [digest_file(&image)?, digest_file(&archive)?].join(" ");
        if first != second {
            let kept = elsewhere.keep();
            bail!(
                "not reproducible: the first build is {first}, the second {second}; \
                 the second is kept in {}",
                kept.display()
            );
        }
        eprintln!("rootfs: reproducible: {second} twice");
        Ok(())
    }
}

fn read_text(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("read {}", path.display()))
}

fn digest_file(path: &Path) -> Result<String> {
    let mut file = fs::File::open(path).with_context(|| format!("open {}", path.display()))?;
    let mut hash = Sha256::new();
    std::io::copy(&mut file, &mut hash).with_context(|| format!("read {}", path.display()))?;
    Ok(format!("{:x}", hash.finalize()))
}
