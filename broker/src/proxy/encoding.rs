//! Percent-encoding (RFC 3986) and Base64 (RFC 4648) of values that must leave no copies behind.

use zeroize::Zeroizing;

const STANDARD: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
const URL_SAFE: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// Encodes every byte that is not unreserved (RFC 3986, 2.3).
pub(crate) fn percent_encode(value: &[u8]) -> Vec<u8> {
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

/// Encodes bytes as Base64 with padding, in the standard or the URL-safe alphabet.
pub(crate) fn encode_base64(bytes: &[u8], url_safe: bool) -> Vec<u8> {
    let alphabet = if url_safe { URL_SAFE } else { STANDARD };
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

/// Decodes Base64 of the standard alphabet, with or without padding; `None` if it is invalid.
pub(crate) fn decode_base64(text: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
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

    #[test]
    fn base64_decodes_to_the_encoded_bytes() {
        for length in 0..20u8 {
            let bytes: Vec<u8> = (0..length).map(|byte| byte.wrapping_mul(37)).collect();
            let text = encode_base64(&bytes, false);
            assert_eq!(decode_base64(&text).unwrap().as_slice(), bytes);
            let bare: Vec<u8> = text.iter().copied().filter(|byte| *byte != b'=').collect();
            assert_eq!(decode_base64(&bare).unwrap().as_slice(), bytes);
        }
        assert_eq!(encode_base64(b"user:pass", false), b"dXNlcjpwYXNz");
        for bad in [&b"a"[..], b"ab*d", b"ab==="] {
            assert!(decode_base64(bad).is_none(), "{bad:?}");
        }
    }
}
