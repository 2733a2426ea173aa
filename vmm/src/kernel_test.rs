use std::io::Write;

use super::*;
use crate::arch::x86_64::layout::ram_ranges;

const FROM: GuestAddress = GuestAddress(1 << 20);
const TO: GuestAddress = GuestAddress(64 << 20);

/// Offset, address, bytes in the file, bytes in memory.
type Load = (u64, u64, u64, u64);

fn elf(entry: u64, loads: &[Load]) -> Vec<u8> {
    let mut bytes = vec![0; 64];
    bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
    bytes[18] = 62;
    bytes[24..32].copy_from_slice(&entry.to_le_bytes());
    bytes[32] = 64;
    bytes[54] = 56;
    bytes[56] = u8::try_from(loads.len()).unwrap();
    for &(offset, address, file, memory) in loads {
        let mut header = [0; 56];
        header[0] = 1;
        for (at, value) in [(8, offset), (24, address), (32, file), (40, memory)] {
            header[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        bytes.extend_from_slice(&header);
    }
    bytes
}

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn read(bytes: &[u8]) -> Result<KernelImage, KernelError> {
    KernelImage::read_headers(&file(bytes), FROM, TO)
}

fn padded(entry: u64, loads: &[Load], length: usize) -> Vec<u8> {
    let mut bytes = elf(entry, loads);
    bytes.resize(length, 0);
    bytes
}

#[test]
fn other_file_is_not_elf() {
    assert!(matches!(read(b""), Err(KernelError::Truncated { .. })));
    assert!(matches!(read(&[0; 63]), Err(KernelError::Truncated { .. })));
    assert!(matches!(read(&[b'x'; 4096]), Err(KernelError::NotElf { compressed: false })));
    let mut bz_image = vec![0; 4096];
    bz_image[0x202..0x206].copy_from_slice(b"HdrS");
    assert!(matches!(read(&bz_image), Err(KernelError::NotElf { compressed: true })));
}

#[test]
fn elf_of_other_machine_is_refused() {
    for (at, value) in [(4, 1), (5, 2), (18, 183)] {
        let mut bytes = elf(1 << 20, &[(0, 1 << 20, 1, 1)]);
        bytes[at] = value;
        assert!(matches!(read(&bytes), Err(KernelError::WrongMachine)));
    }
}

#[test]
fn program_headers_are_bounded() {
    let mut bytes = elf(1 << 20, &[(0, 1 << 20, 1, 1)]);
    bytes[56..58].copy_from_slice(&u16::MAX.to_le_bytes());
    assert!(matches!(read(&bytes), Err(KernelError::ProgramHeaders { count: u16::MAX, .. })));
    bytes[56..58].copy_from_slice(&2u16.to_le_bytes());
    assert!(matches!(read(&bytes), Err(KernelError::Truncated { .. })));
    bytes[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(matches!(read(&bytes), Err(KernelError::Truncated { end: u64::MAX, .. })));
    assert!(matches!(read(&elf(1 << 20, &[])), Err(KernelError::ProgramHeaders { count: 0, .. })));
}

#[test]
fn segments_stay_in_file_and_memory() {
    let at = |loads: &[Load]| read(&elf(1 << 20, loads)).unwrap_err();
    assert!(matches!(at(&[(0, 1 << 20, 4096, 4096)]), KernelError::Truncated { .. }));
    assert!(matches!(at(&[(u64::MAX, 1 << 20, 2, 2)]), KernelError::Truncated { .. }));
    assert!(matches!(at(&[(0, 1 << 20, 2, 1)]), KernelError::SegmentSize { .. }));
    assert!(matches!(at(&[(0, 0, 1, 1)]), KernelError::OutsideMemory { .. }));
    assert!(matches!(at(&[(0, 1 << 20, 1, 64 << 20)]), KernelError::OutsideMemory { .. }));
    assert!(matches!(at(&[(0, u64::MAX, 1, 1)]), KernelError::OutsideMemory { .. }));
    assert!(matches!(at(&[(0, 1 << 20, 1, u64::MAX)]), KernelError::OutsideMemory { .. }));
    assert!(matches!(at(&[(0, 2 << 20, 1, 1)]), KernelError::Entry { .. }));
    assert!(matches!(
        at(&[(0, 2 << 20, 1, 4096), (0, (2 << 20) + 4095, 1, 1)]),
        KernelError::Overlap { .. }
    ));
}

#[test]
fn segment_is_mapped_with_copied_ends_and_zero_tail() {
    // Five pages and a bit, from the middle of a page; other bytes follow in the file.
    let (offset, address, bytes) = (0x1800, (2 << 20) + 0x800, 0x5123);
    let mut contents = padded(address, &[(offset, address, bytes, bytes + 0x3000)], 0x8000);
    contents[0x1000..].fill(0xee);
    for (index, byte) in contents[0x1800..0x1800 + 0x5123].iter_mut().enumerate() {
        *byte = u8::try_from(index % 251).unwrap();
    }
    let file = file(&contents);
    let ram = memory::create_ram(&ram_ranges(64 << 20)).unwrap();
    let image = KernelImage::read_headers(&file, FROM, TO).unwrap();
    image.map_segments(&file, &ram, FileSharing::Shared).unwrap();
    assert_eq!(image.entry(), GuestAddress(address));

    let mut loaded = vec![0; 0x5123 + 0x3000];
    ram.read_slice(&mut loaded, GuestAddress(address)).unwrap();
    assert_eq!(loaded[..0x5123], contents[0x1800..0x1800 + 0x5123]);
    assert!(loaded[0x5123..].iter().all(|byte| *byte == 0));
    assert_eq!(ram.read_obj::<u8>(GuestAddress(address - 1)).unwrap(), 0);

    let private = memory::create_ram(&ram_ranges(64 << 20)).unwrap();
    image.map_segments(&file, &private, FileSharing::Private).unwrap();
    let mut copied = vec![0; loaded.len()];
    private.read_slice(&mut copied, GuestAddress(address)).unwrap();
    assert!(copied == loaded);
}

#[test]
fn segment_out_of_phase_is_copied() {
    let address = 2 << 20;
    let mut contents = padded(address, &[(0x1234, address, 0x2000, 0x2000)], 0x4000);
    contents[0x1234..0x3234].fill(7);
    let file = file(&contents);
    let ram = memory::create_ram(&ram_ranges(64 << 20)).unwrap();
    let image = KernelImage::read_headers(&file, FROM, TO).unwrap();
    image.map_segments(&file, &ram, FileSharing::Shared).unwrap();
    let mut loaded = vec![0; 0x2001];
    ram.read_slice(&mut loaded, GuestAddress(address)).unwrap();
    assert!(loaded[..0x2000].iter().all(|byte| *byte == 7) && loaded[0x2000] == 0);
}
