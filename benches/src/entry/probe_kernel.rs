//! A kernel with other first instructions.

/// The byte that the instructions write to the serial port. An end of line follows, because a
/// monitor may buffer a line.
pub const MARKER: u8 = 0x02;

/// Instructions that are the same in 32-bit and 64-bit mode, because monitors enter in either:
/// write two bytes to port 0x3f8, then execute an invalid instruction. No handler is installed for
/// it, so the guest ends by a triple fault.
const START: [u8; 12] = [0x66, 0xba, 0xf8, 0x03, 0xb0, MARKER, 0xee, 0xb0, b'\n', 0xee, 0x0f, 0x0b];

/// `p_type` of an ELF program header.
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

/// The note that holds the entry point of the PVH boot protocol.
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

/// Replaces the instructions at both entry points of an ELF kernel; returns `None` if the bytes
/// are not such a kernel.
pub fn patch_entry_points(mut kernel: Vec<u8>) -> Option<Vec<u8>> {
    if kernel.get(..5)? != b"\x7fELF\x02" {
        return None;
    }
    let (entry, table) = (read_u64(&kernel, 24)?, read_u64(&kernel, 32)?);
    let (size, count) = (read_u16(&kernel, 54)?, read_u16(&kernel, 56)?);
    let headers: Vec<usize> = (0..usize::from(count))
        .map(|index| usize::try_from(table).ok()?.checked_add(index * usize::from(size)))
        .collect::<Option<_>>()?;
    let mut entries = vec![entry];
    for header in &headers {
        if read_u32(&kernel, *header)? == PT_NOTE {
            entries.extend(find_pvh_entry(&kernel, *header));
        }
    }
    for entry in entries {
        let offset = headers.iter().find_map(|header| find_offset(&kernel, *header, entry))?;
        kernel.get_mut(offset..)?.get_mut(..START.len())?.copy_from_slice(&START);
    }
    Some(kernel)
}

/// Returns the file offset of a physical address, if the segment of this header holds it.
fn find_offset(kernel: &[u8], header: usize, address: u64) -> Option<usize> {
    let (offset, start) = (read_u64(kernel, header + 8)?, read_u64(kernel, header + 24)?);
    let into = address.checked_sub(start)?;
    let is_loaded = read_u32(kernel, header)? == PT_LOAD;
    let is_inside = is_loaded && into < read_u64(kernel, header + 32)?;
    is_inside.then(|| usize::try_from(offset.checked_add(into)?).ok()).flatten()
}

/// Returns the entry point from the notes of a `PT_NOTE` header.
fn find_pvh_entry(kernel: &[u8], header: usize) -> Option<u64> {
    let mut at = usize::try_from(read_u64(kernel, header + 8)?).ok()?;
    let end = at.checked_add(usize::try_from(read_u64(kernel, header + 32)?).ok()?)?;
    while at < end {
        let (name, length, kind) =
            (read_u32(kernel, at)?, read_u32(kernel, at + 4)?, read_u32(kernel, at + 8)?);
        let padded =
            |bytes: u32| usize::try_from(bytes).ok().map(|bytes| bytes.next_multiple_of(4));
        let value = at.checked_add(12)?.checked_add(padded(name)?)?;
        if kind == XEN_ELFNOTE_PHYS32_ENTRY && kernel.get(at + 12..at + 16)? == b"Xen\0" {
            return if length == 4 {
                read_u32(kernel, value).map(u64::from)
            } else {
                read_u64(kernel, value)
            };
        }
        at = value.checked_add(padded(length)?)?;
    }
    None
}

fn read_array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn read_u16(bytes: &[u8], at: usize) -> Option<u16> {
    read_array(bytes, at).map(u16::from_le_bytes)
}

fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    read_array(bytes, at).map(u32::from_le_bytes)
}

fn read_u64(bytes: &[u8], at: usize) -> Option<u64> {
    read_array(bytes, at).map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a file of two program headers: a note that names an entry at 0x1000020, and a
    /// segment at 0x1000000 that holds this entry and the other one.
    fn new_kernel() -> Vec<u8> {
        let mut file = vec![0; 0x200];
        let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"\x7fELF\x02");
        put(24, &0x100_0000u64.to_le_bytes());
        put(32, &64u64.to_le_bytes());
        put(54, &[56, 0, 2, 0]);
        for (at, kind, offset, address, bytes) in
            [(64, PT_LOAD, 0x100u64, 0x100_0000u64, 0x80u64), (120, PT_NOTE, 0x1a0, 0, 36)]
        {
            put(at, &kind.to_le_bytes());
            put(at + 8, &offset.to_le_bytes());
            put(at + 24, &address.to_le_bytes());
            put(at + 32, &bytes.to_le_bytes());
        }
        // Another note comes first.
        put(0x1a0, &[4, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
        put(0x1b0, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
        put(0x1bc, b"Xen\0");
        put(0x1c0, &0x100_0020u32.to_le_bytes());
        file
    }

    #[test]
    fn only_both_entry_points_are_patched() {
        let before = new_kernel();
        let after = patch_entry_points(before.clone()).unwrap();
        for at in [0x100, 0x120] {
            assert_eq!(after[at..at + START.len()], START);
        }
        let changed = before.iter().zip(&after).filter(|(before, after)| before != after).count();
        assert_eq!(changed, 2 * START.len());
    }

    #[test]
    fn invalid_kernel_is_rejected() {
        let whole = new_kernel();
        for length in 0..0x1c4 {
            let _ = patch_entry_points(whole[..length].to_vec());
        }
        let patch_broken = |at: usize, bytes: &[u8]| {
            let mut file = whole.clone();
            file[at..at + bytes.len()].copy_from_slice(bytes);
            patch_entry_points(file)
        };
        assert_eq!(patch_broken(0, b"x"), None);
        // An entry in no segment, one at the end of a segment, and a table outside the file.
        assert_eq!(patch_broken(24, &7u64.to_le_bytes()), None);
        assert_eq!(patch_broken(24, &0x100_0080u64.to_le_bytes()), None);
        assert_eq!(patch_broken(32, &u64::MAX.to_le_bytes()), None);
        assert_eq!(patch_broken(72, &u64::MAX.to_le_bytes()), None);
    }
}
