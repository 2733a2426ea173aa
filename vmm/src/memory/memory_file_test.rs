use std::os::fd::OwnedFd;

use super::*;
use crate::arch::x86_64::layout::ram_ranges;
use crate::memory::create_ram;

fn reopened(file: &tempfile::NamedTempFile) -> File {
    File::open(file.path()).unwrap()
}

#[test]
fn written_memory_is_mapped_back_copy_on_write() {
    let bytes = 64 << 20;
    let ram = create_ram(&ram_ranges(bytes)).unwrap();
    let values = [(0u64, 1u8), (4095, 2), (40 << 20, 3), ((40 << 20) + 8192, 4), (bytes - 1, 5)];
    for (at, value) in values {
        ram.write_obj(value, GuestAddress(at)).unwrap();
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), vec![9; 8192]).unwrap();
    let (parts, data) = write_memory(&ram, file.as_file()).unwrap();
    let run = |first, count| PageRun { first, count };
    assert_eq!(parts, [run(0, 1), run(10240, 3), run(16383, 1)]);
    assert_eq!(data, 4 * PAGE_BYTES);
    assert_eq!(file.as_file().metadata().unwrap().len(), bytes);

    for _ in 0..2 {
        let file = reopened(&file);
        check_memory_file(&file, bytes).unwrap();
        let ram = create_ram(&ram_ranges(bytes)).unwrap();
        map_parts(&ram, &file, &parts, FileSharing::Shared).unwrap();
        for (at, value) in values {
            assert_eq!(ram.read_obj::<u8>(GuestAddress(at)).unwrap(), value);
            ram.write_obj(99u8, GuestAddress(at)).unwrap();
        }
        assert_eq!(ram.read_obj::<u8>(GuestAddress(4096)).unwrap(), 0);
    }
}

#[test]
fn number_of_parts_is_bounded() {
    let runs: Vec<_> =
        (0..10_000).map(|number| PageRun { first: number * 100, count: 1 }).collect();
    let parts = merge_runs(&runs);
    assert!(parts.len() <= usize::from(MAX_PARTS));
    assert_eq!(parts[0].first, 0);
    assert_eq!(parts.last().unwrap().end(), 999_901);
}

#[test]
fn short_or_writable_memory_file_is_refused() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(4096).unwrap();
    let error = |file: &File, bytes| check_memory_file(file, bytes).unwrap_err();
    assert!(matches!(
        error(&reopened(&file), 4097),
        MemoryFileError::TooShort { bytes: 4096, needed: 4097 }
    ));
    assert!(matches!(error(file.as_file(), 4096), MemoryFileError::Writable));
    let (pipe, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    assert!(matches!(error(&File::from(OwnedFd::from(pipe)), 1), MemoryFileError::NotRegular));
    check_memory_file(&reopened(&file), 4096).unwrap();
}

#[test]
fn memory_above_the_device_hole_follows_in_the_file() {
    let ram = create_ram(&ram_ranges(4 << 30)).unwrap();
    assert_eq!(locate_offset(&ram, (3 << 30) - 1), Some((GuestAddress((3 << 30) - 1), 1)));
    assert_eq!(locate_offset(&ram, 3 << 30), Some((GuestAddress(4 << 30), 1 << 30)));
    assert_eq!(locate_offset(&ram, 4 << 30), None);
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(4 << 30).unwrap();
    file.as_file().write_all_at(&[7], 3 << 30).unwrap();
    let parts = [PageRun { first: (3 << 18) - 1, count: 2 }];
    map_parts(&ram, &reopened(&file), &parts, FileSharing::Shared).unwrap();
    assert_eq!(ram.read_obj::<u8>(GuestAddress(4 << 30)).unwrap(), 7);
}
