//! Finds and downloads packages with apt, from the archives that the machine is configured for, but
//! with a private state: neither installed packages nor foreign archives have an influence. Needs
//! no root.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::lock::Pin;
use super::recipe::Recipe;
use crate::process::{capture_output, new_command};

/// A private apt: separate package lists, nothing installed, Debian's archives only.
pub struct Apt {
    directory: tempfile::TempDir,
}

impl Apt {
    /// Downloads the package lists (about 9 MiB).
    pub fn update(recipe: &Recipe) -> Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix("chitin-apt-")
            .tempdir()
            .context("create a directory for apt")?;
        let root = directory.path();
        let root_text =
            root.to_str().context("the path of the temporary directory is not UTF-8")?;
        ensure!(
            !root_text.contains(['"', '\n']),
            "apt cannot use the path of the temporary directory: {root_text}"
        );
        for below in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(root.join(below)).context("create the directories of apt")?;
        }
        fs::write(root.join("status"), "").context("write the status file of apt")?;
        fs::write(root.join("preferences"), format_preferences(&recipe.suite))
            .context("write the preferences of apt")?;
        fs::write(root.join("apt.conf"), format_configuration(root_text, &recipe.architecture))
            .context("write the configuration of apt")?;
        let apt = Self { directory };
        let status = apt
            .apt_command("apt-get")
            .args(["update", "-qq"])
            .status()
            .context("run apt-get update")?;
        // Broken foreign archives are common and no reason to fail. But without one of Debian's,
        // pinned versions would seem to be gone, and be replaced by older ones without security
        // fixes.
        for suite in [recipe.suite.clone(), format!("{}-security", recipe.suite)] {
            ensure!(
                apt.has_lists(&suite)?,
                "apt-get update ({status}) did not fetch the package lists of {suite}: check the \
                 network, and that the apt sources of this machine have {0} and {0}-security",
                recipe.suite
            );
        }
        Ok(apt)
    }

    fn has_lists(&self, suite: &str) -> Result<bool> {
        let lists = self.directory.path().join("lists");
        let entries = fs::read_dir(&lists).with_context(|| format!("list {}", lists.display()))?;
        let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
        let names: Vec<String> =
            names.collect::<std::io::Result<_>>().context("list the package lists of apt")?;
        for release in names.iter().filter(|name| name.ends_with("Release")) {
            let text = fs::read(lists.join(release)).with_context(|| format!("read {release}"))?;
            let prefix = release.trim_end_matches("Release").trim_end_matches("In");
            let packages =
                names.iter().any(|name| name.starts_with(prefix) && name.contains("_Packages"));
            if packages && is_release(&String::from_utf8_lossy(&text), suite) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Returns the dependency closure of the recipe's packages in current versions, without the
    /// packages that the recipe skips.
    pub fn resolve_closure(&self, recipe: &Recipe) -> Result<Vec<Pin>> {
        let mut install = self.apt_command("apt-get");
        install.args(["install", "-qq", "-y", "--print-uris"]).args(recipe.requested());
        let closure = parse_uris(
            &capture_output(&mut install).context("resolve the packages of the recipe")?,
        )?;
        for skip in &recipe.skip {
            if !closure.iter().any(|found| found.name == skip.name) {
                eprintln!("rootfs: the recipe skips {}, which is not a dependency", skip.name);
            }
        }
        // `install` prints a weaker hash or none, `download` prints SHA-256.
        let wanted = closure.into_iter().filter(|found| !recipe.skips(&found.name));
        let mut download = self.apt_command("apt-get");
        download
            .args(["download", "-qq", "--print-uris"])
            .args(wanted.map(|found| found.exact_spec()));
        parse_uris(&capture_output(&mut download)?)?.into_iter().map(Found::into_pin).collect()
    }

    /// Returns the packages that the archives have dropped.
    pub fn list_missing<'a>(&self, pins: &[&'a Pin]) -> Result<Vec<&'a Pin>> {
        // Fails only if it finds none of the packages.
        let shown = self
            .apt_command("apt-cache")
            .arg("show")
            .args(pins.iter().map(|pin| exact_spec(pin)))
            .output();
        let shown = shown.context("run apt-cache show")?.stdout;
        let shown = String::from_utf8_lossy(&shown);
        // By content: the same version with other content is a dropped package as well.
        let hashes: Vec<_> =
            shown.lines().filter_map(|line| line.strip_prefix("SHA256: ")).collect();
        Ok(pins.iter().copied().filter(|pin| !hashes.contains(&pin.sha256.as_str())).collect())
    }

    /// Downloads packages and returns their directory, which is removed with `self`. apt checks
    /// signature and hashes of the archive; the caller compares the hash with the pinned one.
    pub fn download_packages(&self, pins: &[&Pin]) -> Result<PathBuf> {
        let target = self.directory.path().join("packages");
        fs::create_dir_all(&target).context("create a directory for packages")?;
        let mut download = self.apt_command("apt-get");
        download
            .current_dir(&target)
            .args(["download", "-qq"])
            .args(pins.iter().map(|pin| exact_spec(pin)));
        capture_output(&mut download).context("download packages")?;
        Ok(target)
    }

    fn apt_command(&self, program: &str) -> Command {
        // As an option, because $APT_CONFIG is read before the configuration of the machine.
        let mut command = new_command(program, ["-c"]);
        command.arg(self.directory.path().join("apt.conf"));
        command
    }
}

fn exact_spec(pin: &Pin) -> String {
    format!("{}={}", pin.name, pin.version)
}

fn format_preferences(suite: &str) -> String {
    format!(
        "Package: *\nPin: release o=Debian,n={suite}*\nPin-Priority: 900\n\n\
         Package: *\nPin: release o=*\nPin-Priority: -1\n"
    )
}

fn format_configuration(root: &str, architecture: &str) -> String {
    format!(
        "Dir::State \"{root}\";\n\
         Dir::State::status \"{root}/status\";\n\
         Dir::State::lists \"{root}/lists\";\n\
         Dir::Cache \"{root}/cache\";\n\
         Dir::Cache::archives \"{root}/cache/archives\";\n\
         // Container images turn this cache off; each query would then parse all lists again.\n\
         Dir::Cache::pkgcache \"pkgcache.bin\";\n\
         // Desktop tools run hooks after updates, which have no business here.\n\
         #clear APT::Update::Pre-Invoke;\n\
         #clear APT::Update::Post-Invoke;\n\
         #clear APT::Update::Post-Invoke-Success;\n\
         Dir::Etc::preferences \"{root}/preferences\";\n\
         Dir::Etc::preferencesparts \"/dev/null\";\n\
         Acquire::Languages \"none\";\n\
         Acquire::IndexTargets::deb::DEP-11::DefaultEnabled \"false\";\n\
         Acquire::Retries \"3\";\n\
         APT::Architecture \"{architecture}\";\n\
         #clear APT::Architectures;\n\
         APT::Architectures {{ \"{architecture}\"; }};\n\
         APT::Install-Recommends \"false\";\n\
         APT::Install-Suggests \"false\";\n\
         // The user _apt could not write here. Files are checked against signed hashes.\n\
         APT::Sandbox::User \"root\";\n"
    )
}

/// Reports whether the Release file of an archive is that of a suite of Debian.
fn is_release(text: &str, suite: &str) -> bool {
    let has =
        |field: &str, value: &str| text.lines().any(|line| line.strip_prefix(field) == Some(value));
    has("Origin: ", "Debian") && has("Codename: ", suite)
}

/// A line of `--print-uris`.
#[derive(Debug, PartialEq, Eq)]
struct Found {
    name: String,
    version: String,
    sha256: Option<String>,
}

impl Found {
    fn exact_spec(&self) -> String {
        format!("{}={}", self.name, self.version)
    }

    fn into_pin(self) -> Result<Pin> {
        let sha256 =
            self.sha256.with_context(|| format!("apt gives no SHA-256 for {}", self.name))?;
        let pin = Pin { name: self.name, version: self.version, sha256 };
        pin.check()?;
        Ok(pin)
    }
}

/// Parses lines of the form `'URI' NAME_VERSION_ARCH.deb SIZE [ALGORITHM:HASH]`.
fn parse_uris(text: &str) -> Result<Vec<Found>> {
    let line = |line: &str| -> Option<Found> {
        let mut words = line.split_ascii_whitespace();
        let (file, hash) = (words.nth(1)?, words.nth(1));
        let (name, rest) = file.strip_suffix(".deb")?.split_once('_')?;
        let (version, _architecture) = rest.rsplit_once('_')?;
        Some(Found {
            name: name.into(),
            version: version.replace("%3a", ":"),
            sha256: hash.and_then(|hash| hash.strip_prefix("SHA256:")).map(Into::into),
        })
    };
    text.lines()
        .filter(|text| !text.trim().is_empty())
        .map(|text| line(text).with_context(|| format!("apt printed an unknown line: {text:?}")))
        .collect()
}

/// Returns the file of a package in a directory of `apt-get download`.
pub fn find_package_file(directory: &Path, pin: &Pin) -> Result<PathBuf> {
    let prefix = format!("{}_{}_", pin.name, pin.version.replace(':', "%3a"));
    for entry in fs::read_dir(directory).with_context(|| format!("list {}", directory.display()))? {
        let path = entry?.path();
        if path.file_name().and_then(OsStr::to_str).is_some_and(|name| name.starts_with(&prefix)) {
            return Ok(path);
        }
    }
    anyhow::bail!(
        "apt downloaded {} {}, but the file {prefix}*.deb is missing",
        pin.name,
        pin.version
    )
}

#[cfg(test)]
#[path = "apt_test.rs"]
mod tests;
