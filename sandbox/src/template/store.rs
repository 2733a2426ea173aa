//! The directory of a user's templates, and drafts of new ones.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use chitin_tiers::GuestFiles;
use hmac::{Hmac, Mac};
use sha2::Sha256;
use zeroize::Zeroizing;

use super::{Manifest, TemplateError};

pub(crate) const KEY_BYTES: usize = 32;
const MAC_BYTES: usize = 32;

/// The largest length of a template's name.
const MAX_NAME: usize = 64;

/// The largest `template.json` that is read.
const MAX_MANIFEST: u64 = 64 * 1024;
/// The directory of a user's templates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Templates {
    dir: PathBuf,
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
        Ok(Templates { dir })
    }

    /// Uses this directory, which is created when the first template is built.
    pub fn at(dir: impl Into<PathBuf>) -> Templates {
        Templates { dir: dir.into() }
    }

    /// Lists all templates, sorted by name.
    ///
    /// # Errors
    /// The directory or a manifest cannot be read.
    pub fn list(&self) -> Result<Vec<Manifest>, TemplateError> {
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(file_error("list", &self.dir))?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let name = entry.map_err(file_error("list", &self.dir))?.file_name();
            // Skips the key, and templates that are being built.
            if let Some(name) = name.to_str().filter(|name| check_template_name(name).is_ok())
                && self.dir.join(name).is_dir()
            {
                found.push(self.inspect(name)?);
            }
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    /// Reads the manifest of a template.
    ///
    /// # Errors
    /// There is no template of this name, or its manifest cannot be read.
    pub fn inspect(&self, name: &str) -> Result<Manifest, TemplateError> {
        let path = self.find_template(name)?.join("template.json");
        let mut json = Vec::new();
        let file = File::open(&path).map_err(file_error("open", &path))?;
        file.take(MAX_MANIFEST).read_to_end(&mut json).map_err(file_error("read", &path))?;
        serde_json::from_slice(&json).map_err(|source| TemplateError::Manifest { path, source })
    }

    /// Removes a template. Running copies of it are not affected.
    ///
    /// # Errors
    /// There is no template of this name, or its files cannot be removed.
    pub fn remove(&self, name: &str) -> Result<(), TemplateError> {
        let dir = self.find_template(name)?;
        fs::remove_dir_all(&dir).map_err(file_error("remove", &dir))
    }

    fn find_template(&self, name: &str) -> Result<PathBuf, TemplateError> {
        check_template_name(name)?;
        let path = self.dir.join(name);
        if path.is_dir() {
            return Ok(path);
        }
        Err(TemplateError::Missing { name: name.into(), dir: self.dir.clone() })
    }

    /// Verifies the seal of a template and opens its files.
    pub(crate) fn open(&self, name: &str) -> Result<GuestFiles, TemplateError> {
        let dir = self.find_template(name)?;
        let open = |file: &str| {
            let path = dir.join(file);
            File::open(&path).map_err(file_error("open", &path))
        };
        let (memory, state) = (open("memory")?, open("state")?);
        let path = dir.join("seal");
        let sealed = fs::read(&path).map_err(file_error("read", &path))?;
        let key = self.read_key()?;
        let mac = compute_seal(&*key, &memory, &state).map_err(file_error("inspect", &dir))?;
        mac.verify_slice(&sealed).map_err(|_| TemplateError::Seal(name.into()))?;
        Ok(GuestFiles { memory, state, key: self.open_key()? })
    }

    /// Creates the directory of a new template, which [`TemplateDraft::publish`] renames.
    pub(crate) fn create_draft(&self, name: &str) -> Result<TemplateDraft, TemplateError> {
        check_template_name(name)?;
        private_dir().recursive(true).create(&self.dir).map_err(file_error("create", &self.dir))?;
        let dir = self.dir.join(format!(".{name}.{}", std::process::id()));
        private_dir().create(&dir).map_err(file_error("create", &dir))?;
        Ok(TemplateDraft { templates: self.clone(), name: name.into(), dir, published: false })
    }

    fn read_key(&self) -> Result<Zeroizing<[u8; KEY_BYTES]>, TemplateError> {
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        self.open_key()?
            .read_exact(&mut *key)
            .map_err(file_error("read", &self.dir.join("key")))?;
        Ok(key)
    }

    /// Opens the key, which is created when it is first needed.
    pub(super) fn open_key(&self) -> Result<File, TemplateError> {
        let path = self.dir.join("key");
        match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path) {
            Ok(mut file) => {
                let mut key = Zeroizing::new([0; KEY_BYTES]);
                getrandom::fill(&mut *key)
                    .map_err(io::Error::from)
                    .map_err(file_error("create", &path))?;
                file.write_all(&*key).map_err(file_error("write", &path))?;
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(file_error("create", &path)(error)),
        }
        File::open(&path).map_err(file_error("open", &path))
    }
}

/// A template that is being built. If it is dropped before it is published, its files are removed.
#[derive(Debug)]
pub(crate) struct TemplateDraft {
    templates: Templates,
    name: String,
    dir: PathBuf,
    published: bool,
}

impl TemplateDraft {
    /// Creates the files that a guest is saved into.
    pub fn create_files(&self) -> Result<GuestFiles, TemplateError> {
        Ok(GuestFiles {
            memory: self.create_file("memory")?,
            state: self.create_file("state")?,
            key: self.templates.open_key()?,
        })
    }

    /// Opens the saved files for reading.
    pub fn open_files(&self) -> Result<GuestFiles, TemplateError> {
        let open = |file: &str| {
            let path = self.dir.join(file);
            File::open(&path).map_err(file_error("open", &path))
        };
        Ok(GuestFiles {
            memory: open("memory")?,
            state: open("state")?,
            key: self.templates.open_key()?,
        })
    }

    /// Creates the file of a state with recorded pages, which replaces the first state.
    pub fn create_new_state(&self) -> Result<File, TemplateError> {
        self.create_file("state.new")
    }

    /// Opens the key again: each reader reads it once.
    pub fn open_key(&self) -> Result<File, TemplateError> {
        self.templates.open_key()
    }

    fn create_file(&self, file: &str) -> Result<File, TemplateError> {
        let path = self.dir.join(file);
        let create =
            OpenOptions::new().read(true).write(true).create_new(true).mode(0o400).open(&path);
        create.map_err(file_error("create", &path))
    }

    /// Seals the template and gives it its name. An existing template of this name is replaced.
    pub fn publish(mut self, mut manifest: Manifest) -> Result<Manifest, TemplateError> {
        let path = |file: &str| self.dir.join(file);
        fs::rename(path("state.new"), path("state"))
            .map_err(file_error("rename", &path("state.new")))?;
        let memory = File::open(path("memory")).map_err(file_error("open", &path("memory")))?;
        let state = File::open(path("state")).map_err(file_error("open", &path("state")))?;
        let metadata = memory.metadata().map_err(file_error("inspect", &path("memory")))?;
        manifest.memory_bytes = metadata.blocks() * 512;
        let mac = compute_seal(&*self.templates.read_key()?, &memory, &state)
            .map_err(file_error("inspect", &self.dir))?;
        fs::write(path("seal"), mac.finalize().into_bytes())
            .map_err(file_error("write", &path("seal")))?;
        let json = serde_json::to_vec_pretty(&manifest)
            .map_err(|source| TemplateError::Manifest { path: path("template.json"), source })?;
        fs::write(path("template.json"), json)
            .map_err(file_error("write", &path("template.json")))?;

        let target = self.templates.dir.join(&self.name);
        if target.exists() {
            fs::remove_dir_all(&target).map_err(file_error("replace", &target))?;
        }
        fs::rename(&self.dir, &target).map_err(file_error("rename", &self.dir))?;
        self.published = true;
        Ok(manifest)
    }
}

impl Drop for TemplateDraft {
    fn drop(&mut self) {
        if !self.published {
            // A failure cannot be reported here, and the draft is of no further use.
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

fn private_dir() -> fs::DirBuilder {
    let mut builder = fs::DirBuilder::new();
    builder.mode(0o700);
    builder
}

fn file_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> TemplateError {
    let path = path.to_owned();
    move |source| TemplateError::File { operation, path, source }
}

/// Computes the MAC of a memory file's identity and of the state that belongs to it, which is
/// represented by its own MAC.
fn compute_seal(key: &[u8], memory: &File, state: &File) -> io::Result<Hmac<Sha256>> {
    use std::os::unix::fs::FileExt;
    let mut mac = Hmac::<Sha256>::new_from_slice(key).map_err(io::Error::other)?;
    let metadata = memory.metadata()?;
    mac.update(b"chitin template memory 1");
    for number in [
        metadata.dev(),
        metadata.ino(),
        metadata.size(),
        metadata.mtime().cast_unsigned(),
        metadata.mtime_nsec().cast_unsigned(),
        metadata.ctime().cast_unsigned(),
        metadata.ctime_nsec().cast_unsigned(),
    ] {
        mac.update(&number.to_le_bytes());
    }
    let mut state_mac = [0; MAC_BYTES];
    let length = state.metadata()?.len();
    state.read_exact_at(&mut state_mac, length.saturating_sub(MAC_BYTES as u64))?;
    mac.update(&state_mac);
    Ok(mac)
}

/// Returns the seconds since 1970.
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn check_template_name(name: &str) -> Result<(), TemplateError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let valid_start = !name.is_empty() && !name.starts_with(['.', '-']);
    // The key is in the same directory.
    if valid_start && name.len() <= MAX_NAME && name.bytes().all(allowed) && name != "key" {
        return Ok(());
    }
    Err(TemplateError::Name { name: name.into(), max: MAX_NAME })
}
#[cfg(test)]
#[path = "store_test.rs"]
mod tests;
