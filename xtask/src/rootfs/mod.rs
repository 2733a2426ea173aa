//! `cargo xtask rootfs`: the read-only root image, from Debian packages and our agent.
//!
//! ```text
//! packages.lock ── download ──▶ packages ─┐
//! recipe.toml, overlay/, finish.py ───────┴─ unpack, prune, finish ──▶ base tree ──────────────┐
//! guest-agent/, benches/* ─────── cargo build ──────▶ /init, /usr/lib/chitin/* ────────────────┴─ mkfs.erofs, tar ──▶ root.img, root.tar
//! ```
//!
//! Packages, base tree and image are cached apart: another agent needs neither network nor unpacking.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::cache::{self, Key};
use crate::process::{capture_output, new_command};
use crate::{static_build, workspace};
use apt::Apt;
use lock::{Lock, Pin};
use recipe::Recipe;

mod apt;
mod image;
mod lock;
mod recipe;
mod tree;

/// Raise it when this code makes something else of the same inputs.
const BUILDER: u32 = 1;

/// Crates that Cargo compiles for them: only the length of the progress bar.
const PROGRAM_CRATES: u64 = 40;

/// What is ours in the image: package, which is also the name of its binary, and path in the image.
const PROGRAMS: [(&str, &str); 3] = [
    ("chitin-agent", "init"),
    ("chitin-echo", "usr/lib/chitin/echo"),
    ("chitin-peer", "usr/lib/chitin/peer"),
];

/// Arguments of `cargo xtask rootfs`.
#[derive(Debug, Default, clap::Args)]
pub struct Args {
    /// Build everything a second time, elsewhere, and compare the digests
    #[arg(long)]
    pub check_reproducible: bool,
    /// Pin the newest package versions in rootfs/packages.lock
    #[arg(long, conflicts_with = "locked")]
    pub update: bool,
    /// Fail, rather than use newer ones, if the archives have dropped a pinned package version
    #[arg(long)]
    pub locked: bool,
}

/// What root.json says beside root.img and root.tar.
#[derive(Serialize)]
struct Manifest<'a> {
    sha256: &'a str,
    tar_sha256: &'a str,
    size: u64,
    agent_sha256: &'a str,
    erofs_utils: &'a str,
    builder: u32,
    /// False: rootfs/packages.lock named versions that are gone.
    as_locked: bool,
    packages: &'a [Pin],
}

/// Builds `target/artifacts/root.img`, `root.tar` and `root.json`; a no-op if nothing has changed.
pub fn run(args: &Args) -> Result<ExitCode> {
    let started = Instant::now();
    let builder = Builder::new()?;
    let programs = static_build::build_static(
        &PROGRAMS.map(|(package, _)| package),
        "Building the programs of the root image",
        PROGRAM_CRATES,
    )?;
    if args.update {
        builder.update_lock()?;
    }
    let (base, packages) = builder.base(builder.packages(args)?, args)?;
    let entry = builder.image(&base, &packages, &programs)?;
    let manifest = entry.join("root.json");
    let text = fs::read(&manifest).with_context(|| format!("read {}", manifest.display()))?;
    let text: serde_json::Value =
        serde_json::from_slice(&text).with_context(|| format!("in {}", manifest.display()))?;
    cache::publish_file(&manifest, "root.json")?;
    cache::publish_file(&entry.join("root.tar"), "root.tar")?;
    let published = cache::publish_file(&entry.join("root.img"), "root.img")?;
    eprintln!(
        "rootfs: {} ({} MiB, {} packages, sha256 {}) in {:.1} s",
        published.display(),
        fs::metadata(&published)?.len() >> 20,
        packages.lock.pins.len(),
        text["sha256"].as_str().unwrap_or("unknown"),
        started.elapsed().as_secs_f32(),
    );
    if args.check_reproducible {
        builder.check_reproducible(&packages, &programs, &published)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The packages an image is made of.
struct Packages {
    lock: Lock,
    /// Whether they are those of rootfs/packages.lock.
    as_locked: bool,
}

struct Builder {
    /// The repository's directory of that name.
    rootfs: PathBuf,
    cache: PathBuf,
    recipe_text: String,
    recipe: Recipe,
}

impl Builder {
    fn new() -> Result<Self> {
        let rootfs = workspace::root_dir().join("rootfs");
        let path = rootfs.join("recipe.toml");
        let recipe_text = read(&path)?;
        let recipe =
            Recipe::parse(&recipe_text).with_context(|| format!("in {}", path.display()))?;
        Ok(Self { rootfs, cache: workspace::cache_dir()?, recipe_text, recipe })
    }

    fn lock_path(&self) -> PathBuf {
        self.rootfs.join("packages.lock")
    }

    fn read_lock(&self) -> Result<Lock> {
        let path = self.lock_path();
        Lock::parse(&read(&path)?).with_context(|| format!("in {}", path.display()))
    }

    fn update_lock(&self) -> Result<()> {
        let new = Lock::new(&self.recipe, Apt::update(&self.recipe)?.resolve(&self.recipe)?);
        match self.read_lock() {
            Ok(old) => {
                let changes = old.changes_to(&new);
                changes.iter().for_each(|line| eprintln!("rootfs: {line}"));
                eprintln!("rootfs: {} of {} packages have changed", changes.len(), new.pins.len());
            }
            Err(error) => eprintln!("rootfs: writing a new lock file ({error:#})"),
        }
        let path = self.lock_path();
        fs::write(&path, new.to_string()).with_context(|| format!("write {}", path.display()))
    }

    /// The pinned packages, or what stood in for them when they were found to be gone.
    fn packages(&self, args: &Args) -> Result<Packages> {
        let pinned = self.read_lock()?;
        pinned.check_against(&self.recipe)?;
        let path = self.substitute_path(&pinned);
        if args.locked || !path.exists() {
            return Ok(Packages { lock: pinned, as_locked: true });
        }
        let lock = Lock::parse(&read(&path)?).with_context(|| {
            format!("in {}; remove it to try the pinned versions again", path.display())
        })?;
        eprintln!(
            "rootfs: WARNING: the archives had dropped {} pinned package version(s): not the pinned image. `cargo xtask rootfs --update` pins what there is",
            pinned.changes_to(&lock).len()
        );
        Ok(Packages { lock, as_locked: false })
    }

    /// Remembers what replaces a lock whose versions are gone, so that a second build needs no network either.
    fn substitute_path(&self, pinned: &Lock) -> PathBuf {
        self.cache.join(format!(
            "rootfs-substitute-{}.lock",
            &digest(pinned.to_string().as_bytes())[..16]
        ))
    }

    /// The base tree: everything but the agent. Returns it with the packages it is made of.
    fn base(&self, packages: Packages, args: &Args) -> Result<(PathBuf, Packages)> {
        let mut substitute = None;
        let base = cache::find_or_build("rootfs-base", self.base_key(&packages.lock)?, |tree| {
            substitute = self.fetch(&packages.lock, args)?;
            // Under this key only the tree of these very packages may be kept.
            ensure!(substitute.is_none(), "the pinned packages are gone");
            self.assemble(&packages.lock, tree)
        });
        match substitute {
            Some(lock) => self.base(Packages { lock, as_locked: false }, args),
            None => Ok((base?, packages)),
        }
    }

    fn base_key(&self, lock: &Lock) -> Result<Key> {
        let mut overlay = Sha256::new();
        tree::hash_tree(&self.rootfs.join("overlay"), &mut overlay)?;
        let key = Key::new("rootfs-base", BUILDER)
            .with_text("recipe", &self.recipe_text)
            .with_text("lock", &lock.to_string());
        key.with_bytes("overlay", &overlay.finalize()).with_file(&self.rootfs.join("finish.py"))
    }

    fn staging(&self, below: &Path) -> Result<tempfile::TempDir> {
        fs::create_dir_all(below).with_context(|| format!("make {}", below.display()))?;
        let staging = tempfile::Builder::new().prefix("rootfs-building-").tempdir_in(below);
        staging.with_context(|| format!("make a directory in {}", below.display()))
    }

    /// Where a package file is kept: by content, so that no version of it is ever taken for another.
    fn package_path(&self, pin: &Pin) -> PathBuf {
        self.cache.join("packages").join(format!("{}.deb", pin.sha256))
    }

    /// Downloads what is not in the cache. If the archives no longer have all of it, resolves anew and returns that.
    fn fetch(&self, lock: &Lock, args: &Args) -> Result<Option<Lock>> {
        let wanted: Vec<_> =
            lock.pins.iter().filter(|pin| !self.package_path(pin).exists()).collect();
        if wanted.is_empty() {
            return Ok(None);
        }
        eprintln!("rootfs: downloading {} packages", wanted.len());
        let apt = Apt::update(&self.recipe)?;
        let gone = apt.missing(&wanted)?;
        if !gone.is_empty() {
            let list = gone
                .iter()
                .map(|pin| format!("{} {}", pin.name, pin.version))
                .collect::<Vec<_>>()
                .join(", ");
            ensure!(!args.locked, "the archives no longer have these pinned packages: {list}");
            eprintln!(
                "rootfs: WARNING: the archives no longer have {list}. Building with current versions instead: the image is not the pinned one. \
                 `cargo xtask rootfs --update` pins what there is"
            );
            let substitute = Lock::new(&self.recipe, apt.resolve(&self.recipe)?);
            ensure!(substitute != *lock, "the archives offer {list}, but apt does not find it");
            let path = self.substitute_path(lock);
            fs::write(&path, substitute.to_string())
                .with_context(|| format!("write {}", path.display()))?;
            return Ok(Some(substitute));
        }
        let downloaded = apt.download(&wanted)?;
        let staging = self.staging(&self.cache.join("packages"))?;
        for pin in wanted {
            let file = apt::package_file(&downloaded, pin)?;
            check_package(&file, pin)?;
            // By way of a directory next to the goal, since a rename does not cross file systems.
            let copy = staging.path().join(&pin.sha256);
            fs::copy(&file, &copy).with_context(|| format!("copy {}", file.display()))?;
            fs::rename(&copy, self.package_path(pin)).context("keep a package")?;
        }
        Ok(None)
    }

    /// Makes the base tree in an empty directory, out of cached packages.
    fn assemble(&self, lock: &Lock, tree: &Path) -> Result<()> {
        eprintln!("rootfs: unpacking {} packages", lock.pins.len());
        for pin in &lock.pins {
            let package = self.package_path(pin);
            check_package(&package, pin)?;
            capture_output(new_command("dpkg-deb", ["--extract"]).arg(&package).arg(tree))
                .with_context(|| format!("unpack {}", pin.name))?;
        }
        tree::merge_usr(tree)?;
        for pattern in tree::prune(tree, &self.recipe.prune)? {
            eprintln!(
                "rootfs: nothing in the packages matches the recipe's `{pattern}` (any more)"
            );
        }
        for directory in &self.recipe.directory {
            tree::ensure_directory(&tree::inside(tree, &directory.path)?)?;
        }
        tree::copy_over(&self.rootfs.join("overlay"), tree)?;
        for link in &self.recipe.link {
            tree::make_link(tree, link)?;
        }
        self.finish(tree)?;
        try_out(tree)
    }

    /// Runs the tree's own linker cache tool and Python, without chroot: neither needs root.
    fn finish(&self, tree: &Path) -> Result<()> {
        let libraries = tree.join("usr/lib/x86_64-linux-gnu");
        // Without a cache the loader tries several directories for each library of each program.
        capture_output(new_command(tree.join("usr/sbin/ldconfig"), ["-X", "-r"]).arg(tree))
            .context("index libraries")?;
        let mut python = Command::new(libraries.join("ld-linux-x86-64.so.2"));
        python
            .arg("--library-path")
            .arg(&libraries)
            .arg(tree.join("usr/bin/python3.11"))
            .args(["-S", "-B"])
            .arg(self.rootfs.join("finish.py"))
            .arg(tree)
            .env_clear()
            .env("PYTHONHOME", tree.join("usr"))
            // Sets are written to bytecode in the order of their hashes.
            .env("PYTHONHASHSEED", "0")
            .env("PYTHONUTF8", "1");
        eprint!(
            "rootfs: {}",
            capture_output(&mut python).context("complete the tree (rootfs/finish.py)")?
        );
        Ok(())
    }

    /// Base tree and our programs to image and manifest; returns their directory.
    fn image(&self, base: &Path, packages: &Packages, programs: &Path) -> Result<PathBuf> {
        let erofs_utils = image::tools_version()?;
        let agent_sha256 = digest_file(&programs.join("chitin-agent"))?;
        let mut key = Key::new("rootfs", BUILDER)
            .with_text("base", &base.file_name().unwrap_or_default().to_string_lossy())
            .with_text("erofs-utils", &erofs_utils)
            .with_text("archive", "tar, in the format of GNU")
            // The same packages can be the pinned ones for one checkout and substitutes for another.
            .with_text("as locked", &packages.as_locked.to_string());
        for (package, _) in PROGRAMS {
            key = key.with_text(package, &digest_file(&programs.join(package))?);
        }
        cache::find_or_build("rootfs", key, |entry| {
            eprintln!("rootfs: making the image");
            let image = entry.join("root.img");
            let archive = entry.join("root.tar");
            let size = self.make_image(base, programs, &image, &archive)?;
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

    fn make_image(
        &self,
        base: &Path,
        programs: &Path,
        image: &Path,
        archive: &Path,
    ) -> Result<u64> {
        // A copy, because the base must stay what its key says; modes, because cached files are read-only.
        let stage = self.staging(&self.cache)?;
        let root = stage.path().join("root");
        tree::ensure_directory(&root)?;
        tree::copy_over(base, &root)?;
        for (package, path) in PROGRAMS {
            let to = tree::inside(&root, path)?;
            fs::create_dir_all(to.parent().unwrap_or(&root))
                .with_context(|| format!("make room for /{path}"))?;
            fs::copy(programs.join(package), &to).with_context(|| format!("copy {package}"))?;
            fs::set_permissions(&to, Permissions::from_mode(0o755))
                .with_context(|| format!("make /{path} executable"))?;
        }
        tree::set_modes(&root, &self.recipe.directory)?;
        image::make(&root, image, archive, &self.recipe)
    }

    /// Makes tree and image again, in another place, and compares with the published image.
    fn check_reproducible(
        &self,
        packages: &Packages,
        programs: &Path,
        published: &Path,
    ) -> Result<()> {
        let elsewhere = tempfile::Builder::new().prefix("chitin-rootfs-again-").tempdir()?;
        let tree = elsewhere.path().join("another/tree");
        fs::create_dir_all(&tree)?;
        self.assemble(&packages.lock, &tree)?;
        let image = elsewhere.path().join("again.img");
        let archive = elsewhere.path().join("again.tar");
        self.make_image(&tree, programs, &image, &archive)?;
        let both = |image: &Path, archive: &Path| {
            Ok::<_, anyhow::Error>([digest_file(image)?, digest_file(archive)?].join(" "))
        };
        let (first, again) =
            (both(published, &published.with_extension("tar"))?, both(&image, &archive)?);
        if first != again {
            let kept = elsewhere.keep();
            bail!(
                "not reproducible: {first} first, {again} again; the second one is in {}",
                kept.display()
            );
        }
        eprintln!("rootfs: reproducible: {again} twice");
        Ok(())
    }
}

/// Runs a few programs of the tree with the tree as root, where this machine lets us.
fn try_out(tree: &Path) -> Result<()> {
    const SCRIPT: &str = "set -e
        python3 -c 'import ssl, json, sqlite3, ctypes, lzma, bz2, zoneinfo, hashlib
assert len(ssl.create_default_context().get_ca_certs()) == 0
zoneinfo.ZoneInfo(\"Europe/Zurich\")'
        for tool in sh bash ls cat find grep sed awk sha256sum env xargs tar gzip diff which; do command -v $tool; done
        find /etc -name passwd | xargs grep -q ^agent:
        printf x | sha256sum | grep -q ^2d711642
        test \"$(id -un 1000)\" = agent";
    let mut probe = new_command("unshare", ["--map-root-user", "true"]);
    if !probe.stderr(Stdio::null()).status().is_ok_and(|status| status.success()) {
        eprintln!(
            "rootfs: user namespaces are not allowed here: the tree's programs are not tried out"
        );
        return Ok(());
    }
    let mut enter = new_command("unshare", ["--map-root-user", "--root"]);
    enter.arg(tree).args(["/bin/sh", "-c", SCRIPT]);
    enter.env_clear().env("PATH", "/usr/bin:/usr/sbin").env("PYTHONDONTWRITEBYTECODE", "1");
    capture_output(&mut enter).context("try the tree's programs out")?;
    Ok(())
}

fn check_package(file: &Path, pin: &Pin) -> Result<()> {
    let found = digest_file(file)?;
    ensure!(
        found == pin.sha256,
        "{} is not the pinned {} {}: its SHA-256 is {found}; remove it",
        file.display(),
        pin.name,
        pin.version
    );
    Ok(())
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("read {}", path.display()))
}

fn digest_file(path: &Path) -> Result<String> {
    let mut file = fs::File::open(path).with_context(|| format!("open {}", path.display()))?;
    let mut hash = Sha256::new();
    std::io::copy(&mut file, &mut hash).with_context(|| format!("read {}", path.display()))?;
    Ok(format!("{:x}", hash.finalize()))
}

fn digest(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}
