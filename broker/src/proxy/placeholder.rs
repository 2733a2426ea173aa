//! Placeholders: random texts that the workload holds instead of values, and their detection in
//! streams, wherever these are cut into pieces. Policy without I/O.

use std::collections::BTreeMap;

use memchr::memmem;

/// Every placeholder begins with it. All characters of a placeholder are valid, unescaped, in a
/// URL, a header and a JSON string.
const PREFIX: &str = "chitin-";

/// Random hexadecimal digits after the prefix. 160 bits: no other text is mistaken for one.
const DIGITS: usize = 40;

/// Random bytes of a placeholder.
pub(super) const RANDOM_BYTES: usize = DIGITS / 2;

/// Length of a placeholder.
const LENGTH: usize = PREFIX.len() + DIGITS;

/// Makes a placeholder of random bytes.
pub(super) fn format_placeholder(random: [u8; RANDOM_BYTES]) -> String {
    random.iter().fold(PREFIX.to_owned(), |text, byte| format!("{text}{byte:02x}"))
}

/// All placeholders of a sandbox, each with the index of its credential.
#[derive(Debug, Default)]
pub(super) struct Placeholders(BTreeMap<String, usize>);

impl Placeholders {
    pub fn insert(&mut self, placeholder: String, credential: usize) {
        self.0.insert(placeholder, credential);
    }

    /// Returns the position and the credential of the first placeholder at or after `from`.
    pub fn find(&self, bytes: &[u8], mut from: usize) -> Option<(usize, usize)> {
        while let Some(offset) =
            bytes.get(from..).and_then(|rest| memmem::find(rest, PREFIX.as_bytes()))
        {
            from += offset;
            let text =
                bytes.get(from..from + LENGTH).and_then(|text| std::str::from_utf8(text).ok());
            if let Some(credential) = text.and_then(|text| self.0.get(text)) {
                return Some((from, *credential));
            }
            from += 1;
        }
        None
    }
}

/// Detects placeholders in a stream.
#[derive(Debug, Default)]
pub(super) struct PlaceholderScanner {
    /// The end of the bytes scanned so far, too short for a placeholder.
    tail: Vec<u8>,
}

impl PlaceholderScanner {
    /// Scans the next bytes; returns the credential whose placeholder is complete with them.
    pub fn scan(&mut self, placeholders: &Placeholders, bytes: &[u8]) -> Option<usize> {
        // A placeholder that straddles the cut ends in the first bytes of the new piece.
        self.tail.extend_from_slice(&bytes[..bytes.len().min(LENGTH - 1)]);
        let found = placeholders.find(&self.tail, 0).or_else(|| placeholders.find(bytes, 0));
        if bytes.len() >= LENGTH - 1 {
            self.tail.clear();
            self.tail.extend_from_slice(&bytes[bytes.len() - (LENGTH - 1)..]);
        } else {
            let excess = self.tail.len().saturating_sub(LENGTH - 1);
            self.tail.drain(..excess);
        }
        found.map(|(_, credential)| credential)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placeholders() -> (Placeholders, String) {
        let text = format_placeholder([0xab; RANDOM_BYTES]);
        let mut all = Placeholders::default();
        all.insert(text.clone(), 7);
        (all, text)
    }

    #[test]
    fn split_placeholder_is_found_at_every_cut() {
        let (all, text) = placeholders();
        let stream = format!("chitin-no chitin-{}x{text}{text}", &text[7..20]);
        assert_eq!(all.find(stream.as_bytes(), 0).map(|(_, credential)| credential), Some(7));
        for cut in 1..stream.len() {
            for second in [cut, (cut + 1).min(stream.len()), (cut + 50).min(stream.len())] {
                let mut scanner = PlaceholderScanner::default();
                let pieces = [&stream[..cut], &stream[cut..second], &stream[second..]];
                assert!(
                    pieces.iter().any(|piece| scanner.scan(&all, piece.as_bytes()) == Some(7)),
                    "{cut} {second}"
                );
            }
        }
        let mut scanner = PlaceholderScanner::default();
        assert!(stream.bytes().any(|byte| scanner.scan(&all, &[byte]).is_some()));
        let mut scanner = PlaceholderScanner::default();
        assert!(text[1..].bytes().all(|byte| scanner.scan(&all, &[byte]).is_none()));
    }
}
