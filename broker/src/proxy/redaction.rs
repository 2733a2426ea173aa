//! Redaction of values in responses, wherever the stream is cut into pieces. Policy without I/O.

use memchr::memmem;
use zeroize::Zeroizing;

use super::encoding::{encode_base64, percent_encode};

/// Minimum length of a pattern. A shorter one would match unrelated text.
const MIN_PATTERN: usize = 8;

/// The byte strings that must not reach the sandbox: values, in every form in which an endpoint
/// commonly echoes one.
#[derive(Default)]
pub(super) struct RedactionPatterns(Vec<Zeroizing<Vec<u8>>>);

impl RedactionPatterns {
    /// Adds a value verbatim, percent-encoded, escaped for JSON, and as Base64 at any offset of the
    /// encoded text.
    pub fn add_value(&mut self, value: &[u8]) {
        self.add_pattern(value.to_vec());
        self.add_pattern(percent_encode(value));
        self.add_pattern(escape_json(value));
        for lead in 0..3 {
            let mut shifted = Zeroizing::new(vec![0; lead]);
            shifted.extend_from_slice(value);
            for url_safe in [false, true] {
                let mut text = encode_base64(&shifted, url_safe);
                // The first characters depend on the preceding bytes, the last on the following.
                let first = (lead * 8).div_ceil(6);
                let complete = shifted.len() * 8 / 6;
                text.truncate(complete);
                text.drain(..first.min(text.len()));
                self.add_pattern(text);
            }
        }
    }

    fn add_pattern(&mut self, pattern: Vec<u8>) {
        let pattern = Zeroizing::new(pattern);
        if pattern.len() >= MIN_PATTERN && !self.0.contains(&pattern) {
            self.0.push(pattern);
        }
    }

    /// Overwrites every match with asterisks of the same length. Returns true if any was found.
    pub fn scrub(&self, bytes: &mut [u8]) -> bool {
        let mut found = false;
        for pattern in &self.0 {
            let finder = memmem::Finder::new(pattern.as_slice());
            let mut from = 0;
            while let Some(offset) = finder.find(&bytes[from..]) {
                let end = from + offset + pattern.len();
                bytes[from + offset..end].fill(b'*');
                from = end;
                found = true;
            }
        }
        found
    }

    /// Returns the number of bytes at the end that may be the beginning of a match.
    fn partial_match_len(&self, bytes: &[u8]) -> usize {
        let partial = |pattern: &Zeroizing<Vec<u8>>| {
            (1..pattern.len().min(bytes.len() + 1))
                .rev()
                .find(|length| bytes.ends_with(&pattern[..*length]))
                .unwrap_or(0)
        };
        self.0.iter().map(partial).max().unwrap_or(0)
    }
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

/// Scrubs a stream. It holds back bytes that may be the beginning of a value, and no others.
#[derive(Default)]
pub(super) struct Scrubber {
    held: Zeroizing<Vec<u8>>,
}

impl Scrubber {
    /// Returns the bytes that may be forwarded, and true if any of them were scrubbed.
    pub fn scrub(&mut self, patterns: &RedactionPatterns, bytes: &[u8]) -> (Vec<u8>, bool) {
        let mut all = Vec::with_capacity(self.held.len() + bytes.len());
        all.extend_from_slice(&self.held);
        all.extend_from_slice(bytes);
        let found = patterns.scrub(&mut all);
        let forwarded = all.len() - patterns.partial_match_len(&all);
        self.held = Zeroizing::new(all[forwarded..].to_vec());
        all.truncate(forwarded);
        (all, found)
    }

    /// Returns the number of bytes that are held back.
    pub fn held_len(&self) -> usize {
        self.held.len()
    }

    /// Returns the bytes that were held back, at the end of the stream.
    pub fn finish(&mut self) -> Vec<u8> {
        std::mem::take(&mut *self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VALUE: &[u8] = b"s3cret/\"value+42";

    #[test]
    fn every_form_of_a_value_is_scrubbed_at_every_cut() {
        let mut patterns = RedactionPatterns::default();
        patterns.add_value(VALUE);
        let forms = [
            VALUE.to_vec(),
            percent_encode(VALUE),
            br#"s3cret/\"value+42"#.to_vec(),
            encode_base64(&[b"user:", VALUE].concat(), false),
            encode_base64(&[b"a:", VALUE, b"x"].concat(), true),
            encode_base64(VALUE, false),
        ];
        for form in forms {
            let stream = [b"{\"echo\": \"", form.as_slice(), b"\"}"].concat();
            for cut in 0..stream.len() {
                let mut scrubber = Scrubber::default();
                let (mut out, first) = scrubber.scrub(&patterns, &stream[..cut]);
                let (rest, second) = scrubber.scrub(&patterns, &stream[cut..]);
                out.extend(rest);
                out.extend(scrubber.finish());
                assert!(first || second, "{}", String::from_utf8_lossy(&stream));
                assert_eq!(out.len(), stream.len());
                assert!(out.starts_with(b"{\"echo\": \"") && out.ends_with(b"\"}"));
                assert!(out.windows(8).any(|window| window == b"********"));
                assert!(
                    memmem::find(&out, b"cret").is_none() && memmem::find(&out, b"alue").is_none()
                );
            }
        }
    }

    #[test]
    fn bytes_that_begin_no_value_are_not_held_back() {
        let mut patterns = RedactionPatterns::default();
        patterns.add_value(b"abcdefgh1234");
        let mut scrubber = Scrubber::default();
        assert_eq!(scrubber.scrub(&patterns, b"data: hello\n\n").0, b"data: hello\n\n");
        assert_eq!(scrubber.scrub(&patterns, b"xab").0, b"x");
        assert_eq!(scrubber.scrub(&patterns, b"!").0, b"ab!");
    }
}
