//! Records in bytes. The table is in the crate's documentation.

use std::io::{ErrorKind, Read};
use std::ops::Range;

use crate::{Breach, Limit, MAX_TARGET};

/// Length of a data record without its bytes.
pub(crate) const DATA_HEAD: usize = 1 + 8 + 4;

/// Bytes that are read or written at once: few calls, and two frames of the channel.
pub(crate) const BUFFER: usize = 128 * 1024;

const DIRECTORY: u8 = 1;
const FILE: u8 = 2;
const SYMLINK: u8 = 3;
const DATA: u8 = 4;
const END_OF_FILE: u8 = 5;
const END_OF_DIRECTORY: u8 = 6;

/// What a file or directory has beside name and contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Attributes {
    /// Permission bits, at most `0o777`.
    pub mode: u16,
    /// Last change, seconds since 1970.
    pub seconds: i64,
    /// And nanoseconds, below a billion.
    pub nanoseconds: u32,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Record {
    Directory {
        name: Vec<u8>,
        attributes: Attributes,
    },
    File {
        name: Vec<u8>,
        attributes: Attributes,
    },
    Symlink {
        name: Vec<u8>,
        target: Vec<u8>,
    },
    /// Followed by `len` bytes.
    Data {
        offset: u64,
        len: u32,
    },
    EndOfFile {
        size: u64,
    },
    EndOfDirectory,
}

impl Record {
    /// Appends the record. Fails on a name or target longer than Linux itself allows, as some file systems do.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), Limit> {
        let name_len = |name: &[u8]| u8::try_from(name.len()).map_err(|_| Limit::Name);
        out.push(self.kind());
        match self {
            Record::Directory { name, attributes } | Record::File { name, attributes } => {
                out.push(name_len(name)?);
                out.extend_from_slice(&attributes.mode.to_le_bytes());
                out.extend_from_slice(&attributes.seconds.to_le_bytes());
                out.extend_from_slice(&attributes.nanoseconds.to_le_bytes());
                out.extend_from_slice(name);
            }
            Record::Symlink { name, target } => {
                out.push(name_len(name)?);
                let len =
                    u16::try_from(target.len()).ok().filter(|len| usize::from(*len) <= MAX_TARGET);
                out.extend_from_slice(&len.ok_or(Limit::Target)?.to_le_bytes());
                out.extend_from_slice(name);
                out.extend_from_slice(target);
            }
            Record::Data { offset, len } => {
                out.extend_from_slice(&offset.to_le_bytes());
                out.extend_from_slice(&len.to_le_bytes());
            }
            Record::EndOfFile { size } => out.extend_from_slice(&size.to_le_bytes()),
            Record::EndOfDirectory => {}
        }
        Ok(())
    }

    /// The byte that begins it.
    pub fn kind(&self) -> u8 {
        match self {
            Record::Directory { .. } => DIRECTORY,
            Record::File { .. } => FILE,
            Record::Symlink { .. } => SYMLINK,
            Record::Data { .. } => DATA,
            Record::EndOfFile { .. } => END_OF_FILE,
            Record::EndOfDirectory => END_OF_DIRECTORY,
        }
    }
}

/// Why there is no next record.
#[derive(Debug)]
pub(crate) enum Broken {
    Breach(Breach),
    EndedEarly,
    Stream(std::io::Error),
}

/// The stream, read through a buffer of fixed size, whatever lengths it announces.
pub(crate) struct Input<'a> {
    reader: &'a mut dyn Read,
    buffer: Vec<u8>,
    /// The part of `buffer` that is read and not yet taken.
    unread: Range<usize>,
}

impl<'a> Input<'a> {
    pub fn new(reader: &'a mut dyn Read) -> Input<'a> {
        Input { reader, buffer: vec![0; BUFFER], unread: 0..0 }
    }

    /// The next record, each of its fields checked as far as it can be without knowing what stands around it.
    pub fn record(&mut self) -> Result<Record, Broken> {
        let [kind] = self.array()?;
        Ok(match kind {
            DIRECTORY | FILE => {
                let [name_len] = self.array()?;
                let attributes = Attributes {
                    mode: u16::from_le_bytes(self.array()?),
                    seconds: i64::from_le_bytes(self.array()?),
                    nanoseconds: u32::from_le_bytes(self.array()?),
                };
                if attributes.mode > 0o777 || attributes.nanoseconds >= 1_000_000_000 {
                    return Err(Broken::Breach(Breach::BadAttributes));
                }
                let name = self.bytes(name_len.into())?;
                if kind == FILE {
                    Record::File { name, attributes }
                } else {
                    Record::Directory { name, attributes }
                }
            }
            SYMLINK => {
                let [name_len] = self.array()?;
                let target_len: usize = u16::from_le_bytes(self.array()?).into();
                if target_len == 0 || target_len > MAX_TARGET {
                    return Err(Broken::Breach(Breach::BadTarget));
                }
                let name = self.bytes(name_len.into())?;
                let target = self.bytes(target_len)?;
                if target.contains(&0) {
                    return Err(Broken::Breach(Breach::BadTarget));
                }
                Record::Symlink { name, target }
            }
            DATA => Record::Data {
                offset: u64::from_le_bytes(self.array()?),
                len: u32::from_le_bytes(self.array()?),
            },
            END_OF_FILE => Record::EndOfFile { size: u64::from_le_bytes(self.array()?) },
            END_OF_DIRECTORY => Record::EndOfDirectory,
            _ => return Err(Broken::Breach(Breach::UnknownKind(kind))),
        })
    }

    /// Takes up to `max` bytes, at least one.
    pub fn some(&mut self, max: usize) -> Result<&[u8], Broken> {
        if self.unread.is_empty() {
            self.unread = 0..0;
            self.read_more()?;
        }
        let len = max.min(self.unread.len());
        let start = self.unread.start;
        self.unread.start += len;
        Ok(&self.buffer[start..start + len])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Broken> {
        let mut array = [0; N];
        self.exact(&mut array)?;
        Ok(array)
    }

    /// `len` is that of a name or target: small enough to allocate before the bytes are there.
    fn bytes(&mut self, len: usize) -> Result<Vec<u8>, Broken> {
        let mut bytes = vec![0; len];
        self.exact(&mut bytes)?;
        Ok(bytes)
    }

    fn exact(&mut self, mut out: &mut [u8]) -> Result<(), Broken> {
        while !out.is_empty() {
            let bytes = self.some(out.len())?;
            let (head, tail) = out.split_at_mut(bytes.len());
            head.copy_from_slice(bytes);
            out = tail;
        }
        Ok(())
    }

    fn read_more(&mut self) -> Result<(), Broken> {
        loop {
            match self.reader.read(&mut self.buffer) {
                Ok(0) => return Err(Broken::EndedEarly),
                Ok(len) => {
                    self.unread.end = len.min(BUFFER);
                    return Ok(());
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(Broken::Stream(error)),
            }
        }
    }
}

#[cfg(test)]
#[path = "record_test.rs"]
mod tests;
