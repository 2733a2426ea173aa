//! The scrubber: a delay line that a stream of an endpoint passes on its way to the sandbox.
//! Policy without I/O.
//!
//! The length of its output depends on the bytes of the endpoint and on the lengths of values, and
//! never on their characters: the scrubber holds back a fixed number of bytes whether or not they
//! begin a value. Otherwise the size of a piece would tell the sandbox that it had guessed the
//! beginning of a value.
//!
//! Nothing is held back that no value can continue: all forms of all values are printable ASCII,
//! and another byte, such as a line break, releases what precedes it. Lines of text and
//! server-sent events therefore pass without delay. Time releases nothing: an endpoint that
//! pauses within a value would disclose its first part.

use zeroize::Zeroizing;

use super::redaction::{RedactionPatterns, is_value_byte, overwrite_masked};

/// Scrubs one body or message.
#[derive(Default)]
pub(super) struct Scrubber {
    /// Bytes that the endpoint has sent and the sandbox has not received, as they were sent.
    held: Zeroizing<Vec<u8>>,
    /// Held bytes that are a part of a value.
    mask: Vec<bool>,
    found: bool,
}

impl Scrubber {
    /// Takes the next bytes, and returns those that may be forwarded.
    pub fn scrub(&mut self, patterns: &RedactionPatterns, bytes: &[u8]) -> Vec<u8> {
        // New memory for all of them: growing the old one would leave a copy behind.
        let mut all = Zeroizing::new(Vec::with_capacity(self.held.len() + bytes.len()));
        all.extend_from_slice(&self.held);
        all.extend_from_slice(bytes);
        self.held = all;
        self.mask.resize(self.held.len(), false);
        self.found |= patterns.mark(&self.held, &mut self.mask);
        let run = self.held.iter().rev().take_while(|byte| is_value_byte(**byte)).count();
        let kept = run.min(patterns.delay());
        self.release(self.held.len() - kept)
    }

    /// Returns the bytes that are held back, at the end of the body or message.
    pub fn finish(&mut self) -> Vec<u8> {
        self.release(self.held.len())
    }

    /// Returns true if a value was found, once.
    pub fn take_found(&mut self) -> bool {
        std::mem::take(&mut self.found)
    }

    /// Returns the number of bytes that are held back.
    pub fn held_len(&self) -> usize {
        self.held.len()
    }

    fn release(&mut self, count: usize) -> Vec<u8> {
        let mut released = self.held[..count].to_vec();
        overwrite_masked(&mut released, &self.mask[..count]);
        // The rest moves to new memory, so that what was held is wiped.
        self.held = Zeroizing::new(self.held[count..].to_vec());
        self.mask.drain(..count);
        released
    }
}

#[cfg(test)]
mod tests {
    use super::super::encoding::{encode_base64, percent_encode};
    use super::*;

    const VALUE: &[u8] = b"s3cret/\"value+42";

    fn patterns(value: &[u8]) -> RedactionPatterns {
        RedactionPatterns::new(&[Zeroizing::new(value.to_vec())])
    }

    #[test]
    fn every_form_of_a_value_is_scrubbed_at_every_cut() {
        let patterns = patterns(VALUE);
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
                let mut out = scrubber.scrub(&patterns, &stream[..cut]);
                out.extend(scrubber.scrub(&patterns, &stream[cut..]));
                out.extend(scrubber.finish());
                assert!(scrubber.take_found(), "{}", String::from_utf8_lossy(&stream));
                assert_eq!(out.len(), stream.len());
                assert!(out.starts_with(b"{\"echo\": \"") && out.ends_with(b"\"}"));
                assert!(out.windows(8).any(|window| window == b"********"));
                let text = String::from_utf8_lossy(&out);
                assert!(!text.contains("cret") && !text.contains("alue"), "{text}");
            }
        }
    }

    #[test]
    fn held_bytes_do_not_depend_on_the_value() {
        let (right, wrong) = (patterns(b"abcdefgh1234"), patterns(b"\"%&/()=?`*+~"));
        let stream = b"xabcdefgh123!abcdefgh\nabcd\xffabcdefgh";
        for step in 1..stream.len() {
            let mut scrubbers = [Scrubber::default(), Scrubber::default()];
            for piece in stream.chunks(step) {
                let [first, second] = &mut scrubbers;
                assert_eq!(first.scrub(&right, piece), second.scrub(&wrong, piece));
            }
        }
    }

    #[test]
    fn lines_are_not_held_back() {
        let patterns = patterns(VALUE);
        let mut scrubber = Scrubber::default();
        assert_eq!(scrubber.scrub(&patterns, b"data: hello\n\n"), b"data: hello\n\n");
        assert_eq!(scrubber.scrub(&patterns, b"\0\0s3"), b"\0\0");
        assert_eq!(scrubber.scrub(&patterns, b"c\r\n"), b"s3c\r\n");
        let long = [b'a'; 100];
        assert_eq!(scrubber.scrub(&patterns, &long).len(), 100 - patterns.delay());
    }
}
