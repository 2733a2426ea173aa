//! `rootfs/recipe.toml`: what is in the root image.

use std::path::{Component, Path};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

/// The recipe as written; see the comments in the file for what the fields mean.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Debian's code name, as in the `Codename` of its archives.
    pub suite: String,
    /// Debian's name of the architecture.
    pub architecture: String,
    /// UUID of the file system.
    pub uuid: String,
    /// Time stamp of every file, in seconds since 1970.
    pub timestamp: u64,
    /// Size the image must not exceed.
    pub max_mib: u64,
    /// What is asked for; dependencies come along.
    pub package: Vec<Reasoned>,
    /// Dependencies that are left out.
    #[serde(default)]
    pub skip: Vec<Reasoned>,
    /// What is removed from the unpacked tree.
    #[serde(default)]
    pub prune: Vec<Prune>,
    /// Symbolic links to make.
    #[serde(default)]
    pub link: Vec<Link>,
    /// Directories to make.
    #[serde(default)]
    pub directory: Vec<Directory>,
}

/// A package and the reason for the recipe's saying so.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reasoned {
    /// The package's name.
    pub name: String,
    /// Never empty.
    pub why: String,
}

/// Paths to remove, and the reason.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prune {
    /// Patterns, see [`matches`].
    pub paths: Vec<String>,
    /// Patterns of what stays although `paths` match.
    #[serde(default)]
    pub keep: Vec<String>,
    /// Never empty.
    pub why: String,
}

/// A symbolic link; it replaces a file or link of that name.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Link {
    /// Where the link is.
    pub path: String,
    /// What it says.
    pub target: String,
}

/// A directory that must be there.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Directory {
    /// Where it is.
    pub path: String,
    /// Octal, as for chmod.
    #[serde(default = "default_mode")]
    pub mode: String,
    /// User and group id.
    #[serde(default)]
    pub owner: u32,
}

fn default_mode() -> String {
    "0755".into()
}

impl Directory {
    /// The mode as a number.
    pub fn mode_bits(&self) -> Result<u32> {
        let bits = u32::from_str_radix(&self.mode, 8).with_context(|| {
            format!("mode {:?} of directory {} is not octal", self.mode, self.path)
        })?;
        ensure!(
            bits <= 0o1777,
            "mode {} of directory {}: set-id bits are not for this image",
            self.mode,
            self.path
        );
        Ok(bits)
    }
}

impl Recipe {
    /// Reads and checks a recipe.
    pub fn parse(text: &str) -> Result<Self> {
        let recipe: Self = toml::from_str(text)?;
        ensure!(!recipe.package.is_empty(), "no package is asked for");
        for Reasoned { name, why } in recipe.package.iter().chain(&recipe.skip) {
            ensure!(is_package_name(name), "{name:?} is not the name of a Debian package");
            ensure!(!why.trim().is_empty(), "package {name} has no reason");
        }
        for rule in &recipe.prune {
            ensure!(!rule.why.trim().is_empty(), "pruning {:?} has no reason", rule.paths);
            rule.paths.iter().chain(&rule.keep).try_for_each(|path| check_path(path))?;
        }
        for link in &recipe.link {
            check_path(&link.path)?;
            ensure!(!link.target.is_empty(), "link {} has no target", link.path);
        }
        for directory in &recipe.directory {
            check_path(&directory.path)?;
            directory.mode_bits()?;
        }
        Ok(recipe)
    }

    /// Names of the packages asked for, sorted.
    pub fn requested(&self) -> Vec<&str> {
        let mut names: Vec<_> = self.package.iter().map(|package| package.name.as_str()).collect();
        names.sort_unstable();
        names
    }

    /// Whether a package of the closure is left out.
    pub fn skips(&self, name: &str) -> bool {
        self.skip.iter().any(|package| package.name == name)
    }
}

/// Debian policy 5.6.1. Also keeps names from being read as options or paths by the tools they are given to.
pub fn is_package_name(name: &str) -> bool {
    name.len() >= 2
        && name.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "+-.".contains(c))
}

/// Fails for a path that is absolute, empty, or not in its simplest form.
pub fn check_path(path: &str) -> Result<()> {
    let plain = Path::new(path).components().all(|part| matches!(part, Component::Normal(_)));
    // `components` drops doubled and trailing slashes; the rest of the code compares strings and would miss such a path.
    let simplest = path.split('/').all(|part| !part.is_empty() && part != ".");
    ensure!(plain && simplest, "{path:?} must be a path below the image's root, without . and ..");
    Ok(())
}

/// Whether `path` fits `pattern`, in which `*` stands for any characters within one name and `**` for any number of
/// directories, also none.
pub fn matches(pattern: &str, path: &str) -> bool {
    fn parts(pattern: &[&str], path: &[&str]) -> bool {
        match (pattern.split_first(), path.split_first()) {
            (None, None) => true,
            (Some((&"**", rest)), _) => {
                (0..=path.len()).any(|skipped| parts(rest, &path[skipped..]))
            }
            (Some((first, rest)), Some((name, below))) => {
                name_matches(first, name) && parts(rest, below)
            }
            _ => false,
        }
    }
    parts(&pattern.split('/').collect::<Vec<_>>(), &path.split('/').collect::<Vec<_>>())
}

fn name_matches(pattern: &str, name: &str) -> bool {
    let Some((head, tail)) = pattern.split_once('*') else {
        return pattern == name;
    };
    let Some(rest) = name.strip_prefix(head) else {
        return false;
    };
    rest.char_indices()
        .map(|(at, _)| at)
        .chain([rest.len()])
        .any(|at| name_matches(tail, &rest[at..]))
}

#[cfg(test)]
#[path = "recipe_test.rs"]
mod tests;
