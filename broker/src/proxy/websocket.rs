//! Frames of WebSocket (RFC 6455, 5.2) without extensions: read, validated, scanned and scrubbed.
//! Policy without I/O.
//!
//! A message of the endpoint may leave in other fragments than it came in. Its end releases what
//! the scrubber holds back. Control frames have at most 125 bytes and are scrubbed as a whole.

use super::blocked::Side;
use super::placeholder::{PlaceholderScanner, Placeholders};
use super::redaction::RedactionPatterns;
use super::scrubber::Scrubber;

const FIN: u8 = 0x80;
const RESERVED: u8 = 0x70;
const OPCODE: u8 = 0x0f;
const CONTINUATION: u8 = 0;
const TEXT: u8 = 1;
const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PONG: u8 = 10;

/// The bit of the second byte that tells that a payload is masked.
const MASKED: u8 = 0x80;

/// Longest payload of a control frame.
const MAX_CONTROL: u64 = 125;

/// Longest header of a frame.
const MAX_HEADER: usize = 14;

/// A frame that violates RFC 6455, or uses an extension.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct InvalidFrame;

/// The header of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FrameHeader {
    is_final: bool,
    opcode: u8,
    mask: [u8; 4],
    length: u64,
}

impl FrameHeader {
    fn is_control(&self) -> bool {
        self.opcode >= CLOSE
    }

    /// Parses a header; `None` if it is incomplete.
    fn parse(bytes: &[u8], from: Side) -> Result<Option<FrameHeader>, InvalidFrame> {
        let [first, second, rest @ ..] = bytes else { return Ok(None) };
        let (opcode, masked) = (first & OPCODE, second & MASKED != 0);
        let valid_opcode = matches!(opcode, CONTINUATION..=BINARY | CLOSE..=PONG);
        if first & RESERVED != 0 || !valid_opcode || masked != (from == Side::Sandbox) {
            return Err(InvalidFrame);
        }
        let (length, rest) = match second & !MASKED {
            126 => {
                let Some((length, rest)) = rest.split_first_chunk::<2>() else { return Ok(None) };
                (Some(u64::from(u16::from_be_bytes(*length))).filter(|it| *it > 125), rest)
            }
            127 => {
                let Some((length, rest)) = rest.split_first_chunk::<8>() else { return Ok(None) };
                let length = Some(u64::from_be_bytes(*length));
                (length.filter(|it| (0x1_0000..1 << 63).contains(it)), rest)
            }
            short => (Some(u64::from(short)), rest),
        };
        // The shortest form of a length is the only valid one.
        let length = length.ok_or(InvalidFrame)?;
        let mask = match masked {
            true => match rest.first_chunk() {
                Some(mask) => *mask,
                None => return Ok(None),
            },
            false => [0; 4],
        };
        let header = FrameHeader { is_final: first & FIN != 0, opcode, mask, length };
        if header.is_control() && (!header.is_final || length > MAX_CONTROL) {
            return Err(InvalidFrame);
        }
        Ok(Some(header))
    }
}

/// A part of a frame, in order.
enum FramePart<'a> {
    /// The header is complete.
    Header(FrameHeader),
    /// A piece of the payload as it was received, and the position of it.
    Payload { bytes: &'a [u8], position: u64, is_last: bool },
}

/// Reads the frames of one side.
struct FrameReader {
    from: Side,
    /// The bytes of the header; the caller takes those of a complete one.
    header: Vec<u8>,
    frame: Option<FrameHeader>,
    position: u64,
    in_message: bool,
}

impl FrameReader {
    fn new(from: Side) -> FrameReader {
        FrameReader { from, header: Vec::new(), frame: None, position: 0, in_message: false }
    }

    /// Takes the next part from the input; `None` when it is used up.
    fn read_part<'a>(
        &mut self,
        input: &mut &'a [u8],
    ) -> Result<Option<FramePart<'a>>, InvalidFrame> {
        let Some(frame) = self.frame else { return self.read_header(input) };
        let remaining = frame.length - self.position;
        if input.is_empty() && remaining > 0 {
            return Ok(None);
        }
        let count = usize::try_from(remaining).unwrap_or(usize::MAX).min(input.len());
        let (bytes, rest) = input.split_at(count);
        *input = rest;
        let position = self.position;
        self.position += count as u64;
        let is_last = self.position == frame.length;
        if is_last {
            self.frame = None;
        }
        Ok(Some(FramePart::Payload { bytes, position, is_last }))
    }

    fn read_header<'a>(
        &mut self,
        input: &mut &'a [u8],
    ) -> Result<Option<FramePart<'a>>, InvalidFrame> {
        while let [first, rest @ ..] = *input {
            self.header.push(*first);
            *input = rest;
            let Some(frame) = FrameHeader::parse(&self.header, self.from)? else {
                if self.header.len() >= MAX_HEADER {
                    return Err(InvalidFrame);
                }
                continue;
            };
            if !frame.is_control() {
                if (frame.opcode == CONTINUATION) != self.in_message {
                    return Err(InvalidFrame);
                }
                self.in_message = !frame.is_final;
            }
            (self.frame, self.position) = (Some(frame), 0);
            return Ok(Some(FramePart::Header(frame)));
        }
        Ok(None)
    }
}

/// Scrubs the messages of an endpoint.
pub(super) struct MessageScrubber {
    reader: FrameReader,
    /// The frame whose payload is being read.
    frame: Option<FrameHeader>,
    control: Vec<u8>,
    scrubber: Scrubber,
    /// The opcode of the next fragment of the message: that of the message in the first one.
    opcode: u8,
    hits: u32,
}

impl MessageScrubber {
    pub fn new() -> MessageScrubber {
        MessageScrubber {
            reader: FrameReader::new(Side::Endpoint),
            frame: None,
            control: Vec::new(),
            scrubber: Scrubber::default(),
            opcode: CONTINUATION,
            hits: 0,
        }
    }

    /// Takes the next bytes of the endpoint, and returns frames for the sandbox.
    pub fn scrub(
        &mut self,
        patterns: &RedactionPatterns,
        mut input: &[u8],
    ) -> Result<Vec<u8>, InvalidFrame> {
        let mut out = Vec::with_capacity(input.len() + MAX_HEADER);
        while let Some(part) = self.reader.read_part(&mut input)? {
            match part {
                FramePart::Header(frame) => {
                    if matches!(frame.opcode, TEXT | BINARY) {
                        self.opcode = frame.opcode;
                    }
                    self.reader.header.clear();
                    self.frame = Some(frame);
                }
                FramePart::Payload { bytes, is_last, .. } => {
                    let Some(frame) = self.frame else { return Err(InvalidFrame) };
                    if frame.is_control() {
                        self.add_control(patterns, frame, bytes, is_last, &mut out);
                    } else {
                        self.add_data(patterns, frame, bytes, is_last, &mut out);
                    }
                }
            }
        }
        Ok(out)
    }

    /// Returns the number of messages with a value since the last call.
    pub fn take_hits(&mut self) -> u32 {
        std::mem::take(&mut self.hits)
    }

    fn add_control(
        &mut self,
        patterns: &RedactionPatterns,
        frame: FrameHeader,
        bytes: &[u8],
        is_last: bool,
        out: &mut Vec<u8>,
    ) {
        self.control.extend_from_slice(bytes);
        if is_last {
            self.hits += u32::from(patterns.scrub(&mut self.control));
            push_frame(out, FIN | frame.opcode, &self.control);
            self.control.clear();
        }
    }

    fn add_data(
        &mut self,
        patterns: &RedactionPatterns,
        frame: FrameHeader,
        bytes: &[u8],
        is_last: bool,
        out: &mut Vec<u8>,
    ) {
        let mut released = self.scrubber.scrub(patterns, bytes);
        let is_end = is_last && frame.is_final;
        if is_end {
            released.extend(self.scrubber.finish());
            self.hits += u32::from(self.scrubber.take_found());
        }
        if is_end || !released.is_empty() {
            push_frame(out, self.opcode | if is_end { FIN } else { 0 }, &released);
            self.opcode = CONTINUATION;
        }
    }
}

/// Appends a frame without a mask.
fn push_frame(out: &mut Vec<u8>, first: u8, payload: &[u8]) {
    out.push(first);
    match (u8::try_from(payload.len()), u16::try_from(payload.len())) {
        (Ok(length @ ..126), _) => out.push(length),
        (_, Ok(length)) => {
            out.push(126);
            out.extend_from_slice(&length.to_be_bytes());
        }
        _ => {
            out.push(127);
            out.extend_from_slice(&(payload.len() as u64).to_be_bytes());
        }
    }
    out.extend_from_slice(payload);
}

/// An end of the frames of a sandbox.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum ScanError {
    Frame(InvalidFrame),
    /// The placeholder of this credential.
    Placeholder(usize),
}

/// Scans the messages of a sandbox for placeholders.
pub(super) struct MessageScanner {
    reader: FrameReader,
    frame: Option<FrameHeader>,
    data: PlaceholderScanner,
    control: PlaceholderScanner,
}

impl MessageScanner {
    pub fn new() -> MessageScanner {
        MessageScanner {
            reader: FrameReader::new(Side::Sandbox),
            frame: None,
            data: PlaceholderScanner::default(),
            control: PlaceholderScanner::default(),
        }
    }

    /// Takes the next bytes of the sandbox, and returns those that may be forwarded.
    pub fn scan(
        &mut self,
        placeholders: &Placeholders,
        mut input: &[u8],
    ) -> Result<Vec<u8>, ScanError> {
        let mut out = Vec::with_capacity(input.len() + MAX_HEADER);
        while let Some(part) = self.reader.read_part(&mut input).map_err(ScanError::Frame)? {
            match part {
                FramePart::Header(frame) => {
                    out.append(&mut self.reader.header);
                    self.frame = Some(frame);
                }
                FramePart::Payload { bytes, position, is_last } => {
                    out.extend_from_slice(bytes);
                    let Some(frame) = self.frame else {
                        return Err(ScanError::Frame(InvalidFrame));
                    };
                    let shown: Vec<u8> = bytes
                        .iter()
                        .zip(position..)
                        .map(|(byte, position)| byte ^ frame.mask[(position % 4) as usize])
                        .collect();
                    let scanner = match frame.is_control() {
                        true => &mut self.control,
                        false => &mut self.data,
                    };
                    if let Some(credential) = scanner.scan(placeholders, &shown) {
                        return Err(ScanError::Placeholder(credential));
                    }
                    if is_last && frame.is_final {
                        *scanner = PlaceholderScanner::default();
                    }
                }
            }
        }
        Ok(out)
    }
}

#[cfg(test)]
#[path = "websocket_test.rs"]
mod tests;
