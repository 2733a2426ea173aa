//! `rootfs/packages.lock`: the exact packages of an image.

use std::fmt;

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;

use super::recipe::{Recipe, is_package_name};

/// The first line of the file: a file of another kind or version is refused.
const HEADER: &str = "# Chitin root image packages, version 1";
const REQUESTED: &str = "requested";

/// A package file, identified by its content.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Pin {
    /// The name of the package.
    pub name: String,
    /// Its full version, epoch included.
    pub version: String,
    /// The digest of the package file, in hexadecimal.
    pub sha256: String,
}

/// The pinned packages, sorted by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lock {
    /// The packages of the recipe when the lock was written: if they differ, so does the closure.
    pub requested: Vec<String>,
    /// The packages to download and unpack.
    pub pins: Vec<Pin>,
}

impl Lock {
    /// Returns a lock for a recipe, without the packages that it skips.
    pub fn new(recipe: &Recipe, mut pins: Vec<Pin>) -> Self {
        pins.retain(|pin| !recipe.skips(&pin.name));
        pins.sort();
        Self { requested: recipe.requested().into_iter().map(Into::into).collect(), pins }
    }

    /// Parses a lock file.
    pub fn parse(text: &str) -> Result<Self> {
        let mut lines = text.lines();
        ensure!(lines.next() == Some(HEADER), "the first line is not {HEADER:?}");
        let mut lock = Self { requested: Vec::new(), pins: Vec::new() };
        for line in lines.filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let mut words = line.split_ascii_whitespace();
            let pin = match (words.next(), words.next(), words.next(), words.next()) {
                (Some(REQUESTED), Some(name), None, None) => {
                    lock.requested.push(name.into());
                    continue;
                }
                (Some(name), Some(version), Some(sha256), None) => {
                    Pin { name: name.into(), version: version.into(), sha256: sha256.into() }
                }
                _ => bail!("line {line:?} is not `name version sha256`"),
            };
            pin.check().with_context(|| format!("line {line:?}"))?;
            lock.pins.push(pin);
        }
        ensure!(
            lock.pins.is_sorted_by(|a, b| a.name < b.name),
            "the packages are not sorted, or one is listed twice"
        );
        Ok(lock)
    }

    /// Fails if the recipe requests or skips other packages than when the lock was written.
    pub fn check_against(&self, recipe: &Recipe) -> Result<()> {
        let stale = self.requested != recipe.requested()
            || self.pins.iter().any(|pin| recipe.skips(&pin.name));
        ensure!(
            !stale,
            "the packages of the recipe have changed: run `cargo xtask rootfs --update`"
        );
        Ok(())
    }

    /// Returns a line for each package that differs in `other`.
    pub fn list_changes(&self, other: &Self) -> Vec<String> {
        let find = |lock: &Self, name: &str| lock.pins.iter().find(|pin| pin.name == name).cloned();
        let mut lines = Vec::new();
        for pin in &self.pins {
            match find(other, &pin.name) {
                None => lines.push(format!("{} {} is gone", pin.name, pin.version)),
                Some(new) if new != *pin => {
                    lines.push(format!("{} {} → {}", pin.name, pin.version, new.version))
                }
                Some(_) => {}
            }
        }
        let added = other.pins.iter().filter(|pin| find(self, &pin.name).is_none());
        lines.extend(added.map(|pin| format!("{} {} is new", pin.name, pin.version)));
        lines
    }
}

impl Pin {
    /// Fails unless name, version and digest can be used as arguments and file names.
    pub fn check(&self) -> Result<()> {
        ensure!(is_package_name(&self.name), "{:?} is not the name of a Debian package", self.name);
        let version =
            self.version.chars().all(|c| c.is_ascii_alphanumeric() || "+-.:~".contains(c));
        ensure!(
            version && self.version.starts_with(|c: char| c.is_ascii_digit()),
            "{:?} is not a version",
            self.version
        );
        let sha256 = self.sha256.len() == 64
            && self.sha256.chars().all(|c| matches!(c, '0'..='9' | 'a'..='f'));
        ensure!(sha256, "{:?} is not a SHA-256 in lower case", self.sha256);
        Ok(())
    }
}

impl fmt::Display for Lock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{HEADER}")?;
        writeln!(
            f,
            "# Written by `cargo xtask rootfs --update`. \
             Each line is name, version and SHA-256 of a package."
        )?;
        self.requested.iter().try_for_each(|name| writeln!(f, "{REQUESTED} {name}"))?;
        self.pins
            .iter()
            .try_for_each(|pin| writeln!(f, "{} {} {}", pin.name, pin.version, pin.sha256))
    }
}

#[cfg(test)]
#[path = "lock_test.rs"]
mod tests;
