//! The serial console: a 16550 whose output goes to the monitor's standard error. A guest has one
//! only if the specification asks for it.

use std::io::{self, Write};
use std::os::fd::AsFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;

/// The longest output that is written in one piece; a line is written when it ends. A pipe takes as
/// much without blocking if it takes anything (`PIPE_BUF` is 4096).
const LINE_BYTES: usize = 1024;

/// The console's interrupt line.
pub struct SerialInterrupt(pub EventFd);

impl Trigger for SerialInterrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The serial console.
pub struct Console(Serial<SerialInterrupt, NoEvents, LineWriter<io::Stderr>>);

impl Console {
    /// Creates a console that writes to standard error.
    pub fn new(interrupt: SerialInterrupt) -> Self {
        Self(Serial::new(interrupt, LineWriter::new(io::stderr())))
    }
}

impl BusDevice for Console {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for byte in data {
            *byte = self.0.read(u8::try_from(offset).unwrap_or(u8::MAX));
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for byte in data {
            // Output that cannot be written is lost: better than a vCPU that waits.
            let _ = self.0.write(u8::try_from(offset).unwrap_or(u8::MAX), *byte);
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = self.0.writer_mut().write_line();
    }
}

/// Collects bytes into lines. Output that the reader has no room for is dropped: a vCPU never waits
/// for a terminal.
struct LineWriter<W> {
    out: W,
    line: Vec<u8>,
}

impl<W: Write + AsFd> LineWriter<W> {
    fn new(out: W) -> Self {
        Self { out, line: Vec::with_capacity(LINE_BYTES) }
    }

    fn write_line(&mut self) -> io::Result<()> {
        let mut fds = [PollFd::new(&self.out, PollFlags::OUT)];
        let has_room = poll(&mut fds, Some(&Timespec::default())) == Ok(1);
        let result = if has_room { self.out.write_all(&self.line) } else { Ok(()) };
        self.line.clear();
        result
    }
}

impl<W: Write + AsFd> Write for LineWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            // A terminal would obey other bytes, and a guest chooses them. Kernels log in ASCII. Their
            // carriage returns are dropped: in a line, one lets the rest replace its beginning.
            if *byte == b'\r' {
                continue;
            }
            self.line.push(match *byte {
                b'\n' | b'\t' | b' '..=b'~' => *byte,
                _ => b'?',
            });
            if *byte == b'\n' || self.line.len() >= LINE_BYTES {
                self.write_line()?;
            }
        }
        Ok(bytes.len())
    }

    // vm-superio flushes after every byte.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn output_is_written_in_lines() {
        let (mut reader, writer) = UnixStream::pair().unwrap();
        LineWriter::new(writer).write_all(b"one\ntw").unwrap();
        let mut bytes = [0; 8];
        assert_eq!(reader.read(&mut bytes).unwrap(), 4);
    }

    #[test]
    fn control_bytes_of_a_guest_are_replaced() {
        let (mut reader, writer) = UnixStream::pair().unwrap();
        LineWriter::new(writer).write_all(b"a\x1b]0;x\x07\tb\x9b\xe2\x80\xae\r\n").unwrap();
        let mut bytes = [0; 32];
        let len = reader.read(&mut bytes).unwrap();
        assert_eq!(&bytes[..len], b"a?]0;x?\tb????\n");
    }

    #[test]
    fn output_without_a_reader_is_dropped() {
        let (_reader, writer) = UnixStream::pair().unwrap();
        let mut lines = LineWriter::new(writer);
        // Far more than a socket holds: this must return.
        for _ in 0..10_000 {
            lines.write_all(&[b'x'; 1024]).unwrap();
        }
    }
}
