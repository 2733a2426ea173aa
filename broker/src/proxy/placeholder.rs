//! Placeholders and values in streams of bytes: found wherever the pieces they come in are cut. Policy without I/O.

use std::collections::BTreeMap;

use memchr::memmem;
use zeroize::Zeroizing;

/// Every placeholder begins so. All its characters may stand in a URL, a header and a JSON text as they are.
const PREFIX: &str = "chitin-";

/// Random hexadecimal digits behind it: nothing else is taken for one.
const DIGITS: usize = 40;

/// Its length.
pub(crate) const PLACEHOLDER: usize = PREFIX.len() + DIGITS;

/// Makes a placeholder of random bytes.
pub(crate) fn placeholder(random: [u8; DIGITS / 2]) -> String {
    random.iter().fold(PREFIX.to_owned(), |text, byte| format!("{text}{byte:02x}"))
}

/// All placeholders of a sandbox, and which credential each stands for.
#[derive(Debug, Default)]
pub(crate) struct Placeholders(BTreeMap<String, usize>);

impl Placeholders {
    pub fn insert(&mut self, placeholder: String, credential: usize) {
        self.0.insert(placeholder, credential);
    }

    /// The first one at or behind `from`: where it begins, and what it stands for.
    pub fn find(&self, bytes: &[u8], mut from: usize) -> Option<(usize, usize)> {
        while let Some(at) =
            bytes.get(from..).and_then(|rest| memmem::find(rest, PREFIX.as_bytes()))
        {
            from += at;
            let text =
                bytes.get(from..from + PLACEHOLDER).and_then(|text| std::str::from_utf8(text).ok());
            if let Some(credential) = text.and_then(|text| self.0.get(text)) {
                return Some((from, *credential));
            }
            from += 1;
        }
        None
    }
}

/// Looks for placeholders in a stream.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    /// The end of what has passed, too short for a placeholder.
    tail: Vec<u8>,
}

impl Watch {
    /// The credential whose placeholder is complete with these bytes.
    pub fn feed(&mut self, placeholders: &Placeholders, bytes: &[u8]) -> Option<usize> {
        // What straddles the cut ends in the first bytes of the new piece.
        self.tail.extend_from_slice(&bytes[..bytes.len().min(PLACEHOLDER - 1)]);
        let found = placeholders.find(&self.tail, 0).or_else(|| placeholders.find(bytes, 0));
        if bytes.len() >= PLACEHOLDER - 1 {
            self.tail.clear();
            self.tail.extend_from_slice(&bytes[bytes.len() - (PLACEHOLDER - 1)..]);
        } else {
            let over = self.tail.len().saturating_sub(PLACEHOLDER - 1);
            self.tail.drain(..over);
        }
        found.map(|(_, credential)| credential)
    }
}

/// What must not come back: values, in every form in which an endpoint plainly echoes one.
#[derive(Default)]
pub(crate) struct Needles(Vec<Zeroizing<Vec<u8>>>);

/// Shorter ones would be found where they are not.
const MIN_NEEDLE: usize = 8;

impl Needles {
    /// Adds a value as it is, as percent-encoding and JSON write it, and as it shows in Base64, wherever in it it begins.
    pub fn add(&mut self, value: &[u8]) {
        self.push(value.to_vec());
        self.push(percent_encoded(value));
        let mut json = Vec::with_capacity(2 * value.len());
        for &byte in value {
            if matches!(byte, b'"' | b'\\') {
                json.push(b'\\');
            }
            json.push(byte);
        }
        self.push(json);
        for lead in 0..3 {
            let mut shifted = Zeroizing::new(vec![0; lead]);
            shifted.extend_from_slice(value);
            for url in [false, true] {
                let mut text = base64(&shifted, url);
                // The first characters depend on what stands before, the last on what follows.
                let first = (lead * 8).div_ceil(6);
                let whole = shifted.len() * 8 / 6;
                text.truncate(whole);
                text.drain(..first.min(text.len()));
                self.push(text);
            }
        }
    }

    fn push(&mut self, needle: Vec<u8>) {
        let needle = Zeroizing::new(needle);
        if needle.len() >= MIN_NEEDLE && !self.0.contains(&needle) {
            self.0.push(needle);
        }
    }

    /// Overwrites every one with as many stars. Whether there was any.
    pub fn scrub(&self, bytes: &mut [u8]) -> bool {
        let mut found = false;
        for needle in &self.0 {
            let finder = memmem::Finder::new(needle.as_slice());
            let mut from = 0;
            while let Some(at) = finder.find(&bytes[from..]) {
                let end = from + at + needle.len();
                bytes[from + at..end].fill(b'*');
                from = end;
                found = true;
            }
        }
        found
    }

    /// How many bytes at the end may be the beginning of one.
    fn open(&self, bytes: &[u8]) -> usize {
        let open = |needle: &Zeroizing<Vec<u8>>| {
            (1..needle.len().min(bytes.len() + 1))
                .rev()
                .find(|length| bytes.ends_with(&needle[..*length]))
                .unwrap_or(0)
        };
        self.0.iter().map(open).max().unwrap_or(0)
    }
}

/// Scrubs a stream. It holds back what may be the beginning of a value, and nothing else.
#[derive(Default)]
pub(crate) struct Scrubber {
    held: Zeroizing<Vec<u8>>,
}

impl Scrubber {
    /// What of it may go on, and whether something was scrubbed.
    pub fn feed(&mut self, needles: &Needles, bytes: &[u8]) -> (Vec<u8>, bool) {
        let mut all = Vec::with_capacity(self.held.len() + bytes.len());
        all.extend_from_slice(&self.held);
        all.extend_from_slice(bytes);
        let found = needles.scrub(&mut all);
        let keep = needles.open(&all);
        self.held = Zeroizing::new(all[all.len() - keep..].to_vec());
        all.truncate(all.len() - keep);
        (all, found)
    }

    /// How many bytes are held back.
    pub fn held(&self) -> usize {
        self.held.len()
    }

    /// Whether none are.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// What was held back, at the end.
    pub fn finish(&mut self) -> Vec<u8> {
        std::mem::take(&mut *self.held)
    }
}

/// As RFC 3986 writes what is not unreserved.
pub(crate) fn percent_encoded(value: &[u8]) -> Vec<u8> {
    let mut text = Vec::with_capacity(3 * value.len());
    for &byte in value {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            text.push(byte);
        } else {
            text.extend_from_slice(format!("%{byte:02X}").as_bytes());
        }
    }
    text
}

const STANDARD: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
const URL_SAFE: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// RFC 4648, with padding.
pub(crate) fn base64(bytes: &[u8], url: bool) -> Vec<u8> {
    let alphabet = if url { URL_SAFE } else { STANDARD };
    let mut text = Vec::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let (b0, b1, b2) = (chunk[0], chunk.get(1).copied(), chunk.get(2).copied());
        let bits = u32::from_be_bytes([0, b0, b1.unwrap_or(0), b2.unwrap_or(0)]);
        let digit = |shift: u32| alphabet[(bits >> shift & 63) as usize];
        text.extend([digit(18), digit(12)]);
        text.push(if b1.is_some() { digit(6) } else { b'=' });
        text.push(if b2.is_some() { digit(0) } else { b'=' });
    }
    text
}

/// The bytes of a Base64 text, with or without padding; `None` if it is none.
pub(crate) fn from_base64(text: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    let text = text.strip_suffix(b"==").or_else(|| text.strip_suffix(b"=")).unwrap_or(text);
    let mut bytes = Zeroizing::new(Vec::with_capacity(text.len()));
    for chunk in text.chunks(4) {
        let mut bits = 0u32;
        for &digit in chunk {
            let value = STANDARD.iter().position(|other| *other == digit)?;
            bits = bits << 6 | u32::try_from(value).ok()?;
        }
        let [_, b0, b1, b2] = (bits << (6 * (4 - chunk.len()))).to_be_bytes();
        let decoded = [b0, b1, b2];
        bytes.extend_from_slice(
            decoded.get(..chunk.len().checked_sub(1).filter(|count| *count > 0)?)?,
        );
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const VALUE: &[u8] = b"s3cret/\"value+42";

    fn placeholders() -> (Placeholders, String) {
        let text = placeholder([0xab; DIGITS / 2]);
        let mut all = Placeholders::default();
        all.insert(text.clone(), 7);
        (all, text)
    }

    #[test]
    fn a_placeholder_is_found_wherever_it_is_cut() {
        let (all, text) = placeholders();
        let stream = format!("chitin-no chitin-{}x{text}{text}", &text[7..20]);
        assert_eq!(all.find(stream.as_bytes(), 0).map(|(_, credential)| credential), Some(7));
        for cut in 1..stream.len() {
            for second in [cut, (cut + 1).min(stream.len()), (cut + 50).min(stream.len())] {
                let mut watch = Watch::default();
                let pieces = [&stream[..cut], &stream[cut..second], &stream[second..]];
                assert!(
                    pieces.iter().any(|piece| watch.feed(&all, piece.as_bytes()) == Some(7)),
                    "{cut} {second}"
                );
            }
        }
        let mut watch = Watch::default();
        assert!(stream.bytes().any(|byte| watch.feed(&all, &[byte]).is_some()));
        let mut watch = Watch::default();
        assert!(text[1..].bytes().all(|byte| watch.feed(&all, &[byte]).is_none()));
    }

    #[test]
    fn a_value_is_scrubbed_in_every_form_wherever_it_is_cut() {
        let mut needles = Needles::default();
        needles.add(VALUE);
        let forms = [
            VALUE.to_vec(),
            percent_encoded(VALUE),
            br#"s3cret/\"value+42"#.to_vec(),
            base64(&[b"user:", VALUE].concat(), false),
            base64(&[b"a:", VALUE, b"x"].concat(), true),
            base64(VALUE, false),
        ];
        for form in forms {
            let stream = [b"{\"echo\": \"", form.as_slice(), b"\"}"].concat();
            for cut in 0..stream.len() {
                let mut scrubber = Scrubber::default();
                let (mut out, first) = scrubber.feed(&needles, &stream[..cut]);
                let (rest, second) = scrubber.feed(&needles, &stream[cut..]);
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
    fn what_cannot_become_a_value_is_not_held_back() {
        let mut needles = Needles::default();
        needles.add(b"abcdefgh1234");
        let mut scrubber = Scrubber::default();
        assert_eq!(scrubber.feed(&needles, b"data: hello\n\n").0, b"data: hello\n\n");
        assert_eq!(scrubber.feed(&needles, b"xab").0, b"x");
        assert_eq!(scrubber.feed(&needles, b"!").0, b"ab!");
    }

    #[test]
    fn base64_there_and_back() {
        for length in 0..20u8 {
            let bytes: Vec<u8> = (0..length).map(|byte| byte.wrapping_mul(37)).collect();
            let text = base64(&bytes, false);
            assert_eq!(from_base64(&text).unwrap().as_slice(), bytes);
            let bare: Vec<u8> = text.iter().copied().filter(|byte| *byte != b'=').collect();
            assert_eq!(from_base64(&bare).unwrap().as_slice(), bytes);
        }
        assert_eq!(base64(b"user:pass", false), b"dXNlcjpwYXNz");
        for bad in [&b"a"[..], b"ab*d", b"ab==="] {
            assert!(from_base64(bad).is_none(), "{bad:?}");
        }
    }
}
