//! The key that templates are authenticated with, in a directory apart from them.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, linkat, unlinkat};
use zeroize::Zeroizing;

use super::TemplateError;
use super::trusted_dir::{Distrust, TrustedDir, file_error, untrusted};

pub(crate) const KEY_BYTES: usize = 32;

const KEY_FILE: &str = "templates.key";

/// The directory of root's key: root has no home on many hosts that run services.
const ROOT_DIR: &str = "/var/lib/chitin/keys";

/// Finds the directory of the key: `chitin/keys` in the user's state directory.
pub(super) fn locate_key_dir() -> Result<PathBuf, TemplateError> {
    if let Some(state) = std::env::var_os("XDG_STATE_HOME").filter(|dir| !dir.is_empty()) {
        return Ok(PathBuf::from(state).join("chitin/keys"));
    }
    if rustix::process::geteuid().is_root() {
        return Ok(ROOT_DIR.into());
    }
    let home = std::env::home_dir().ok_or(TemplateError::NoHome)?;
    Ok(home.join(".local/state/chitin/keys"))
}

/// Opens the key, which is created when it is first needed.
pub(super) fn open_key(key_dir: &Path) -> Result<File, TemplateError> {
    let dir = TrustedDir::create(key_dir)?;
    if !dir.has_file(KEY_FILE) {
        create_key(&dir)?;
    }
    let file = dir.open_file(KEY_FILE)?;
    let mode = file.metadata().map_err(file_error("inspect", dir.path()))?.mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(untrusted(dir.join(KEY_FILE), Distrust::Readable { mode }));
    }
    Ok(file)
}

/// Reads the key and rewinds its file.
pub(super) fn read_key(file: &mut File) -> io::Result<Zeroizing<[u8; KEY_BYTES]>> {
    let mut key = Zeroizing::new([0; KEY_BYTES]);
    file.read_exact(&mut *key)?;
    file.rewind()?;
    Ok(key)
}

/// Creates the key under a temporary name, so that no process reads a part of it. If another
/// process is faster, its key stays.
fn create_key(dir: &TrustedDir) -> Result<(), TemplateError> {
    let mut random = Zeroizing::new([0; KEY_BYTES + 8]);
    let failed = || file_error("create", dir.path());
    getrandom::fill(&mut *random).map_err(io::Error::from).map_err(failed())?;
    let (key, suffix) = random.split_at(KEY_BYTES);
    let suffix: String = suffix.iter().map(|byte| format!("{byte:02x}")).collect();
    let draft = format!(".{KEY_FILE}.{suffix}");
    let mut file = dir.create_file(&draft, Mode::RUSR | Mode::WUSR)?;
    let written = file.write_all(key).and_then(|()| file.sync_all());
    // A link fails if the name exists, on every file system.
    let link = || linkat(dir.fd(), &draft, dir.fd(), KEY_FILE, AtFlags::empty());
    let created = written.and_then(|()| Ok(link()?));
    let _ = unlinkat(dir.fd(), &draft, AtFlags::empty());
    created.or_else(|error| {
        if error.kind() == io::ErrorKind::AlreadyExists { Ok(()) } else { Err(failed()(error)) }
    })
}
