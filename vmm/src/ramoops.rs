//! The guest kernel's last messages, read from the memory where its `ramoops` driver left them.
//!
//! The zone is a `struct persistent_ram_buffer` (`fs/pstore/ram_core.c` of Linux): signature, `start`, `size`, then a ring
//! of bytes. The guest writes it, so nothing in it is believed: lengths are bounded by the zone, and what is not text is
//! replaced, because the log ends up on somebody's terminal.

use vm_memory::{Bytes, GuestAddress};

use crate::control::MAX_LOG_BYTES;
use crate::memory::GuestRam;

const SIGNATURE: u32 = u32::from_le_bytes(*b"DBGC");
const HEADER_BYTES: usize = 12;

/// The tail of the messages in the zone at `address`, at most [`MAX_LOG_BYTES`]; empty if the guest never wrote any.
pub fn read(ram: &GuestRam, address: GuestAddress, bytes: u64) -> String {
    let mut zone = vec![0; usize::try_from(bytes).unwrap_or(0)];
    match ram.read_slice(&mut zone, address) {
        Ok(()) => sanitize(&ring(&zone)),
        Err(_) => String::new(),
    }
}

/// The ring's bytes, oldest first.
fn ring(zone: &[u8]) -> Vec<u8> {
    let Some((header, data)) = zone.split_at_checked(HEADER_BYTES) else { return Vec::new() };
    let field = |at: usize| u32::from_le_bytes(std::array::from_fn(|index| header[at + index]));
    if field(0) != SIGNATURE {
        return Vec::new();
    }
    let size = usize::try_from(field(8)).unwrap_or(usize::MAX).min(data.len());
    let start = usize::try_from(field(4)).unwrap_or(usize::MAX).min(size);
    [&data[start..size], &data[..start]].concat()
}

/// Text that is safe to print: no control characters but newline and tab, valid UTF-8, bounded.
fn sanitize(bytes: &[u8]) -> String {
    let text: String = String::from_utf8_lossy(bytes)
        .chars()
        .map(|char| match char {
            '\n' | '\t' => char,
            char if char.is_control() => char::REPLACEMENT_CHARACTER,
            // Characters that reorder or hide what is printed around them.
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
    fn a_ring_that_has_not_wrapped() {
        assert_eq!(ring(&zone(5, 5, b"hello\0\0\0")), b"hello");
    }

    #[test]
    fn a_ring_that_has_wrapped() {
        assert_eq!(ring(&zone(3, 8, b"678hello")), b"hello678");
    }

    #[test]
    fn nothing_in_the_header_is_believed() {
        assert_eq!(ring(&zone(u32::MAX, u32::MAX, b"abc")), b"abc");
        assert_eq!(ring(&zone(2, 1, b"abc")), b"a");
        assert_eq!(ring(&zone(0, 0, b"abc")), b"");
        assert_eq!(ring(b"short"), b"");
        assert_eq!(ring(&[0; 64]), b"");
        assert_eq!(ring(&[0xff; 64]), b"");
    }

    #[test]
    fn what_a_terminal_would_obey_is_replaced() {
        assert_eq!(sanitize(b"a\x1b[2Jb\tc\n\xff\0"), "a\u{fffd}[2Jb\tc\n\u{fffd}\u{fffd}");
        assert_eq!(sanitize("x\u{202e}y".as_bytes()), "x\u{fffd}y");
    }

    #[test]
    fn the_tail_is_kept_and_bounded_even_if_replacing_grows_it() {
        let text = sanitize(&vec![0xff; 64 * 1024]);
        assert!(text.len() <= MAX_LOG_BYTES && text.len() > MAX_LOG_BYTES - 3);
        let mut bytes = vec![b'x'; MAX_LOG_BYTES];
        bytes.extend_from_slice(b"end");
        assert!(sanitize(&bytes).ends_with("xend"));
    }
}
