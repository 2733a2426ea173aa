//! `rootfs/recipe.toml`: the contents of the root image.

use std::path::{Component, Path};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

/// The recipe as written; the comments in the file explain the fields.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The code name of the Debian release, as in the `Codename` of its archives.
    pub suite: String,
    /// The architecture, as Debian calls it.
    pub architecture: String,
    /// The UUID of the file system.
    pub uuid: String,
    /// The time stamp of every file, in seconds since 1970.
    pub timestamp: u64,
    /// The largest allowed size of the image.
    pub max_mib: u64,
    /// The requested packages; their dependencies are added.
    pub package: Vec<Reasoned>,
    /// Dependencies to leave out.
    #[serde(default)]
    pub skip: Vec<Reasoned>,
    /// Paths to remove from the unpacked tree.
    #[serde(default)]
    pub prune: Vec<Prune>,
    /// Symbolic links to create.
    #[serde(default)]
    pub link: Vec<Link>,
    /// Directories to create.
    #[serde(default)]
    pub directory: Vec<Directory>,
}

/// A package, and the reason to request or skip it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reasoned {
    /// The name of the package.
    pub name: String,
    /// The reason; never empty.
    pub why: String,
}

/// Paths to remove, and the reason.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prune {
    /// Patterns, see [`matches_path`].
    pub paths: Vec<String>,
    /// Patterns of paths to keep although `paths` match.
    #[serde(default)]
    pub keep: Vec<String>,
    /// The reason; never empty.
    pub why: String,
}

/// A symbolic link; it replaces a file or link of its name.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Link {
    /// The path of the link.
    pub path: String,
    /// The target of the link.
    pub target: String,
}

/// A directory that must exist.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Directory {
    /// The path of the directory.
    pub path: String,
    /// The mode in octal, as for chmod.
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
            "mode {} of directory {}: set-id bits are not allowed",
            self.mode,
            self.path
        );
        Ok(bits)
    }
}

impl Recipe {
    /// Parses and checks a recipe.
    pub fn parse(text: &str) -> Result<Self> {
        let recipe: Self = toml::from_str(text)?;
        ensure!(!recipe.package.is_empty(), "the recipe requests no package");
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

    /// Returns the names of the requested packages, sorted.
    pub fn requested(&self) -> Vec<&str> {
        let mut names: Vec<_> = self.package.iter().map(|package| package.name.as_str()).collect();
        names.sort_unstable();
        names
    }

    /// Reports whether a package of the closure is left out.
    pub fn skips(&self, name: &str) -> bool {
        self.skip.iter().any(|package| package.name == name)
    }
}

/// Reports whether a name follows Debian policy 5.6.1. Such a name cannot be mistaken for an option
/// or a path by the tools that receive it.
pub fn is_package_name(name: &str) -> bool {
    name.len() >= 2
        && name.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "+-.".contains(c))
}

/// Fails if a path is absolute, empty, or not in its simplest form.
pub fn check_path(path: &str) -> Result<()> {
    let plain = Path::new(path).components().all(|part| matches!(part, Component::Normal(_)));
    // `components` drops doubled and trailing slashes; the rest of the code compares strings and
    // would miss such a path.
    let simplest = path.split('/').all(|part| !part.is_empty() && part != ".");
    ensure!(plain && simplest, "{path:?} must be a path below the image's root, without . and ..");
    Ok(())
}

/// Reports whether `path` matches `pattern`, in which `*` matches any characters within one name
/// and `**` any number of directories, including none.
pub fn matches_path(pattern: &str, path: &str) -> bool {
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
