use std::os::fd::OwnedFd;

use rustix::fs::ftruncate;
use rustix::io::{Errno, pwrite};

use crate::current_path::CurrentPath;
use crate::record::{Record, RecordReader};
use crate::{Error, FormatError, Limit};

/// The limit on the sum of all file sizes.
pub(crate) struct SizeLimit {
    /// The sum of the sizes of all complete files.
    pub used: u64,
    pub max: u64,
}

impl SizeLimit {
    /// Returns `size` if it is a possible file size, and one more file of it is within the limit.
    /// `None` is a size that overflowed.
    fn check(&self, size: Option<u64>, current: &CurrentPath) -> Result<u64, Error> {
        let size = size.filter(|&size| i64::try_from(size).is_ok());
        let size = size.ok_or_else(|| current.format_error(FormatError::InvalidData))?;
        if self.used.saturating_add(size) > self.max {
            return Err(current.limit_error(Limit::Bytes(self.max)));
        }
        Ok(size)
    }
}

/// The size of a received file, in bytes.
pub(crate) struct Received {
    /// The size including holes.
    pub size: u64,
    /// The size of the data.
    pub data: u64,
}

/// Reads the data and the end of a file, and writes the data to `fd`.
pub(crate) fn receive_file_data(
    input: &mut RecordReader<'_>,
    fd: &OwnedFd,
    limit: &SizeLimit,
    current: &CurrentPath,
) -> Result<Received, Error> {
    let mut received = Received { size: 0, data: 0 };
    loop {
        match input.read_record().map_err(|error| error.at(current))? {
            Record::Data { offset, len } if len > 0 && offset >= received.size => {
                let end = limit.check(offset.checked_add(len.into()), current)?;
                copy_range(input, fd, offset, end, current)?;
                received.size = end;
                received.data += u64::from(len);
            }
            Record::EndOfFile { size } if size >= received.size => {
                limit.check(Some(size), current)?;
                if size > received.size {
                    ftruncate(fd, size).map_err(current.filesystem_error("set the size of"))?;
                    received.size = size;
                }
                return Ok(received);
            }
            Record::Data { .. } | Record::EndOfFile { .. } => {
                return Err(current.format_error(FormatError::InvalidData));
            }
            other => {
                return Err(current.format_error(FormatError::MisplacedRecord(other.kind())));
            }
        }
    }
}

/// Copies the bytes from `offset` to `end` as they arrive.
fn copy_range(
    input: &mut RecordReader<'_>,
    fd: &OwnedFd,
    mut offset: u64,
    end: u64,
    current: &CurrentPath,
) -> Result<(), Error> {
    while offset < end {
        let max = usize::try_from(end - offset).unwrap_or(usize::MAX);
        let mut bytes = input.read_chunk(max).map_err(|error| error.at(current))?;
        while !bytes.is_empty() {
            match pwrite(fd, bytes, offset) {
                Ok(0) => return Err(current.filesystem_error("write")(Errno::IO)),
                Ok(len) => {
                    bytes = &bytes[len..];
                    offset += len as u64;
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(current.filesystem_error("write")(errno)),
            }
        }
    }
    Ok(())
}
