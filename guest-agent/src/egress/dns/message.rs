//! As much of DNS as a stub resolver asks for: one question, one address (RFC 1035, section 4).
//!
//! ```text
//!   0       2       4       6         8         10        12
//!   ┌───────┬───────┬───────┬─────────┬─────────┬─────────┬─ name ─┬ type ┬ class ┬─ ─ ─ ─ ─ ─ ─
//!   │ id    │ flags │ QD 1  │ AN      │ NS      │ AR      │ labels │ 2    │ 2     │ ignored (EDNS)
//!   └───────┴───────┴───────┴─────────┴─────────┴─────────┴────────┴──────┴───────┴─ ─ ─ ─ ─ ─ ─
//! ```
//!
//! The question is copied into the answer as it came: resolvers compare it, upper and lower case included.

use std::net::Ipv4Addr;

const HEADER: usize = 12;

/// Longest name on the wire, with a length before each label and the root's behind them (RFC 1035, 2.3.4).
const MAX_NAME: usize = 255;

/// Longest question that is answered; one with EDNS and a padding that nobody needs here is still shorter.
pub const MAX_QUERY: usize = 1232;

/// Seconds. An address stands for its name as long as the sandbox lives; a minute is what resolvers are used to.
const TTL: u32 = 60;

/// In the flags: this is an answer; more than that follows; recursion was asked for; recursion is to be had.
const ANSWER: u16 = 1 << 15;
const OPCODE: u16 = 0xf << 11;
const RECURSION_DESIRED: u16 = 1 << 8;
const RECURSION_AVAILABLE: u16 = 1 << 7;

/// Answer codes.
const NO_ERROR: u16 = 0;
const FORMAT_ERROR: u16 = 1;
const SERVER_FAILURE: u16 = 2;
const NO_SUCH_NAME: u16 = 3;
const NOT_IMPLEMENTED: u16 = 4;

const TYPE_A: u16 = 1;
const CLASS_IN: u16 = 1;

/// What is known of a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// It stands at this address.
    Address(Ipv4Addr),
    /// There is no such name, as far as this sandbox goes.
    Nothing,
    /// It may be used, and there is no address left for it.
    NoRoom,
}

/// What to answer; `None` where an answer could only do harm. `find` is asked for names in lower case that hold letters,
/// digits, `-`, `_` and dots.
pub fn answer(query: &[u8], find: impl FnOnce(&str) -> Found) -> Option<Vec<u8>> {
    let flags = number(query, 2)?;
    // An answer to an answer is how two servers talk to each other for ever.
    if query.len() < HEADER || flags & ANSWER != 0 {
        return None;
    }
    if flags & OPCODE != 0 {
        return Some(reply(query, &[], NOT_IMPLEMENTED, None));
    }
    let Some(question) = Question::read(query) else {
        return Some(reply(query, &[], FORMAT_ERROR, None));
    };
    if question.class != CLASS_IN {
        return Some(reply(query, question.bytes, NOT_IMPLEMENTED, None));
    }
    let found = question.name().map_or(Found::Nothing, |name| find(&name));
    let (code, address) = match found {
        Found::Address(address) => (NO_ERROR, Some(address).filter(|_| question.kind == TYPE_A)),
        Found::Nothing => (NO_SUCH_NAME, None),
        Found::NoRoom => (SERVER_FAILURE, None),
    };
    Some(reply(query, question.bytes, code, address))
}

struct Question<'a> {
    /// As it came.
    bytes: &'a [u8],
    kind: u16,
    class: u16,
}

impl Question<'_> {
    fn read(query: &[u8]) -> Option<Question<'_>> {
        if number(query, 4)? != 1 {
            return None;
        }
        let mut end = HEADER;
        loop {
            let length = usize::from(*query.get(end)?);
            end += 1 + length;
            // 64 and more is a pointer, and there is nothing before a question to point at.
            if length >= 64 || end - HEADER > MAX_NAME {
                return None;
            }
            if length == 0 {
                break;
            }
        }
        let bytes = query.get(HEADER..end + 4)?;
        Some(Question { bytes, kind: number(query, end)?, class: number(query, end + 2)? })
    }

    /// `None` for a name that no host has: bytes that are no host name's, or the root.
    fn name(&self) -> Option<String> {
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

fn reply(query: &[u8], question: &[u8], code: u16, address: Option<Ipv4Addr>) -> Vec<u8> {
    let flags = number(query, 2).unwrap_or(0);
    let mut reply = Vec::with_capacity(HEADER + question.len() + 16);
    reply.extend_from_slice(&query[..2]);
    let flags = ANSWER | (flags & (OPCODE | RECURSION_DESIRED)) | RECURSION_AVAILABLE | code;
    for field in [flags, u16::from(!question.is_empty()), u16::from(address.is_some()), 0, 0] {
        reply.extend_from_slice(&field.to_be_bytes());
    }
    reply.extend_from_slice(question);
    if let Some(address) = address {
        // The name is the one at offset 12.
        reply.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1]);
        reply.extend_from_slice(&TTL.to_be_bytes());
        reply.extend_from_slice(&[0, 4]);
        reply.extend_from_slice(&address.octets());
    }
    reply
}

fn number(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
#[path = "message_test.rs"]
mod tests;
