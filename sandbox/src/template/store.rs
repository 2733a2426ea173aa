//! The directory of a user's templates.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use chitin_tiers::GuestFiles;

use super::draft::remove_abandoned_drafts;
use super::key::{locate_key_dir, open_key, read_key};
use super::manifest::{FileIdentity, SealedManifest};
use super::seal::{SealCheck, check_seal, read_bounded, read_state_mac};
use super::trusted_dir::{TrustedDir, file_error};
use super::{Manifest, TemplateError};

/// The largest length of a template's name.
const MAX_NAME: usize = 64;

/// The largest `template.json` that is read.
const MAX_MANIFEST: u64 = 64 * 1024;

/// The largest `seal` that is read.
const MAX_SEAL: u64 = 64;

/// The files of a template. A directory with all of them and no other entry is one.
pub(super) const FILES: [&str; 4] = ["template.json", "seal", "state", "memory"];

/// The directory of a user's templates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Templates {
    pub(super) dir: PathBuf,
    /// The directory of the key, unless it is the user's.
    key_dir: Option<PathBuf>,
}

/// The contents of a directory of templates.
#[derive(Debug, Default)]
pub struct TemplateList {
    /// The templates, sorted by name.
    pub templates: Vec<Manifest>,
    /// The other directories, each with the reason why it is not a template that can be used.
    pub rejected: Vec<(String, TemplateError)>,
}

/// A template whose seal was verified.
#[derive(Debug)]
pub(crate) struct OpenTemplate {
    pub manifest: Manifest,
    pub files: GuestFiles,
}

impl Templates {
    /// Finds the directory: `$CHITIN_TEMPLATES`, else `chitin/templates` in the user's data
    /// directory.
    ///
    /// # Errors
    /// [`TemplateError::NoHome`] if neither is known.
    pub fn locate() -> Result<Templates, TemplateError> {
        let home = || std::env::home_dir().map(|home| home.join(".local/share"));
        let dir = match std::env::var_os("CHITIN_TEMPLATES") {
            Some(dir) => PathBuf::from(dir),
            None => std::env::var_os("XDG_DATA_HOME")
                .map(PathBuf::from)
                .or_else(home)
                .ok_or(TemplateError::NoHome)?
                .join("chitin/templates"),
        };
        Ok(Templates::at(dir))
    }

    /// Uses this directory, which is created when the first template is built. The key is in the
    /// user's state directory: `$XDG_STATE_HOME/chitin/keys`, else `~/.local/state/chitin/keys`,
    /// and `/var/lib/chitin/keys` for root.
    pub fn at(dir: impl Into<PathBuf>) -> Templates {
        Templates { dir: dir.into(), key_dir: None }
    }

    /// Uses the key in this directory instead of the user's. A key that is missing is created.
    pub fn with_key_dir(self, dir: impl Into<PathBuf>) -> Templates {
        Templates { key_dir: Some(dir.into()), ..self }
    }

    /// Lists all templates. Directories that are none are listed apart.
    ///
    /// # Errors
    /// The directory cannot be read, or other users can change it.
    pub fn list(&self) -> Result<TemplateList, TemplateError> {
        let dir = match TrustedDir::open(&self.dir) {
            Err(error) if is_missing(&error) => return Ok(TemplateList::default()),
            other => other?,
        };
        remove_abandoned_drafts(&dir);
        let mut list = TemplateList::default();
        for name in dir.list_names()? {
            // Drafts of templates begin with a dot.
            if name.starts_with('.') || !dir.has_dir(&name) {
                continue;
            }
            match self.inspect(&name) {
                Ok(manifest) => list.templates.push(manifest),
                Err(error) => list.rejected.push((name, error)),
            }
        }
        list.templates.sort_by(|a, b| a.name.cmp(&b.name));
        list.rejected.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(list)
    }

    /// Reads the manifest of a template, after its seal has been verified.
    ///
    /// # Errors
    /// There is no template of this name, or one of its files was changed.
    pub fn inspect(&self, name: &str) -> Result<Manifest, TemplateError> {
        self.open(name).map(|template| template.manifest)
    }

    /// Removes a template. Running copies of it are not affected.
    ///
    /// # Errors
    /// There is no template of this name, or its files cannot be removed.
    /// [`TemplateError::Foreign`] if the directory is not a template: it is left as it is.
    pub fn remove(&self, name: &str) -> Result<(), TemplateError> {
        let (parent, dir) = self.find_template(name)?;
        if !is_template(&dir)? {
            return Err(TemplateError::Foreign { path: dir.path().to_owned() });
        }
        parent.remove_dir(name, &FILES)
    }

    /// Opens the directory of a template, and the one that it is in.
    pub(super) fn find_template(
        &self,
        name: &str,
    ) -> Result<(TrustedDir, TrustedDir), TemplateError> {
        check_template_name(name)?;
        let missing = || TemplateError::Missing { name: name.into(), dir: self.dir.clone() };
        let or_missing = |error| if is_missing(&error) { missing() } else { error };
        let parent = TrustedDir::open(&self.dir).map_err(or_missing)?;
        let dir = parent.open_dir(name).map_err(or_missing)?;
        Ok((parent, dir))
    }

    /// Verifies a template and opens its files. Nothing of it is parsed before its seal has been
    /// verified.
    pub(crate) fn open(&self, name: &str) -> Result<OpenTemplate, TemplateError> {
        let (_, dir) = self.find_template(name)?;
        if !FILES.iter().any(|file| dir.has_file(file)) {
            return Err(TemplateError::Foreign { path: dir.path().to_owned() });
        }
        let read = |file: &str, limit| {
            let open = dir.open_file(file)?;
            read_bounded(&open, limit).map_err(file_error("read", &dir.join(file)))
        };
        let (json, seal) = (read("template.json", MAX_MANIFEST)?, read("seal", MAX_SEAL)?);
        let mut key = self.open_key()?;
        let secret = read_key(&mut key).map_err(file_error("read the key of", dir.path()))?;
        let check = check_seal(&*secret, &json, &seal);
        match check.map_err(file_error("verify", dir.path()))? {
            SealCheck::Valid => {}
            SealCheck::Invalid => return Err(TemplateError::Seal(name.into())),
            SealCheck::OtherVersion => return Err(TemplateError::Outdated(name.into())),
        }
        let sealed: SealedManifest = serde_json::from_slice(&json).map_err(|source| {
            TemplateError::Manifest { path: dir.join("template.json"), source }
        })?;
        let (memory, state) = (dir.open_file("memory")?, dir.open_file("state")?);
        let found = identify_files(&memory, &state).map_err(file_error("inspect", dir.path()))?;
        if sealed.manifest.name != name || (sealed.memory, sealed.state_mac) != found {
            return Err(TemplateError::Seal(name.into()));
        }
        let files = GuestFiles { memory, state, key };
        Ok(OpenTemplate { manifest: sealed.manifest, files })
    }

    /// Opens the key, which is created when it is first needed.
    pub(super) fn open_key(&self) -> Result<std::fs::File, TemplateError> {
        let key_dir = self.key_dir.clone().map_or_else(locate_key_dir, Ok)?;
        let (templates, key) = (resolve(&self.dir), resolve(&key_dir));
        if templates.starts_with(&key) || key.starts_with(&templates) {
            return Err(TemplateError::KeyAmongTemplates { templates, key });
        }
        open_key(&key_dir)
    }
}

/// Returns the identity of the files of a template.
pub(super) fn identify_files(
    memory: &std::fs::File,
    state: &std::fs::File,
) -> io::Result<(FileIdentity, String)> {
    Ok((FileIdentity::from(&memory.metadata()?), read_state_mac(state)?))
}

/// Returns whether a directory has the files of a template and nothing else.
pub(super) fn is_template(dir: &TrustedDir) -> Result<bool, TemplateError> {
    let names = dir.list_names()?;
    Ok(names.len() == FILES.len() && FILES.iter().all(|file| dir.has_file(file)))
}

/// Resolves the links of a path as far as it exists.
fn resolve(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut existing = absolute.as_path();
    loop {
        if let Ok(found) = existing.canonicalize() {
            let rest = absolute.strip_prefix(existing).unwrap_or(Path::new(""));
            return found.join(rest);
        }
        match existing.parent() {
            Some(parent) => existing = parent,
            None => return absolute,
        }
    }
}

pub(super) fn is_missing(error: &TemplateError) -> bool {
    matches!(error, TemplateError::File { source, .. }
        if source.kind() == io::ErrorKind::NotFound)
}

/// Returns the seconds since 1970.
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

pub(super) fn check_template_name(name: &str) -> Result<(), TemplateError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let valid_start = !name.is_empty() && !name.starts_with(['.', '-']);
    // Earlier versions kept the key in the same directory.
    if valid_start && name.len() <= MAX_NAME && name.bytes().all(allowed) && name != "key" {
        return Ok(());
    }
    Err(TemplateError::Name { name: name.into(), max: MAX_NAME })
}

#[cfg(test)]
#[path = "store_test.rs"]
mod tests;
