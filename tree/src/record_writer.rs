use std::io::Write;
use std::os::fd::OwnedFd;

use rustix::fs::{SeekFrom, Stat, fstat, seek};
use rustix::io::{Errno, pread};

use crate::Error;
use crate::current_path::CurrentPath;
use crate::record::{BUFFER_LEN, DATA_HEADER_LEN, Record};

/// Writes records and file data through a buffer of fixed size.
pub(crate) struct RecordWriter<'a> {
    writer: &'a mut dyn Write,
    buffer: Vec<u8>,
    /// The number of bytes in `buffer` that wait to be written.
    used: usize,
    /// Holds one encoded record on its way into `buffer`.
    encoded: Vec<u8>,
}

impl<'a> RecordWriter<'a> {
    pub fn new(writer: &'a mut dyn Write) -> RecordWriter<'a> {
        RecordWriter { writer, buffer: vec![0; BUFFER_LEN], used: 0, encoded: Vec::new() }
    }

    pub fn write_record(&mut self, record: &Record, current: &CurrentPath) -> Result<(), Error> {
        self.encoded.clear();
        record.encode(&mut self.encoded).map_err(|limit| current.limit_error(limit))?;
        self.reserve_buffer(self.encoded.len())?;
        let end = self.used + self.encoded.len();
        self.buffer[self.used..end].copy_from_slice(&self.encoded);
        self.used = end;
        Ok(())
    }

    /// Writes the data and the end of a file, and returns the number of data bytes.
    pub fn write_contents(
        &mut self,
        fd: &OwnedFd,
        stat: &Stat,
        current: &CurrentPath,
    ) -> Result<u64, Error> {
        let mut size = u64::try_from(stat.st_size).unwrap_or_default();
        // Most files have no holes, which saves the system calls to search for them.
        let has_holes =
            u64::try_from(stat.st_blocks).unwrap_or_default().saturating_mul(512) < size;
        let (mut at, mut sent) = (0, 0);
        while at < size {
            let range =
                if has_holes { next_data_range(fd, at, size) } else { Ok(Some((at, size))) };
            let end;
            (at, end) = match range {
                Ok(Some(range)) => range,
                Ok(None) => {
                    // The rest is a hole, unless the file has shrunk meanwhile.
                    let now = fstat(fd).map_err(current.filesystem_error("examine"))?.st_size;
                    size = size.min(u64::try_from(now).unwrap_or_default()).max(at);
                    break;
                }
                Err(errno) => return Err(current.filesystem_error("look for holes in")(errno)),
            };
            while at < end {
                let len = self.write_data(fd, at, end - at, current)?;
                if len == 0 {
                    // The file has shrunk.
                    size = at;
                    break;
                }
                at += len;
                sent += len;
            }
        }
        self.write_record(&Record::EndOfFile { size }, current)?;
        Ok(sent)
    }

    /// Writes up to `max` bytes of the file at `offset`, and returns their number, which is 0 at
    /// the end of the file.
    fn write_data(
        &mut self,
        fd: &OwnedFd,
        offset: u64,
        max: u64,
        current: &CurrentPath,
    ) -> Result<u64, Error> {
        let room = BUFFER_LEN - DATA_HEADER_LEN;
        let len = usize::try_from(max).unwrap_or(room).min(room);
        self.reserve_buffer(DATA_HEADER_LEN + len)?;
        // The data is read to its final place, and its header is written once its length is known.
        let body = self.used + DATA_HEADER_LEN;
        let read = loop {
            match pread(fd, &mut self.buffer[body..body + len], offset) {
                Err(Errno::INTR) => {}
                result => break result.map_err(current.filesystem_error("read"))?,
            }
        };
        if let Some(len) = u32::try_from(read).ok().filter(|&len| len > 0) {
            self.write_record(&Record::Data { offset, len }, current)?;
            self.used += read;
        }
        Ok(read as u64)
    }

    /// Makes room for `len` bytes, at most [`BUFFER_LEN`].
    fn reserve_buffer(&mut self, len: usize) -> Result<(), Error> {
        if BUFFER_LEN - self.used >= len {
            return Ok(());
        }
        let written = self.writer.write_all(&self.buffer[..self.used]);
        self.used = 0;
        written.map_err(Error::Stream)
    }

    pub fn flush(&mut self) -> Result<(), Error> {
        self.reserve_buffer(BUFFER_LEN)?;
        self.writer.flush().map_err(Error::Stream)
    }
}

/// Returns the next range that is not a hole, or `None` if only a hole is left.
fn next_data_range(fd: &OwnedFd, at: u64, size: u64) -> Result<Option<(u64, u64)>, Errno> {
    let start = match seek(fd, SeekFrom::Data(at)) {
        Ok(start) => start.max(at),
        Err(Errno::NXIO) => return Ok(None),
        // This file system does not report holes.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some((at, size))),
        Err(errno) => return Err(errno),
    };
    if start >= size {
        return Ok(None);
    }
    let end = seek(fd, SeekFrom::Hole(start))?.min(size);
    Ok(Some((start, if end > start { end } else { size })))
}
