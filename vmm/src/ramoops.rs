//! The guest kernel's last messages, read from the memory that its `ramoops` driver writes them to.
//!
//! The zone is a `struct persistent_ram_buffer` (`fs/pstore/ram_core.c` of Linux): signature,
//! `start`, `size`, then a ring of bytes. The guest writes it, so that nothing in it is trusted:
//! lengths are bounded by the zone, and bytes that are not text are replaced, because the log may
//! be shown on a terminal.

use vm_memory::{Bytes, GuestAddress};

use crate::control::MAX_LOG_BYTES;
use crate::memory::GuestRam;

const SIGNATURE: u32 = u32::from_le_bytes(*b"DBGC");
const HEADER_BYTES: usize = 12;

/// Reads the tail of the messages in the zone at `address`, at most [`MAX_LOG_BYTES`]; empty if the
/// guest never wrote any.
pub fn read_log(ram: &GuestRam, address: GuestAddress, bytes: u64) -> String {
    let mut zone = vec![0; usize::try_from(bytes).unwrap_or(0)];
    match ram.read_slice(&mut zone, address) {
        Ok(()) => sanitize(&unroll_ring(&zone)),
        Err(_) => String::new(),
    }
}

/// Returns the bytes of the ring, oldest first.
fn unroll_ring(zone: &[u8]) -> Vec<u8> {
    let Some((header, data)) = zone.split_at_checked(HEADER_BYTES) else { return Vec::new() };
    let field = |at: usize| u32::from_le_bytes(std::array::from_fn(|index| header[at + index]));
    if field(0) != SIGNATURE {
        return Vec::new();
    }
    let size = usize::try_from(field(8)).unwrap_or(usize::MAX).min(data.len());
    let start = usize::try_from(field(4)).unwrap_or(usize::MAX).min(size);
    [&data[start..size], &data[..start]].concat()
}

/// Returns text that is safe to print: no control characters but newline and tab, valid UTF-8,
/// bounded.
fn sanitize(bytes: &[u8]) -> String {
    let text: String = String::from_utf8_lossy(bytes)
        .chars()
        .map(|char| match char {
            '\n' | '\t' => char,
            char if char.is_control() => char::REPLACEMENT_CHARACTER,
            // Characters that reorder or hide the text around them.
            '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}'
            | '\u{feff}' => char::REPLACEMENT_CHARACTER,
            char => char,
        })
        .collect();
    let mut from = text.len().saturating_sub(MAX_LOG_BYTES);
    while !text.is_char_boundary(from) {
        from += 1;
    }
    text[from..].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zone(start: u32, size: u32, data: &[u8]) -> Vec<u8> {
        [&SIGNATURE.to_le_bytes(), &start.to_le_bytes(), &size.to_le_bytes(), data].concat()
    }

    #[test]
    fn ring_before_its_first_wrap_is_read_from_zero() {
        assert_eq!(unroll_ring(&zone(5, 5, b"hello\0\0\0")), b"hello");
    }

    #[test]
    fn wrapped_ring_is_read_from_its_oldest_byte() {
        assert_eq!(unroll_ring(&zone(3, 8, b"678hello")), b"hello678");
    }

    #[test]
    fn ring_header_is_not_trusted() {
        assert_eq!(unroll_ring(&zone(u32::MAX, u32::MAX, b"abc")), b"abc");
        assert_eq!(unroll_ring(&zone(2, 1, b"abc")), b"a");
        assert_eq!(unroll_ring(&zone(0, 0, b"abc")), b"");
        assert_eq!(unroll_ring(b"short"), b"");
        assert_eq!(unroll_ring(&[0; 64]), b"");
        assert_eq!(unroll_ring(&[0xff; 64]), b"");
    }

    #[test]
    fn terminal_control_characters_are_replaced() {
        assert_eq!(sanitize(b"a\x1b[2Jb\tc\n\xff\0"), "a\u{fffd}[2Jb\tc\n\u{fffd}\u{fffd}");
        assert_eq!(sanitize("x\u{202e}y".as_bytes()), "x\u{fffd}y");
    }

    #[test]
    fn log_keeps_its_tail_within_the_limit() {
        let text = sanitize(&vec![0xff; 64 * 1024]);
        assert!(text.len() <= MAX_LOG_BYTES && text.len() > MAX_LOG_BYTES - 3);
        let mut bytes = vec![b'x'; MAX_LOG_BYTES];
        bytes.extend_from_slice(b"end");
        assert!(sanitize(&bytes).ends_with("xend"));
    }
}
