//! The files of a host, below a root directory.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Most of a file that is read. The longest, `/proc/cpuinfo`, repeats itself for each processor.
const MAX_FILE_BYTES: u64 = 64 * 1024;

/// Most entries of a directory that are listed.
const MAX_ENTRIES: usize = 256;

/// The files of a host.
#[derive(Debug)]
pub struct HostFiles {
    root: PathBuf,
}

impl HostFiles {
    /// Takes the root directory of the host.
    pub fn new(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// Returns the text of a file without the white space around it.
    pub fn read_text(&self, path: &str) -> io::Result<String> {
        let mut bytes = Vec::new();
        File::open(self.resolve(path))?.take(MAX_FILE_BYTES).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
    }

    /// Returns the names in a directory, sorted. An absent directory is empty.
    pub fn list_names(&self, path: &str) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.resolve(path)) else { return Vec::new() };
        let mut names: Vec<String> = entries
            .take(MAX_ENTRIES)
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .collect();
        names.sort();
        names
    }

    /// Returns the permissions of a file: the lowest nine bits.
    pub fn permissions(&self, path: &str) -> io::Result<u32> {
        Ok(fs::metadata(self.resolve(path))?.mode() & 0o777)
    }

    fn resolve(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }
}
