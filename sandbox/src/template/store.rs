//! The directory of a user's templates.

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

/// Longest name of a template.
pub(super) const MAX_NAME: usize = 64;

/// Largest `template.json` that is read.
const MAX_MANIFEST: u64 = 64 * 1024;
/// The place where a user's templates are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Templates {
    dir: PathBuf,
}

impl Templates {
    /// `$CHITIN_TEMPLATES`, else `chitin/templates` in the user's data directory.
    ///
    /// # Errors
    /// [`TemplateError::NoHome`] where neither is known.
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

    /// Those in a directory, which is made when the first one is built.
    pub fn at(dir: impl Into<PathBuf>) -> Templates {
        Templates { dir: dir.into() }
    }

    /// All of them, by name.
    ///
    /// # Errors
    /// The directory or a manifest cannot be read.
    pub fn list(&self) -> Result<Vec<Manifest>, TemplateError> {
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(failed("list", &self.dir))?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let name = entry.map_err(failed("list", &self.dir))?.file_name();
            // The key, and templates that are just being built.
            if let Some(name) = name.to_str().filter(|name| check_name(name).is_ok())
                && self.dir.join(name).is_dir()
            {
                found.push(self.inspect(name)?);
            }
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    /// What one is.
    ///
    /// # Errors
    /// There is none of that name, or its manifest cannot be read.
    pub fn inspect(&self, name: &str) -> Result<Manifest, TemplateError> {
        let path = self.existing(name)?.join("template.json");
        let mut json = Vec::new();
        let file = File::open(&path).map_err(failed("open", &path))?;
        file.take(MAX_MANIFEST).read_to_end(&mut json).map_err(failed("read", &path))?;
        serde_json::from_slice(&json).map_err(|source| TemplateError::Manifest { path, source })
    }

    /// Removes one. Its copies that are running are not touched.
    ///
    /// # Errors
    /// There is none of that name, or its files cannot be removed.
    pub fn remove(&self, name: &str) -> Result<(), TemplateError> {
        let dir = self.existing(name)?;
        fs::remove_dir_all(&dir).map_err(failed("remove", &dir))
    }

    fn existing(&self, name: &str) -> Result<PathBuf, TemplateError> {
        check_name(name)?;
        let path = self.dir.join(name);
        if path.is_dir() {
            return Ok(path);
        }
        Err(TemplateError::Missing { name: name.into(), dir: self.dir.clone() })
    }

    /// Opens the files of one, after the seal has been verified.
    pub(crate) fn open(&self, name: &str) -> Result<GuestFiles, TemplateError> {
        let dir = self.existing(name)?;
        let open = |file: &str| {
            let path = dir.join(file);
            File::open(&path).map_err(failed("open", &path))
        };
        let (memory, state) = (open("memory")?, open("state")?);
        let path = dir.join("seal");
        let sealed = fs::read(&path).map_err(failed("read", &path))?;
        let key = self.key()?;
        let mac = seal(&*key, &memory, &state).map_err(failed("look at", &dir))?;
        mac.verify_slice(&sealed).map_err(|_| TemplateError::Seal(name.into()))?;
        Ok(GuestFiles { memory, state, key: self.key_file()? })
    }

    /// Makes a place for a new one, which [`Draft::publish`] gives its name.
    pub(crate) fn draft(&self, name: &str) -> Result<Draft, TemplateError> {
        check_name(name)?;
        private_dir().recursive(true).create(&self.dir).map_err(failed("create", &self.dir))?;
        let dir = self.dir.join(format!(".{name}.{}", std::process::id()));
        private_dir().create(&dir).map_err(failed("create", &dir))?;
        Ok(Draft { templates: self.clone(), name: name.into(), dir, published: false })
    }

    fn key(&self) -> Result<Zeroizing<[u8; KEY_BYTES]>, TemplateError> {
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        self.key_file()?.read_exact(&mut *key).map_err(failed("read", &self.dir.join("key")))?;
        Ok(key)
    }

    /// Opens the key, made when it is first needed.
    fn key_file(&self) -> Result<File, TemplateError> {
        let path = self.dir.join("key");
        match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path) {
            Ok(mut file) => {
                let mut key = Zeroizing::new([0; KEY_BYTES]);
                getrandom::fill(&mut *key)
                    .map_err(io::Error::from)
                    .map_err(failed("make", &path))?;
                file.write_all(&*key).map_err(failed("write", &path))?;
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(failed("create", &path)(error)),
        }
        File::open(&path).map_err(failed("open", &path))
    }
}

/// A template that is being built. Dropped without being published, it leaves nothing.
#[derive(Debug)]
pub(crate) struct Draft {
    templates: Templates,
    name: String,
    dir: PathBuf,
    published: bool,
}

impl Draft {
    /// GuestFiles to save a guest into.
    pub fn files(&self) -> Result<GuestFiles, TemplateError> {
        Ok(GuestFiles {
            memory: self.create("memory")?,
            state: self.create("state")?,
            key: self.templates.key_file()?,
        })
    }

    /// The saved files, to be read.
    pub fn saved(&self) -> Result<GuestFiles, TemplateError> {
        let open = |file: &str| {
            let path = self.dir.join(file);
            File::open(&path).map_err(failed("open", &path))
        };
        Ok(GuestFiles {
            memory: open("memory")?,
            state: open("state")?,
            key: self.templates.key_file()?,
        })
    }

    /// A file for a state that knows more, which replaces the first one.
    pub fn new_state(&self) -> Result<File, TemplateError> {
        self.create("state.new")
    }

    /// The key, opened anew: each reader reads it once.
    pub fn key(&self) -> Result<File, TemplateError> {
        self.templates.key_file()
    }

    fn create(&self, file: &str) -> Result<File, TemplateError> {
        let path = self.dir.join(file);
        let create =
            OpenOptions::new().read(true).write(true).create_new(true).mode(0o400).open(&path);
        create.map_err(failed("create", &path))
    }

    /// Seals it and gives it its name, in place of one that has that name already.
    pub fn publish(mut self, mut manifest: Manifest) -> Result<Manifest, TemplateError> {
        let at = |file: &str| self.dir.join(file);
        fs::rename(at("state.new"), at("state")).map_err(failed("rename", &at("state.new")))?;
        let memory = File::open(at("memory")).map_err(failed("open", &at("memory")))?;
        let state = File::open(at("state")).map_err(failed("open", &at("state")))?;
        let metadata = memory.metadata().map_err(failed("look at", &at("memory")))?;
        manifest.memory_bytes = metadata.blocks() * 512;
        let mac =
            seal(&*self.templates.key()?, &memory, &state).map_err(failed("look at", &self.dir))?;
        fs::write(at("seal"), mac.finalize().into_bytes()).map_err(failed("write", &at("seal")))?;
        let json = serde_json::to_vec_pretty(&manifest)
            .map_err(|source| TemplateError::Manifest { path: at("template.json"), source })?;
        fs::write(at("template.json"), json).map_err(failed("write", &at("template.json")))?;

        let target = self.templates.dir.join(&self.name);
        if target.exists() {
            fs::remove_dir_all(&target).map_err(failed("replace", &target))?;
        }
        fs::rename(&self.dir, &target).map_err(failed("rename", &self.dir))?;
        self.published = true;
        Ok(manifest)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.published {
            // It is of no use to anybody, and nobody is left to be told.
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

fn private_dir() -> fs::DirBuilder {
    let mut builder = fs::DirBuilder::new();
    builder.mode(0o700);
    builder
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> TemplateError {
    let path = path.to_owned();
    move |source| TemplateError::File { operation, path, source }
}

/// The MAC of a memory file's identity and of the state that goes with it, which its own MAC stands for.
fn seal(key: &[u8], memory: &File, state: &File) -> io::Result<Hmac<Sha256>> {
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

/// What a guest's files must be where it is restored: the image that it has mapped, and whose pages it knows.
pub(crate) fn binding(root_image: &Path) -> io::Result<String> {
    let image = fs::metadata(root_image)?;
    Ok(format!(
        "chitin {}; root image of {} bytes, inode {}, changed {}.{:09}",
        env!("CARGO_PKG_VERSION"),
        image.len(),
        image.ino(),
        image.mtime(),
        image.mtime_nsec()
    ))
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn check_name(name: &str) -> Result<(), TemplateError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let starts = !name.is_empty() && !name.starts_with(['.', '-']);
    // The key lies beside the templates.
    if starts && name.len() <= MAX_NAME && name.bytes().all(plain) && name != "key" {
        return Ok(());
    }
    Err(TemplateError::Name(name.into()))
}
#[cfg(test)]
#[path = "store_test.rs"]
mod tests;
