//! Records: the units of the format, their encoding, and a reader that decodes them.

use std::io::{ErrorKind, Read};
use std::ops::Range;

use crate::current_path::CurrentPath;
use crate::left_out::LeftOut;
use crate::{Error, FormatError, Limit, MAX_TARGET};

/// The length of a data record without its data.
pub(crate) const DATA_HEADER_LEN: usize = 1 + 8 + 4;

/// The size of the buffers of reader and writer: few system calls, and two frames of the channel.
pub(crate) const BUFFER_LEN: usize = 128 * 1024;

const DIRECTORY: u8 = 1;
const FILE: u8 = 2;
const SYMLINK: u8 = 3;
const DATA: u8 = 4;
const END_OF_FILE: u8 = 5;
const END_OF_DIRECTORY: u8 = 6;
const LEFT_OUT: u8 = 7;

/// The attributes of a file or directory that a copy preserves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Attributes {
    /// The permission bits, at most `0o777`.
    pub mode: u16,
    /// The modification time in seconds since 1970.
    pub seconds: i64,
    /// The nanoseconds of the modification time, below a billion.
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
    /// `len` bytes of data follow the record.
    Data {
        offset: u64,
        len: u32,
    },
    EndOfFile {
        size: u64,
    },
    EndOfDirectory,
    /// An entry that exists and is not sent.
    LeftOut {
        name: Vec<u8>,
        kind: LeftOut,
    },
}

impl Record {
    /// Appends the record to `out`. Fails for a name or target that is longer than Linux allows,
    /// which some file systems permit.
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
            Record::LeftOut { name, kind } => {
                out.push(name_len(name)?);
                out.push(kind.code());
                out.extend_from_slice(name);
            }
        }
        Ok(())
    }

    /// Returns the first byte of the encoded record.
    pub fn kind(&self) -> u8 {
        match self {
            Record::Directory { .. } => DIRECTORY,
            Record::File { .. } => FILE,
            Record::Symlink { .. } => SYMLINK,
            Record::Data { .. } => DATA,
            Record::EndOfFile { .. } => END_OF_FILE,
            Record::EndOfDirectory => END_OF_DIRECTORY,
            Record::LeftOut { .. } => LEFT_OUT,
        }
    }
}

/// The reason why there is no next record.
#[derive(Debug)]
pub(crate) enum ReadError {
    Format(FormatError),
    EndedEarly,
    Stream(std::io::Error),
}

impl ReadError {
    /// Returns the error of a copy that was at `current`.
    pub fn at(self, current: &CurrentPath) -> Error {
        match self {
            ReadError::Format(error) => current.format_error(error),
            ReadError::EndedEarly => Error::EndedEarly { path: current.to_path_buf() },
            ReadError::Stream(error) => Error::Stream(error),
        }
    }
}

/// Reads records through a buffer of fixed size, independent of the announced lengths.
pub(crate) struct RecordReader<'a> {
    reader: &'a mut dyn Read,
    buffer: Vec<u8>,
    /// The part of `buffer` that was read from `reader` and not yet taken.
    unread: Range<usize>,
}

impl<'a> RecordReader<'a> {
    pub fn new(reader: &'a mut dyn Read) -> RecordReader<'a> {
        RecordReader { reader, buffer: vec![0; BUFFER_LEN], unread: 0..0 }
    }

    /// Reads the next record and checks each field as far as possible without its context.
    pub fn read_record(&mut self) -> Result<Record, ReadError> {
        let [kind] = self.read_array()?;
        Ok(match kind {
            DIRECTORY | FILE => {
                let [name_len] = self.read_array()?;
                let attributes = Attributes {
                    mode: u16::from_le_bytes(self.read_array()?),
                    seconds: i64::from_le_bytes(self.read_array()?),
                    nanoseconds: u32::from_le_bytes(self.read_array()?),
                };
                if attributes.mode > 0o777 || attributes.nanoseconds >= 1_000_000_000 {
                    return Err(ReadError::Format(FormatError::InvalidAttributes));
                }
                let name = self.read_bytes(name_len.into())?;
                if kind == FILE {
                    Record::File { name, attributes }
                } else {
                    Record::Directory { name, attributes }
                }
            }
            SYMLINK => {
                let [name_len] = self.read_array()?;
                let target_len: usize = u16::from_le_bytes(self.read_array()?).into();
                if target_len == 0 || target_len > MAX_TARGET {
                    return Err(ReadError::Format(FormatError::InvalidTarget));
                }
                let name = self.read_bytes(name_len.into())?;
                let target = self.read_bytes(target_len)?;
                if target.contains(&0) {
                    return Err(ReadError::Format(FormatError::InvalidTarget));
                }
                Record::Symlink { name, target }
            }
            DATA => Record::Data {
                offset: u64::from_le_bytes(self.read_array()?),
                len: u32::from_le_bytes(self.read_array()?),
            },
            END_OF_FILE => Record::EndOfFile { size: u64::from_le_bytes(self.read_array()?) },
            END_OF_DIRECTORY => Record::EndOfDirectory,
            LEFT_OUT => {
                let [name_len, code] = self.read_array()?;
                let kind = LeftOut::from_code(code)
                    .ok_or(ReadError::Format(FormatError::UnknownLeftOut(code)))?;
                Record::LeftOut { name: self.read_bytes(name_len.into())?, kind }
            }
            _ => return Err(ReadError::Format(FormatError::UnknownRecord(kind))),
        })
    }

    /// Takes between one and `max` bytes, without waiting for more than one.
    pub fn read_chunk(&mut self, max: usize) -> Result<&[u8], ReadError> {
        if self.unread.is_empty() {
            self.unread = 0..0;
            self.fill_buffer()?;
        }
        let len = max.min(self.unread.len());
        let start = self.unread.start;
        self.unread.start += len;
        Ok(&self.buffer[start..start + len])
    }

    fn read_array<const N: usize>(&mut self) -> Result<[u8; N], ReadError> {
        let mut array = [0; N];
        self.read_exact(&mut array)?;
        Ok(array)
    }

    /// Reads a name or target, whose `len` is small enough to allocate before the bytes arrive.
    fn read_bytes(&mut self, len: usize) -> Result<Vec<u8>, ReadError> {
        let mut bytes = vec![0; len];
        self.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn read_exact(&mut self, mut out: &mut [u8]) -> Result<(), ReadError> {
        while !out.is_empty() {
            let bytes = self.read_chunk(out.len())?;
            let (head, tail) = out.split_at_mut(bytes.len());
            head.copy_from_slice(bytes);
            out = tail;
        }
        Ok(())
    }

    fn fill_buffer(&mut self) -> Result<(), ReadError> {
        loop {
            match self.reader.read(&mut self.buffer) {
                Ok(0) => return Err(ReadError::EndedEarly),
                Ok(len) => {
                    self.unread.end = len.min(BUFFER_LEN);
                    return Ok(());
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(ReadError::Stream(error)),
            }
        }
    }
}

#[cfg(test)]
#[path = "record_test.rs"]
mod tests;
