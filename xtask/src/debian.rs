//! Debian packages as build inputs: downloaded and unpacked, never installed.
//!
//! Versions are pinned, because a different kernel gives different figures. Mirrors keep only the last few versions, so
//! a pinned one can vanish; then the newest is taken instead, which is said, and remembered in the cache so that the
//! next run agrees with this one without asking the mirror.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::process::{command, output};
use crate::{cache, workspace};

/// A package of a known version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Package {
    /// Its name in the archive.
    pub name: String,
    /// Its full Debian version.
    pub version: String,
}

impl Package {
    /// The package to use for a pinned one: itself, or the substitute that an earlier run had to take.
    pub fn resolve(name: &str, version: &str) -> Result<Self> {
        let pinned = Self { name: name.to_owned(), version: version.to_owned() };
        let remembered = fs::read_to_string(pinned.substitute_file()?).ok();
        Ok(remembered.as_deref().and_then(parse_substitute).unwrap_or(pinned))
    }

    fn substitute_file(&self) -> Result<PathBuf> {
        Ok(workspace::cache()?.join(format!("{}_{}.substitute", self.name, self.version)))
    }

    /// Downloads the package into `dir`. When the archive no longer has it, `newest` names what to take instead.
    ///
    /// Returns what was downloaded and the file.
    pub fn download(&self, dir: &Path, newest: impl FnOnce() -> Result<Self>) -> Result<(Self, PathBuf)> {
        let first = match self.download_exactly(dir) {
            Ok(file) => return Ok((self.clone(), file)),
            Err(error) => error,
        };
        let substitute = newest()?;
        if substitute == *self {
            return Err(first);
        }
        eprintln!("{self} is not in the archive any more; taking {substitute}");
        let file = substitute.download_exactly(dir)?;
        fs::write(self.substitute_file()?, format!("{} {}\n", substitute.name, substitute.version))?;
        Ok((substitute, file))
    }

    fn download_exactly(&self, dir: &Path) -> Result<PathBuf> {
        let spec = format!("{}={}", self.name, self.version);
        // As root, apt would drop to the user _apt, who cannot write here, and say so each time.
        let apt = ["-q", "-o", "APT::Sandbox::User=root", "download"];
        output(command("apt-get", apt).arg(spec).current_dir(dir))
            .with_context(|| format!("download {self} (if the package lists are empty: apt-get update)"))?;
        let debs = fs::read_dir(dir)?.filter_map(|item| Some(item.ok()?.path()));
        let mut debs = debs.filter(|path| path.extension().is_some_and(|extension| extension == "deb"));
        debs.next().with_context(|| format!("apt-get download of {self} left no file"))
    }
}

impl std::fmt::Display for Package {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.name, self.version)
    }
}

fn parse_substitute(text: &str) -> Option<Package> {
    let (name, version) = text.trim().split_once(' ')?;
    Some(Package { name: name.to_owned(), version: version.to_owned() })
}

/// The version of a package that apt would install.
pub fn candidate(name: &str) -> Result<Package> {
    let policy = output(&mut command("apt-cache", ["policy", name]))?;
    match parse_candidate(&policy) {
        Some(version) => Ok(Package { name: name.to_owned(), version }),
        None => bail!(
            "apt knows no package {name}: is bookworm-security in its sources, and was apt-get update run?"
        ),
    }
}

fn parse_candidate(policy: &str) -> Option<String> {
    let version = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate: "))?;
    (version != "(none)").then(|| version.to_owned())
}

/// The commands, for root, that install packages. A fresh container has no package lists, and stale ones name versions that
/// are gone.
pub fn install(names: &[&str]) -> Vec<Vec<String>> {
    install_with(&[], names)
}

/// The same, with options of apt.
fn install_with(options: &[&str], names: &[&str]) -> Vec<Vec<String>> {
    let apt =
        |words: &[&str]| [&["apt-get"], options, words].concat().into_iter().map(str::to_owned).collect();
    let install = [&["install", "--yes", "--no-install-recommends"], names].concat();
    vec![apt(&["update"]), apt(&install)]
}

/// The commands, for root, that install a package whose major version is at least `major`: from this Debian, or from its
/// backports. Those are asked for this one time, with lists of their own below target/; the machine's sources stay as
/// they are.
pub fn newer(name: &str, major: u32) -> Result<Vec<Vec<String>>> {
    let at_hand = candidate(name).ok().and_then(|package| major_version(&package.version));
    if at_hand.is_some_and(|at_hand| at_hand >= major) {
        return Ok(install(&[name]));
    }
    let (archive, codename) = archive()?;
    let dir = workspace::target().join("apt");
    let sources = dir.join("sources");
    cache::remove_tree(&sources)?;
    fs::create_dir_all(&sources).with_context(|| format!("create {}", sources.display()))?;
    fs::create_dir_all(dir.join("lists/partial")).with_context(|| format!("create {}", dir.display()))?;
    let configured = fs::read_dir("/etc/apt/sources.list.d")
        .into_iter()
        .flatten()
        .filter_map(|item| Some(item.ok()?.path()));
    for path in configured {
        if let Some(name) = path.file_name() {
            std::os::unix::fs::symlink(&path, sources.join(name))?;
        }
    }
    let suite = format!("{codename}-backports");
    let line = format!("deb [signed-by={KEYRING}] {archive} {suite} main\n");
    fs::write(sources.join("chitin-backports.list"), line)?;
    let option = |key: &str, path: &Path| format!("--option={key}={}", path.display());
    let (parts, lists) =
        (option("Dir::Etc::SourceParts", &sources), option("Dir::State::Lists", &dir.join("lists")));
    Ok(install_with(&[&parts, &lists], &["--target-release", &suite, name]))
}

/// Debian's own keys, which its base system brings.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Where the machine's Debian comes from, and its codename.
fn archive() -> Result<(String, String)> {
    let release = fs::read_to_string("/etc/os-release").context("read /etc/os-release")?;
    let codename = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    let codename =
        codename.context("/etc/os-release names no VERSION_CODENAME: this is no Debian release")?;
    let targets = output(&mut command(
        "apt-get",
        ["indextargets", "--format", "$(REPO_URI) $(CODENAME)", "Created-By: Packages", "Component: main"],
    ))?;
    match parse_archive(&targets, codename) {
        Some(archive) => Ok((archive, codename.to_owned())),
        None => bail!("apt has no source for {codename} main: run apt-get update, or add one"),
    }
}

fn parse_archive(targets: &str, codename: &str) -> Option<String> {
    targets
        .lines()
        .filter_map(|line| line.split_once(' '))
        .find_map(|(uri, name)| (name == codename).then(|| uri.to_owned()))
}

/// `10` of `1:10.0.2+ds-2`.
fn major_version(version: &str) -> Option<u32> {
    let upstream = version.split_once(':').map_or(version, |(_, upstream)| upstream);
    upstream.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// Unpacks a package into a directory and removes the package file.
pub fn unpack(deb: &Path, into: &Path) -> Result<()> {
    output(command("dpkg-deb", ["--extract"]).args([deb, into]))?;
    fs::remove_file(deb).with_context(|| format!("remove {}", deb.display()))
}

/// Renames a cache entry that was made of a substitute, so that the next run finds it under the substitute's key.
pub fn file_under_substitute(
    entry: PathBuf,
    as_pinned: bool,
    name: impl FnOnce() -> String,
) -> Result<PathBuf> {
    if as_pinned {
        return Ok(entry);
    }
    let renamed = entry.with_file_name(name());
    if !renamed.exists() {
        fs::rename(&entry, &renamed).with_context(|| format!("rename {}", entry.display()))?;
    }
    Ok(renamed)
}

/// A scratch directory inside a cache entry under construction, removed by the caller's `finish`.
pub fn scratch(dir: &Path, name: &str) -> Result<PathBuf> {
    let path = dir.join(name);
    cache::remove_tree(&path)?;
    fs::create_dir(&path).with_context(|| format!("create {}", path.display()))?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidate_is_read_from_policy() {
        let policy =
            "linux-source-6.12:\n  Installed: (none)\n  Candidate: 6.12.117-1~deb12u1\n  Version table:\n";
        assert_eq!(parse_candidate(policy).as_deref(), Some("6.12.117-1~deb12u1"));
        assert_eq!(parse_candidate("x:\n  Installed: (none)\n  Candidate: (none)\n"), None);
        assert_eq!(parse_candidate(""), None);
    }

    #[test]
    fn versions_and_archives_are_read() {
        assert_eq!(major_version("1:10.0.2+ds-2+deb13u1~bpo12+1"), Some(10));
        assert_eq!(major_version("7.2"), Some(7));
        assert_eq!(major_version("~"), None);
        let targets = "http://a/debian-security/ bookworm-security\nhttp://a/debian/ bookworm\n";
        assert_eq!(parse_archive(targets, "bookworm").as_deref(), Some("http://a/debian/"));
        assert_eq!(parse_archive(targets, "trixie"), None);
    }

    #[test]
    fn lists_are_fetched_before_packages_are() {
        let lines = install_with(&["--option=a=b"], &["x"]).into_iter().map(|words| words.join(" "));
        let expected =
            ["apt-get --option=a=b update", "apt-get --option=a=b install --yes --no-install-recommends x"];
        assert_eq!(lines.collect::<Vec<_>>(), expected);
    }

    #[test]
    fn substitute_survives_the_file() {
        let package = Package { name: "linux-source-6.12".into(), version: "6.12.200-1".into() };
        assert_eq!(parse_substitute("linux-source-6.12 6.12.200-1\n"), Some(package));
        assert_eq!(parse_substitute(""), None);
    }
}
