//! The base tree: everything in the image except our programs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

use super::apt::{Apt, find_package_file};
use super::lock::{Lock, Pin};
use super::{Args, BUILDER, Builder, Packages, digest_file, tree};
use crate::cache::{self, Key};
use crate::process::{capture_output, new_command};
use crate::progress::print_note;

impl Builder {
    /// Returns the base tree and the packages it was built from.
    pub(super) fn find_or_build_base(
        &self,
        packages: Packages,
        args: &Args,
    ) -> Result<(PathBuf, Packages)> {
        let mut substitute = None;
        let base = cache::find_or_build("rootfs-base", self.base_key(&packages.lock)?, |tree| {
            substitute = self.fetch_packages(&packages.lock, args)?;
            // This key is that of the tree of these packages, not of their substitutes.
            ensure!(substitute.is_none(), "the pinned packages are gone");
            self.assemble_base(&packages.lock, tree)
        });
        match substitute {
            Some(lock) => self.find_or_build_base(Packages { lock, as_locked: false }, args),
            None => Ok((base?, packages)),
        }
    }

    fn base_key(&self, lock: &Lock) -> Result<Key> {
        let mut overlay = Sha256::new();
        tree::hash_tree(&self.rootfs.join("overlay"), &mut overlay)?;
        Key::new("rootfs-base", BUILDER)
            .with_text("recipe", &self.recipe_text)
            .with_text("lock", &lock.to_string())
            .with_bytes("overlay", &overlay.finalize())
            .with_file(&self.rootfs.join("finish.py"))
    }

    /// Returns the path of a cached package file: by content, so that no version of it is ever
    /// mistaken for another.
    fn package_path(&self, pin: &Pin) -> PathBuf {
        self.cache.join("packages").join(format!("{}.deb", pin.sha256))
    }

    /// Downloads the packages that are not in the cache. If the archives have dropped one, returns
    /// a lock of current versions instead.
    fn fetch_packages(&self, lock: &Lock, args: &Args) -> Result<Option<Lock>> {
        let wanted: Vec<_> =
            lock.pins.iter().filter(|pin| !self.package_path(pin).exists()).collect();
        if wanted.is_empty() {
            return Ok(None);
        }
        print_note(&format!("rootfs: downloading {} packages", wanted.len()));
        let apt = Apt::update(&self.recipe)?;
        let gone = apt.list_missing(&wanted)?;
        if !gone.is_empty() {
            return self.resolve_substitute(lock, &apt, &gone, args).map(Some);
        }
        let downloaded = apt.download_packages(&wanted)?;
        let staging = self.create_staging(&self.cache.join("packages"))?;
        for pin in wanted {
            let file = find_package_file(&downloaded, pin)?;
            check_package(&file, pin)?;
            // Through a directory on the same file system, because a rename cannot cross one.
            let copy = staging.path().join(&pin.sha256);
            fs::copy(&file, &copy).with_context(|| format!("copy {}", file.display()))?;
            fs::rename(&copy, self.package_path(pin))
                .with_context(|| format!("keep the package {}", pin.name))?;
        }
        Ok(None)
    }

    /// Returns a lock of current versions, and keeps it for the next run.
    fn resolve_substitute(
        &self,
        lock: &Lock,
        apt: &Apt,
        gone: &[&Pin],
        args: &Args,
    ) -> Result<Lock> {
        let list: Vec<String> =
            gone.iter().map(|pin| format!("{} {}", pin.name, pin.version)).collect();
        let list = list.join(", ");
        ensure!(!args.locked, "the archives have dropped these pinned packages: {list}");
        print_note(&format!(
            "rootfs: WARNING: the archives have dropped {list}. Building with current versions \
             instead: the image is not the pinned one. `cargo xtask rootfs --update` pins them"
        ));
        let substitute = Lock::new(&self.recipe, apt.resolve_closure(&self.recipe)?);
        ensure!(substitute != *lock, "the archives list {list}, but apt does not find it");
        let path = self.substitute_path(lock);
        fs::write(&path, substitute.to_string())
            .with_context(|| format!("write {}", path.display()))?;
        Ok(substitute)
    }

    /// Builds the base tree in an empty directory from cached packages.
    pub(super) fn assemble_base(&self, lock: &Lock, tree: &Path) -> Result<()> {
        print_note(&format!("rootfs: unpacking {} packages", lock.pins.len()));
        for pin in &lock.pins {
            let package = self.package_path(pin);
            check_package(&package, pin)?;
            capture_output(new_command("dpkg-deb", ["--extract"]).arg(&package).arg(tree))
                .with_context(|| format!("unpack {}", pin.name))?;
        }
        tree::merge_usr(tree)?;
        for pattern in tree::prune_paths(tree, &self.recipe.prune)? {
            print_note(&format!(
                "rootfs: the pattern `{pattern}` of the recipe matches nothing in the packages"
            ));
        }
        for directory in &self.recipe.directory {
            tree::ensure_directory(&tree::resolve_inside(tree, &directory.path)?)?;
        }
        tree::copy_over(&self.rootfs.join("overlay"), tree)?;
        for link in &self.recipe.link {
            tree::replace_link(tree, link)?;
        }
        self.finish_tree(tree)?;
        try_programs(tree)
    }

    /// Runs the ldconfig and the Python of the tree, without chroot: neither needs root.
    fn finish_tree(&self, tree: &Path) -> Result<()> {
        let libraries = tree.join("usr/lib/x86_64-linux-gnu");
        // Without a cache the loader tries several directories for each library of each program.
        capture_output(new_command(tree.join("usr/sbin/ldconfig"), ["-X", "-r"]).arg(tree))
            .context("index the libraries")?;
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
            // Bytecode contains sets in the order of their hashes.
            .env("PYTHONHASHSEED", "0")
            .env("PYTHONUTF8", "1");
        let report = capture_output(&mut python).context("finish the tree (rootfs/finish.py)")?;
        print_note(&format!("rootfs: {}", report.trim_end()));
        Ok(())
    }
}

/// Runs a few programs with the tree as root, where this machine allows user namespaces.
fn try_programs(tree: &Path) -> Result<()> {
    const SCRIPT: &str = "set -e
        python3 -c 'import ssl, json, sqlite3, ctypes, lzma, bz2, zoneinfo, hashlib
assert len(ssl.create_default_context().get_ca_certs()) == 0
zoneinfo.ZoneInfo(\"Europe/Zurich\")'
        tools='sh bash ls cat find grep sed awk sha256sum env xargs tar gzip xz
            unzip diff patch which curl git jq less ps top ssh pip'
        for tool in $tools; do command -v $tool; done
        find /etc -name passwd | xargs grep -q ^agent:
        printf x | sha256sum | grep -q ^2d711642
        test \"$(id -un 1000)\" = agent
        curl --version | grep -q https && test \"$(echo [1] | jq .[0])\" = 1
        unzip -v && xz --version && patch --version && less --version
        python3 -c 'import ensurepip, pip; ensurepip.version()'";
    let mut probe = new_command("unshare", ["--map-root-user", "true"]);
    if !probe.stderr(Stdio::null()).status().is_ok_and(|status| status.success()) {
        print_note("rootfs: user namespaces are not allowed: the tree's programs are not tested");
        return Ok(());
    }
    let mut enter = new_command("unshare", ["--map-root-user", "--root"]);
    enter.arg(tree).args(["/bin/sh", "-c", SCRIPT]);
    enter.env_clear().env("PATH", "/usr/bin:/usr/sbin").env("PYTHONDONTWRITEBYTECODE", "1");
    capture_output(&mut enter).context("run the tree's programs")?;
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
