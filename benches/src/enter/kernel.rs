//! A kernel with other first instructions.

/// What they write to the serial port, followed by an end of line, until which a monitor may keep it.
pub const MARK: u8 = 0x02;

/// The same instructions in 32-bit and 64-bit mode, because monitors enter in either: write two bytes to port 0x3f8, then end
/// by an invalid instruction, for which there is no handler and none for that (a triple fault).
const START: [u8; 12] = [0x66, 0xba, 0xf8, 0x03, 0xb0, MARK, 0xee, 0xb0, b'\n', 0xee, 0x0f, 0x0b];

/// `PT_LOAD` and `PT_NOTE`.
const LOAD: u32 = 1;
const NOTE: u32 = 4;

/// `XEN_ELFNOTE_PHYS32_ENTRY`: where a monitor enters that starts kernels by the PVH protocol.
const PVH_ENTRY: u32 = 18;

/// Replaces what is at both entries of an ELF kernel; `None` if it is none.
pub fn with_other_start(mut kernel: Vec<u8>) -> Option<Vec<u8>> {
    if kernel.get(..5)? != b"\x7fELF\x02" {
        return None;
    }
    let (entry, table) = (u64_at(&kernel, 24)?, u64_at(&kernel, 32)?);
    let (bytes, count) = (u16_at(&kernel, 54)?, u16_at(&kernel, 56)?);
    let headers: Vec<usize> = (0..usize::from(count))
        .map(|number| usize::try_from(table).ok()?.checked_add(number * usize::from(bytes)))
        .collect::<Option<_>>()?;
    let mut entries = vec![entry];
    for header in &headers {
        if u32_at(&kernel, *header)? == NOTE {
            entries.extend(pvh_entry(&kernel, *header));
        }
    }
    for entry in entries {
        // A place in a loaded segment: the file's offset and the physical address, and how much of it is in the file.
        let offset = headers.iter().find_map(|header| {
            let (offset, address) = (u64_at(&kernel, header + 8)?, u64_at(&kernel, header + 24)?);
            let into = entry.checked_sub(address)?;
            let here = u32_at(&kernel, *header)? == LOAD && into < u64_at(&kernel, header + 32)?;
            here.then(|| usize::try_from(offset.checked_add(into)?).ok()).flatten()
        })?;
        kernel.get_mut(offset..)?.get_mut(..START.len())?.copy_from_slice(&START);
    }
    Some(kernel)
}

/// The entry that a note names.
fn pvh_entry(kernel: &[u8], header: usize) -> Option<u64> {
    let mut at = usize::try_from(u64_at(kernel, header + 8)?).ok()?;
    let end = at.checked_add(usize::try_from(u64_at(kernel, header + 32)?).ok()?)?;
    while at < end {
        let (name, length, kind) =
            (u32_at(kernel, at)?, u32_at(kernel, at + 4)?, u32_at(kernel, at + 8)?);
        let padded =
            |bytes: u32| usize::try_from(bytes).ok().map(|bytes| bytes.next_multiple_of(4));
        let value = at.checked_add(12)?.checked_add(padded(name)?)?;
        if kind == PVH_ENTRY && kernel.get(at + 12..at + 16)? == b"Xen\0" {
            return if length == 4 {
                u32_at(kernel, value).map(u64::from)
            } else {
                u64_at(kernel, value)
            };
        }
        at = value.checked_add(padded(length)?)?;
    }
    None
}

fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes_at(bytes, at).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes_at(bytes, at).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes_at(bytes, at).map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two program headers, a note that names an entry at 0x1000020, and a segment at 0x1000000 with that and the other entry.
    fn kernel() -> Vec<u8> {
        let mut file = vec![0; 0x200];
        let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"\x7fELF\x02");
        put(24, &0x100_0000u64.to_le_bytes());
        put(32, &64u64.to_le_bytes());
        put(54, &[56, 0, 2, 0]);
        for (at, kind, offset, address, bytes) in
            [(64, LOAD, 0x100u64, 0x100_0000u64, 0x80u64), (120, NOTE, 0x1a0, 0, 36)]
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
    fn both_entries_are_replaced_and_nothing_else() {
        let before = kernel();
        let after = with_other_start(before.clone()).unwrap();
        for at in [0x100, 0x120] {
            assert_eq!(after[at..at + START.len()], START);
        }
        let changed = before.iter().zip(&after).filter(|(before, after)| before != after).count();
        assert_eq!(changed, 2 * START.len());
    }

    #[test]
    fn what_is_no_kernel_is_left_alone() {
        let whole = kernel();
        for length in 0..0x1c4 {
            let _ = with_other_start(whole[..length].to_vec());
        }
        let broken = |at: usize, bytes: &[u8]| {
            let mut file = whole.clone();
            file[at..at + bytes.len()].copy_from_slice(bytes);
            with_other_start(file)
        };
        assert_eq!(broken(0, b"x"), None);
        // An entry in no segment, one at its very end, and a table outside the file.
        assert_eq!(broken(24, &7u64.to_le_bytes()), None);
        assert_eq!(broken(24, &0x100_0080u64.to_le_bytes()), None);
        assert_eq!(broken(32, &u64::MAX.to_le_bytes()), None);
        assert_eq!(broken(72, &u64::MAX.to_le_bytes()), None);
    }
}
