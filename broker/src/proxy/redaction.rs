//! Redaction of values: the byte strings that must not reach the sandbox, and their search.
//! Policy without I/O.
//!
//! A search takes the same time for any two values of the same length: each position costs one
//! multiplication and one look-up, and only eight bytes that begin a value cost more. A search
//! that skips ahead at the rare bytes of a value would tell these bytes by its speed.

use std::hash::{BuildHasher, RandomState};

use zeroize::Zeroizing;

use super::encoding::{encode_base64, percent_encode};

/// Minimum length of a pattern. A shorter one would match unrelated text.
const MIN_PATTERN: usize = 8;

/// The longest form of a value is percent-encoded: three bytes for each of its bytes.
const MAX_EXPANSION: usize = 3;

/// Binary logarithm of the number of bits of the filter: 585 patterns set at most 4 % of them.
const FILTER_BITS: u32 = 14;

/// The byte strings that must not reach the sandbox: values, in every form in which an endpoint
/// commonly echoes one.
#[derive(Default)]
pub(super) struct RedactionPatterns {
    content: PatternSet,
    /// The same patterns in lower case: names of headers are case-insensitive.
    names: PatternSet,
    longest_value: usize,
}

impl RedactionPatterns {
    /// Makes the patterns of these values: each verbatim, percent-encoded, escaped for JSON, and as
    /// Base64 at any offset of the encoded text.
    pub fn new(values: &[Zeroizing<Vec<u8>>]) -> RedactionPatterns {
        let mut patterns = Vec::new();
        for value in values {
            patterns.push(value.clone());
            patterns.push(Zeroizing::new(percent_encode(value)));
            patterns.push(Zeroizing::new(escape_json(value)));
            for lead in 0..3 {
                for url_safe in [false, true] {
                    patterns.push(encode_shifted_base64(value, lead, url_safe));
                }
            }
        }
        let lower = patterns.iter().map(|it| Zeroizing::new(it.to_ascii_lowercase())).collect();
        RedactionPatterns {
            content: PatternSet::new(patterns),
            names: PatternSet::new(lower),
            longest_value: values.iter().map(|value| value.len()).max().unwrap_or(0),
        }
    }

    /// Returns the length of the delay line: one byte less than the longest form of any value of
    /// this length, so that it depends on the length of values and not on their characters.
    pub fn delay(&self) -> usize {
        (MAX_EXPANSION * self.longest_value).saturating_sub(1)
    }

    /// Overwrites every match with asterisks of the same length. Returns true if any was found.
    pub fn scrub(&self, bytes: &mut [u8]) -> bool {
        let mut mask = vec![false; bytes.len()];
        let found = self.mark(bytes, &mut mask);
        overwrite_masked(bytes, &mask);
        found
    }

    /// Overwrites every match in the lower-case name of a header, as [`RedactionPatterns::scrub`].
    pub fn scrub_name(&self, name: &mut [u8]) -> bool {
        let mut mask = vec![false; name.len()];
        let found = self.names.mark(name, &mut mask);
        overwrite_masked(name, &mask);
        found
    }

    /// Sets the mask of every byte of a match. Returns true if any was found that was not masked.
    pub fn mark(&self, bytes: &[u8], mask: &mut [bool]) -> bool {
        self.content.mark(bytes, mask)
    }
}

/// Overwrites the masked bytes with asterisks.
pub(super) fn overwrite_masked(bytes: &mut [u8], mask: &[bool]) {
    for (byte, masked) in bytes.iter_mut().zip(mask) {
        if *masked {
            *byte = b'*';
        }
    }
}

/// Returns true if a byte may be a part of a value, in any form: all of these are printable ASCII.
pub(super) fn is_value_byte(byte: u8) -> bool {
    (0x20..0x7f).contains(&byte)
}

/// Patterns, sorted, and a filter of their beginnings.
struct PatternSet {
    sorted: Vec<Zeroizing<Vec<u8>>>,
    /// Random, so that no sandbox can prepare text that passes the filter.
    key: u64,
    filter: Vec<u64>,
}

impl Default for PatternSet {
    fn default() -> PatternSet {
        PatternSet::new(Vec::new())
    }
}

impl PatternSet {
    fn new(mut sorted: Vec<Zeroizing<Vec<u8>>>) -> PatternSet {
        sorted.retain(|pattern| pattern.len() >= MIN_PATTERN);
        sorted.sort_unstable_by(|left, right| left.as_slice().cmp(right.as_slice()));
        sorted.dedup();
        let key = RandomState::new().hash_one(0u64) | 1;
        let mut set = PatternSet { sorted, key, filter: vec![0; 1 << (FILTER_BITS - 6)] };
        for index in 0..set.sorted.len() {
            let bit = set.filter_bit(read_beginning(&set.sorted[index]));
            set.filter[bit / 64] |= 1 << (bit % 64);
        }
        set
    }

    fn filter_bit(&self, beginning: u64) -> usize {
        (beginning.wrapping_mul(self.key) >> (u64::BITS - FILTER_BITS)) as usize
    }

    fn mark(&self, bytes: &[u8], mask: &mut [bool]) -> bool {
        let mut found = false;
        if self.sorted.is_empty() {
            return false;
        }
        for (start, window) in bytes.windows(MIN_PATTERN).enumerate() {
            let beginning = read_beginning(window);
            let bit = self.filter_bit(beginning);
            if self.filter[bit / 64] >> (bit % 64) & 1 == 0 {
                continue;
            }
            let rest = &bytes[start..];
            for pattern in self.with_beginning(beginning) {
                if rest.len() >= pattern.len() && is_equal(&rest[..pattern.len()], pattern) {
                    let masked = &mut mask[start..start + pattern.len()];
                    found |= masked.contains(&false);
                    masked.fill(true);
                }
            }
        }
        found
    }

    /// Returns the patterns that begin with these eight bytes.
    fn with_beginning(&self, beginning: u64) -> impl Iterator<Item = &Zeroizing<Vec<u8>>> {
        let first = self.sorted.partition_point(|pattern| read_beginning(pattern) < beginning);
        self.sorted[first..].iter().take_while(move |it| read_beginning(it) == beginning)
    }
}

/// Returns the first eight bytes as a number that is ordered as they are; zero if there are fewer.
fn read_beginning(bytes: &[u8]) -> u64 {
    bytes.first_chunk().map_or(0, |first| u64::from_be_bytes(*first))
}

/// Compares in a time that depends on the length only.
fn is_equal(left: &[u8], right: &[u8]) -> bool {
    left.iter().zip(right).fold(0, |different, (left, right)| different | (left ^ right)) == 0
}

/// Encodes a value after `lead` other bytes, without the characters that depend on its neighbours.
fn encode_shifted_base64(value: &[u8], lead: usize, url_safe: bool) -> Zeroizing<Vec<u8>> {
    let mut shifted = Zeroizing::new(vec![0; lead]);
    shifted.extend_from_slice(value);
    let mut text = Zeroizing::new(encode_base64(&shifted, url_safe));
    let first = (lead * 8).div_ceil(6);
    let complete = shifted.len() * 8 / 6;
    text.truncate(complete);
    text.drain(..first.min(complete));
    text
}

fn escape_json(value: &[u8]) -> Vec<u8> {
    let mut json = Vec::with_capacity(2 * value.len());
    for &byte in value {
        if matches!(byte, b'"' | b'\\') {
            json.push(b'\\');
        }
        json.push(byte);
    }
    json
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patterns(values: &[&[u8]]) -> RedactionPatterns {
        let values: Vec<_> = values.iter().map(|value| Zeroizing::new(value.to_vec())).collect();
        RedactionPatterns::new(&values)
    }

    #[test]
    fn overlapping_matches_are_all_scrubbed() {
        let patterns = patterns(&[b"abcdefgh", b"efghijkl", b"aaaaaaaa"]);
        let mut bytes = b"-abcdefghijkl- aaaaaaaaaa-abcdefg".to_vec();
        assert!(patterns.scrub(&mut bytes));
        assert_eq!(bytes, b"-************- **********-abcdefg");
        assert!(!patterns.scrub(&mut bytes));
    }

    #[test]
    fn delay_depends_on_the_length_of_values_only() {
        for length in 8..100 {
            let plain = vec![b'a'; length];
            let special = vec![b'"'; length];
            assert_eq!(patterns(&[&plain]).delay(), patterns(&[&special]).delay());
            for value in [&plain, &special] {
                let patterns = patterns(&[value]);
                for pattern in &patterns.content.sorted {
                    assert!(pattern.len() <= patterns.delay() + 1);
                    assert!(pattern.iter().all(|byte| is_value_byte(*byte)));
                }
            }
        }
    }

    #[test]
    fn name_is_scrubbed_in_any_case() {
        let patterns = patterns(&[b"CanaryValue-1"]);
        let mut name = b"x-canaryvalue-1-y".to_vec();
        assert!(patterns.scrub_name(&mut name));
        assert_eq!(name, b"x-*************-y");
    }
}
