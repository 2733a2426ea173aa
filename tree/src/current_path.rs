use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::{Error, FormatError, Limit, MAX_DEPTH, MAX_PATH, Refusal};

/// The path of the entry that a walk is at. It names the entry in every error, and bounds the depth
/// and length of paths.
pub(crate) struct CurrentPath {
    /// The root as the caller named it, followed by the names below it.
    path: Vec<u8>,
    /// The length of the root in `path`.
    root_len: usize,
    /// The length of `path` at each directory that was entered, outermost first.
    directories: Vec<usize>,
}

impl CurrentPath {
    pub fn new(root: &Path) -> CurrentPath {
        let path = root.as_os_str().as_bytes().to_vec();
        CurrentPath { root_len: path.len(), path, directories: Vec::new() }
    }

    /// Moves to an entry of the current directory, or to the directory itself for `None`.
    pub fn set_entry(&mut self, name: Option<&[u8]>) -> Result<(), Error> {
        self.path.truncate(self.directories.last().copied().unwrap_or(self.root_len));
        if let Some(name) = name {
            if !self.path.ends_with(b"/") {
                self.path.push(b'/');
            }
            self.path.extend_from_slice(name);
        }
        if self.path.len() - self.root_len > MAX_PATH {
            return Err(self.limit_error(Limit::Path));
        }
        Ok(())
    }

    /// Makes the current entry, which is a directory, the current directory.
    pub fn enter_directory(&mut self) -> Result<(), Error> {
        if self.directories.len() == MAX_DEPTH {
            return Err(self.limit_error(Limit::Depth));
        }
        self.directories.push(self.path.len());
        Ok(())
    }

    /// Makes the current directory the current entry again.
    pub fn leave_directory(&mut self) {
        if let Some(len) = self.directories.pop() {
            self.path.truncate(len);
        }
    }

    pub fn to_path_buf(&self) -> PathBuf {
        OsStr::from_bytes(&self.path).into()
    }

    pub fn filesystem_error(&self, operation: &'static str) -> impl FnOnce(Errno) -> Error + '_ {
        move |errno| Error::Filesystem { operation, path: self.to_path_buf(), source: errno.into() }
    }

    pub fn refusal(&self, refusal: Refusal) -> Error {
        Error::Refused { path: self.to_path_buf(), refusal }
    }

    pub fn limit_error(&self, limit: Limit) -> Error {
        Error::Limit { path: self.to_path_buf(), limit }
    }

    pub fn format_error(&self, error: FormatError) -> Error {
        Error::Malformed { path: self.to_path_buf(), error }
    }
}
