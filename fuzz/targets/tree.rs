//! A tree from a sandbox, received by the host: no entry may be created outside its destination.
#![no_main]

use std::fs;

use chitin_tree::{ReceiveOptions, receive};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let dir = tempfile::tempdir_in("/dev/shm").expect("a directory");
    let to = dir.path().join("to");
    let received = receive(data, &to, &ReceiveOptions::host(1 << 16, 64));
    let names: Vec<_> = fs::read_dir(&dir)
        .expect("it is there")
        .map(|entry| entry.expect("an entry").file_name())
        .collect();
    match received {
        Ok(summary) => {
            assert!(names.iter().all(|name| name == "to"), "{names:?}");
            assert!(
                summary.files + summary.directories + summary.links <= 64
                    && summary.bytes <= 1 << 16
            );
        }
        Err(_) => assert!(names.iter().all(|name| name == "to"), "{names:?}"),
    }
    // Only root can remove directories that cannot be listed.
    drop(dir);
});
