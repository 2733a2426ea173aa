//! Debian packages as build inputs: downloaded and unpacked, never installed.
//!
//! Versions are pinned, because a different kernel gives different figures. Mirrors keep only the
//! last few versions. If a pinned one is gone, the newest is used instead. That is printed, and
//! remembered in the cache, so that the next run agrees with this one without asking the mirror.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::process::{capture_output, new_command};
use crate::progress::print_note;
use crate::{cache, workspace};

/// A package of a known version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Package {
    /// The name in the archive.
    pub name: String,
    /// The full Debian version.
    pub version: String,
}

impl Package {
    /// Returns the pinned package, or the substitute that an earlier run had to use.
    pub fn resolve_pinned(name: &str, version: &str) -> Result<Self> {
        let pinned = Self { name: name.to_owned(), version: version.to_owned() };
        let remembered = fs::read_to_string(pinned.substitute_file()?).ok();
        Ok(remembered.as_deref().and_then(parse_substitute).unwrap_or(pinned))
    }

    fn substitute_file(&self) -> Result<PathBuf> {
        Ok(workspace::cache_dir()?.join(format!("{}_{}.substitute", self.name, self.version)))
    }

    /// Downloads the package into `dir`. If the archive has dropped it, `newest` returns the
    /// package to use instead.
    ///
    /// Returns the package that was downloaded, and its file.
    pub fn download_binary(
        &self,
        dir: &Path,
        newest: impl FnOnce() -> Result<Self>,
    ) -> Result<(Self, PathBuf)> {
        self.download_or_substitute(|package| package.download_exactly(dir), newest)
    }

    /// Downloads the upstream archive of a source package into `dir`, from the release `suite`.
    /// That can be another release than the machine's: its package lists are separate, and need no
    /// root.
    ///
    /// Returns the package that was downloaded, and its file.
    pub fn download_source(&self, suite: &str, dir: &Path) -> Result<(Self, PathBuf)> {
        let apt = SourceApt::update(suite, dir)?;
        self.download_or_substitute(
            |package| apt.download_source(package, dir),
            || apt.find_newest(&self.name),
        )
    }

    fn download_or_substitute(
        &self,
        download: impl Fn(&Self) -> Result<PathBuf>,
        newest: impl FnOnce() -> Result<Self>,
    ) -> Result<(Self, PathBuf)> {
        let first = match download(self) {
            Ok(file) => return Ok((self.clone(), file)),
            Err(error) => error,
        };
        let substitute = newest()?;
        if substitute == *self {
            return Err(first);
        }
        print_note(&format!("{self} is no longer in the archive; using {substitute}"));
        let file = download(&substitute)?;
        fs::write(
            self.substitute_file()?,
            format!("{} {}\n", substitute.name, substitute.version),
        )?;
        Ok((substitute, file))
    }

    fn download_exactly(&self, dir: &Path) -> Result<PathBuf> {
        let spec = format!("{}={}", self.name, self.version);
        // As root, apt would switch to the user _apt, who cannot write here.
        let apt = ["-q", "-o", "APT::Sandbox::User=root", "download"];
        capture_output(new_command("apt-get", apt).arg(spec).current_dir(dir)).with_context(
            || format!("download {self} (if the package lists are empty, run apt-get update)"),
        )?;
        file_with_extension(dir, "deb")
            .with_context(|| format!("apt-get download of {self} left no file"))
    }
}

fn file_with_extension(dir: &Path, extension: &str) -> Option<PathBuf> {
    let paths = fs::read_dir(dir).ok()?.filter_map(|item| Some(item.ok()?.path()));
    paths.into_iter().find(|path| path.extension().is_some_and(|found| found == extension))
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

/// Returns a package in the version that apt would install.
pub fn find_candidate(name: &str) -> Result<Package> {
    let policy = capture_output(&mut new_command("apt-cache", ["policy", name]))?;
    match parse_candidate(&policy) {
        Some(version) => Ok(Package { name: name.to_owned(), version }),
        None => bail!(
            "apt does not know the package {name}: check that its sources have bookworm-security, \
             and run apt-get update"
        ),
    }
}

fn parse_candidate(policy: &str) -> Option<String> {
    let version = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate: "))?;
    (version != "(none)").then(|| version.to_owned())
}

/// Returns the commands, for root, that install packages. They update the package lists first: a
/// fresh container has none, and old ones name versions that are gone.
pub fn install_commands(names: &[&str]) -> Vec<Vec<String>> {
    let apt = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
    let install = [&["apt-get", "install", "--yes", "--no-install-recommends"], names].concat();
    vec![apt(&["apt-get", "update"]), apt(&install)]
}

/// An apt for the source packages of one release. The sources of the machine stay unchanged.
struct SourceApt {
    options: Vec<String>,
}

impl SourceApt {
    /// Downloads the lists into `dir` (about 10 MiB).
    fn update(suite: &str, dir: &Path) -> Result<Self> {
        let (sources, state, cache) =
            (dir.join("sources.list"), dir.join("lists"), dir.join("apt-cache"));
        for below in [&state, &cache] {
            fs::create_dir_all(below.join("partial"))
                .with_context(|| format!("create {}", below.display()))?;
        }
        let line = format!("deb-src [signed-by={KEYRING}] {} {suite} main\n", find_archive()?);
        fs::write(&sources, line).with_context(|| format!("write {}", sources.display()))?;
        let option = |key: &str, path: &Path| format!("--option={key}={}", path.display());
        let apt = Self {
            options: vec![
                option("Dir::Etc::SourceList", &sources),
                option("Dir::Etc::SourceParts", Path::new("/dev/null")),
                option("Dir::State::Lists", &state),
                option("Dir::Cache", &cache),
                // As root, apt would switch to the user _apt, who cannot write here.
                "--option=APT::Sandbox::User=root".into(),
            ],
        };
        capture_output(new_command("apt-get", &apt.options).args(["-q", "update"]))
            .with_context(|| format!("fetch the list of source packages of {suite}"))?;
        Ok(apt)
    }

    fn find_newest(&self, name: &str) -> Result<Package> {
        let shown =
            capture_output(new_command("apt-cache", &self.options).args(["showsrc", name]))?;
        let version = shown.lines().find_map(|line| line.strip_prefix("Version: "));
        let version = version
            .with_context(|| format!("apt does not know the source package {name}"))?
            .to_owned();
        Ok(Package { name: name.to_owned(), version })
    }

    fn download_source(&self, package: &Package, dir: &Path) -> Result<PathBuf> {
        let mut source = new_command("apt-get", &self.options);
        source.args(["-q", "source", "--download-only", "--tar-only"]).current_dir(dir);
        capture_output(source.arg(format!("{}={}", package.name, package.version)))
            .with_context(|| format!("download the source of {package}"))?;
        file_with_extension(dir, "xz")
            .with_context(|| format!("the source of {package} left no file"))
    }
}

/// The keys of Debian, a part of its base system.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Returns the archive of the machine's Debian, which has the other releases as well.
fn find_archive() -> Result<String> {
    let release = fs::read_to_string("/etc/os-release").context("read /etc/os-release")?;
    let codename = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    let codename = codename
        .context("/etc/os-release has no VERSION_CODENAME: this is not a Debian release")?;
    let targets = capture_output(&mut new_command(
        "apt-get",
        [
            "indextargets",
            "--format",
            "$(REPO_URI) $(CODENAME)",
            "Created-By: Packages",
            "Component: main",
        ],
    ))?;
    parse_archive(&targets, codename).with_context(|| {
        format!("apt has no source for {codename} main: run apt-get update, or add it")
    })
}

fn parse_archive(targets: &str, codename: &str) -> Option<String> {
    targets
        .lines()
        .filter_map(|line| line.split_once(' '))
        .find_map(|(uri, name)| (name == codename).then(|| uri.to_owned()))
}

/// Unpacks a package into a directory and removes the package file.
pub fn unpack_package(deb: &Path, into: &Path) -> Result<()> {
    capture_output(new_command("dpkg-deb", ["--extract"]).args([deb, into]))?;
    fs::remove_file(deb).with_context(|| format!("remove {}", deb.display()))
}

/// Unpacks the upstream archive of a source package, whose files are in one directory, and removes
/// it.
pub fn unpack_source(archive: &Path, into: &Path) -> Result<()> {
    capture_output(
        new_command("tar", ["--extract", "--strip-components=1", "--file"])
            .arg(archive)
            .arg("--directory")
            .arg(into),
    )?;
    fs::remove_file(archive).with_context(|| format!("remove {}", archive.display()))
}

/// Applies patches to a source, without fuzz: a patch that does not fit exactly was written for
/// another version.
pub fn apply_patches(source: &Path, patches: &[PathBuf]) -> Result<()> {
    for patch in patches {
        let mut apply = new_command("patch", ["--strip=1", "--fuzz=0", "--silent", "--input"]);
        capture_output(apply.arg(patch).current_dir(source))
            .with_context(|| format!("{} does not fit the source", patch.display()))?;
    }
    Ok(())
}

/// Returns the cache entry that `build` makes of a package, or of the substitute that it had to use
/// and returns. The entry of a substitute has its own key, so that the next run finds it.
pub fn find_or_build(
    kind: &str,
    package: &Package,
    key: impl Fn(&Package) -> cache::Key,
    build: impl FnOnce(&Path) -> Result<Package>,
) -> Result<PathBuf> {
    let mut used = package.clone();
    let entry = cache::find_or_build(kind, key(package), |dir| {
        used = build(dir)?;
        Ok(())
    })?;
    if used == *package {
        return Ok(entry);
    }
    let renamed = entry.with_file_name(format!("{kind}-{}", key(&used).into_hex()));
    if !renamed.exists() {
        fs::rename(&entry, &renamed).with_context(|| format!("rename {}", entry.display()))?;
    }
    Ok(renamed)
}

/// Creates a directory in a cache entry under construction; the caller removes it.
pub fn create_scratch_dir(dir: &Path, name: &str) -> Result<PathBuf> {
    let path = dir.join(name);
    cache::remove_tree(&path)?;
    fs::create_dir(&path).with_context(|| format!("create {}", path.display()))?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidate_is_parsed_from_policy() {
        let policy = "linux-source-6.12:\n  Installed: (none)\n  \
                      Candidate: 6.12.117-1~deb12u1\n  Version table:\n";
        assert_eq!(parse_candidate(policy).as_deref(), Some("6.12.117-1~deb12u1"));
        assert_eq!(parse_candidate("x:\n  Installed: (none)\n  Candidate: (none)\n"), None);
        assert_eq!(parse_candidate(""), None);
    }

    #[test]
    fn archive_of_the_release_is_found() {
        let targets = "http://a/debian-security/ bookworm-security\nhttp://a/debian/ bookworm\n";
        assert_eq!(parse_archive(targets, "bookworm").as_deref(), Some("http://a/debian/"));
        assert_eq!(parse_archive(targets, "trixie"), None);
    }

    #[test]
    fn package_lists_are_updated_before_install() {
        let lines = install_commands(&["x"]).into_iter().map(|words| words.join(" "));
        let expected = ["apt-get update", "apt-get install --yes --no-install-recommends x"];
        assert_eq!(lines.collect::<Vec<_>>(), expected);
    }

    #[test]
    fn substitute_is_parsed_from_its_file() {
        let package = Package { name: "linux-source-6.12".into(), version: "6.12.200-1".into() };
        assert_eq!(parse_substitute("linux-source-6.12 6.12.200-1\n"), Some(package));
        assert_eq!(parse_substitute(""), None);
    }
}
