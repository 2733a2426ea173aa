//! As much of the DNS message format as a stub resolver uses: one question, one address (RFC 1035,
//! section 4).
//!
//! ```text
//!   0       2       4       6         8         10        12
//!   ┌───────┬───────┬───────┬─────────┬─────────┬─────────┬─ name ─┬ type ┬ class ┬─ ─ ─ ─ ─ ─ ─
//!   │ id    │ flags │ QD 1  │ AN      │ NS      │ AR      │ labels │ 2    │ 2     │ ignored (EDNS)
//!   └───────┴───────┴───────┴─────────┴─────────┴─────────┴────────┴──────┴───────┴─ ─ ─ ─ ─ ─ ─
//! ```
//!
//! The question is copied into the answer unchanged: resolvers compare it, upper and lower case
//! included.

use std::net::Ipv4Addr;

const HEADER_LEN: usize = 12;

/// The longest name on the wire, with a length before each label and the empty label of the root at
/// the end (RFC 1035, 2.3.4).
const MAX_NAME_LEN: usize = 255;

/// The longest query that is answered. One with EDNS and padding is still shorter.
pub const MAX_QUERY: usize = 1232;

/// The TTL of an answer in seconds. An address stands for its name as long as the sandbox lives; a
/// minute is a usual value.
const TTL: u32 = 60;

/// Header flags: this is a response (QR); the operation; recursion desired; recursion available.
const RESPONSE: u16 = 1 << 15;
const OPCODE: u16 = 0xf << 11;
const RECURSION_DESIRED: u16 = 1 << 8;
const RECURSION_AVAILABLE: u16 = 1 << 7;

/// Response codes.
const NO_ERROR: u16 = 0;
const FORMAT_ERROR: u16 = 1;
const SERVER_FAILURE: u16 = 2;
const NAME_ERROR: u16 = 3;
const NOT_IMPLEMENTED: u16 = 4;

const TYPE_A: u16 = 1;
const CLASS_IN: u16 = 1;

/// The result of looking up a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lookup {
    /// The name has this address.
    Address(Ipv4Addr),
    /// The name does not exist in this sandbox.
    NoSuchName,
    /// The name is allowed, and no address is left for it.
    NoAddressLeft,
}

/// Answers a query, or returns `None` if an answer could only do harm. `look_up` gets names in
/// lower case that consist of letters, digits, `-`, `_` and dots.
pub fn answer_query(query: &[u8], look_up: impl FnOnce(&str) -> Lookup) -> Option<Vec<u8>> {
    let flags = read_u16(query, 2)?;
    // Answers to responses would let two servers talk to each other forever.
    if query.len() < HEADER_LEN || flags & RESPONSE != 0 {
        return None;
    }
    if flags & OPCODE != 0 {
        return Some(write_response(query, &[], NOT_IMPLEMENTED, None));
    }
    let Some(question) = Question::read(query) else {
        return Some(write_response(query, &[], FORMAT_ERROR, None));
    };
    if question.class != CLASS_IN {
        return Some(write_response(query, question.bytes, NOT_IMPLEMENTED, None));
    }
    let found = question.host_name().map_or(Lookup::NoSuchName, |name| look_up(&name));
    let (code, address) = match found {
        Lookup::Address(address) => (NO_ERROR, Some(address).filter(|_| question.kind == TYPE_A)),
        Lookup::NoSuchName => (NAME_ERROR, None),
        Lookup::NoAddressLeft => (SERVER_FAILURE, None),
    };
    Some(write_response(query, question.bytes, code, address))
}

struct Question<'a> {
    /// The question as received.
    bytes: &'a [u8],
    kind: u16,
    class: u16,
}

impl Question<'_> {
    fn read(query: &[u8]) -> Option<Question<'_>> {
        if read_u16(query, 4)? != 1 {
            return None;
        }
        let mut end = HEADER_LEN;
        loop {
            let length = usize::from(*query.get(end)?);
            end += 1 + length;
            // A length of 64 and more is a pointer, and nothing precedes a question to point at.
            if length >= 64 || end - HEADER_LEN > MAX_NAME_LEN {
                return None;
            }
            if length == 0 {
                break;
            }
        }
        let bytes = query.get(HEADER_LEN..end + 4)?;
        Some(Question { bytes, kind: read_u16(query, end)?, class: read_u16(query, end + 2)? })
    }

    /// Returns the name in lower case, or `None` if no host can have it: it has other bytes than
    /// those of a host name, or is the root.
    fn host_name(&self) -> Option<String> {
        let mut labels = self.bytes.get(..self.bytes.len() - 4)?;
        let mut name = String::with_capacity(labels.len());
        while let Some((&length, rest)) = labels.split_first().filter(|(length, _)| **length > 0) {
            let (label, rest) = rest.split_at_checked(length.into())?;
            if !label.iter().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
            {
                return None;
            }
            if !name.is_empty() {
                name.push('.');
            }
            name.extend(label.iter().map(|byte| char::from(byte.to_ascii_lowercase())));
            labels = rest;
        }
        Some(name).filter(|name| !name.is_empty())
    }
}

fn write_response(query: &[u8], question: &[u8], code: u16, address: Option<Ipv4Addr>) -> Vec<u8> {
    let flags = read_u16(query, 2).unwrap_or(0);
    let mut response = Vec::with_capacity(HEADER_LEN + question.len() + 16);
    response.extend_from_slice(&query[..2]);
    let flags = RESPONSE | (flags & (OPCODE | RECURSION_DESIRED)) | RECURSION_AVAILABLE | code;
    for field in [flags, u16::from(!question.is_empty()), u16::from(address.is_some()), 0, 0] {
        response.extend_from_slice(&field.to_be_bytes());
    }
    response.extend_from_slice(question);
    if let Some(address) = address {
        // A pointer to the name at offset 12, type A, class IN.
        response.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1]);
        response.extend_from_slice(&TTL.to_be_bytes());
        response.extend_from_slice(&[0, 4]);
        response.extend_from_slice(&address.octets());
    }
    response
}

fn read_u16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
#[path = "message_test.rs"]
mod tests;
