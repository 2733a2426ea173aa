//! The archive of a root: nothing is created outside its target, and no file changes a user.
#![no_main]

use std::fs::{self, File};
use std::io::{Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let dir = tempfile::tempdir_in("/dev/shm").expect("a directory");
    let mut archive: File = tempfile::tempfile_in("/dev/shm").expect("a file");
    archive.write_all(data).expect("write a file");
    archive.rewind().expect("rewind a file");
    let target = dir.path().join("root");
    // An archive that is refused halfway must keep to its directory as well.
    let _ = chitin_tiers::archive::unpack(archive, &target, None);
    let names = fs::read_dir(&dir).expect("a directory").map(|entry| entry.expect("an entry"));
    assert!(names.into_iter().all(|entry| entry.file_name() == "root"));
    check_directory(&target);
});

fn check_directory(dir: &Path) {
    for entry in fs::read_dir(dir).expect("a directory") {
        let path = entry.expect("an entry").path();
        let metadata = fs::symlink_metadata(&path).expect("an entry");
        let kind = metadata.file_type();
        assert!(kind.is_dir() || kind.is_file() || kind.is_symlink(), "{}", path.display());
        assert!(kind.is_symlink() || metadata.mode() & 0o7000 == 0, "{}", path.display());
        if kind.is_dir() {
            check_directory(&path);
        }
    }
}
