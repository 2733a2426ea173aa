use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::{Breach, Error, Limit, MAX_DEPTH, MAX_PATH, Refusal};

/// Where in the tree the work is: names every error, and bounds depth and length of paths.
pub(crate) struct Trail {
    /// The root as the caller named it, and the names below it.
    path: Vec<u8>,
    /// How much of `path` is the root.
    root: usize,
    /// Length of `path` at the directories entered.
    above: Vec<usize>,
}

impl Trail {
    pub fn new(root: &Path) -> Trail {
        let path = root.as_os_str().as_bytes().to_vec();
        Trail { root: path.len(), path, above: Vec::new() }
    }

    /// Names the entry that the work turns to; `None` is the root.
    pub fn turn_to(&mut self, name: Option<&[u8]>) -> Result<(), Error> {
        self.path.truncate(self.above.last().copied().unwrap_or(self.root));
        if let Some(name) = name {
            if !self.path.ends_with(b"/") {
                self.path.push(b'/');
            }
            self.path.extend_from_slice(name);
        }
        if self.path.len() - self.root > MAX_PATH {
            return Err(self.limit(Limit::Path));
        }
        Ok(())
    }

    /// The entry is a directory: what follows is in it.
    pub fn enter(&mut self) -> Result<(), Error> {
        if self.above.len() == MAX_DEPTH {
            return Err(self.limit(Limit::Depth));
        }
        self.above.push(self.path.len());
        Ok(())
    }

    /// The directory has ended: the work is at the directory itself again.
    pub fn leave(&mut self) {
        if let Some(len) = self.above.pop() {
            self.path.truncate(len);
        }
    }

    pub fn path(&self) -> PathBuf {
        OsStr::from_bytes(&self.path).into()
    }

    pub fn local(&self, operation: &'static str) -> impl FnOnce(Errno) -> Error + '_ {
        move |errno| Error::Local { operation, path: self.path(), source: errno.into() }
    }

    pub fn refused(&self, refusal: Refusal) -> Error {
        Error::Refused { path: self.path(), refusal }
    }

    pub fn limit(&self, limit: Limit) -> Error {
        Error::Limit { path: self.path(), limit }
    }

    pub fn malformed(&self, breach: Breach) -> Error {
        Error::Malformed { path: self.path(), breach }
    }
}
