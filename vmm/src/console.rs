//! The serial console: a 16550 UART whose output goes to the monitor's standard error. It exists
//! only in guests that ask for a console.

use std::io::{self, Write};
use std::os::fd::AsFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;

/// The longest output that is written in one piece; a shorter line is written at its end. A pipe
/// that is writable accepts this much without blocking (`PIPE_BUF` is 4096).
const LINE_BYTES: usize = 1024;

/// The interrupt line of the UART.
pub struct Line(pub EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The UART.
pub struct Console(Serial<Line, NoEvents, LineWriter<io::Stderr>>);

impl Console {
    /// Makes a console that writes to standard error.
    pub fn new(line: Line) -> Self {
        let out = LineWriter { out: io::stderr(), line: Vec::with_capacity(LINE_BYTES) };
        Self(Serial::new(line, out))
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
            // On an error the output of the guest is lost; its vCPU continues.
            let _ = self.0.write(u8::try_from(offset).unwrap_or(u8::MAX), *byte);
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = self.0.writer_mut().write_line();
    }
}

/// Collects bytes into lines. A line that the reader has no room for is dropped: a vCPU never waits
/// for a terminal.
struct LineWriter<W> {
    out: W,
    line: Vec<u8>,
}

impl<W: Write + AsFd> LineWriter<W> {
    fn write_line(&mut self) -> io::Result<()> {
        let mut polls = [PollFd::new(&self.out, PollFlags::OUT)];
        let no_wait = Timespec { tv_sec: 0, tv_nsec: 0 };
        let is_ready = poll(&mut polls, Some(&no_wait)) == Ok(1);
        let result = if is_ready { self.out.write_all(&self.line) } else { Ok(()) };
        self.line.clear();
        result
    }
}

impl<W: Write + AsFd> Write for LineWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            self.line.push(*byte);
            if *byte == b'\n' || self.line.len() >= LINE_BYTES {
                self.write_line()?;
            }
        }
        Ok(bytes.len())
    }

    // vm-superio flushes after every byte, which must not end a line.
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
    fn output_is_written_in_lines_and_never_blocks() {
        let (mut reader, writer) = UnixStream::pair().unwrap();
        let mut lines = LineWriter { out: writer, line: Vec::new() };
        lines.write_all(b"one\ntw").unwrap();
        let mut bytes = [0; 8];
        assert_eq!(reader.read(&mut bytes).unwrap(), 4);
        // Returns although this is far more than a socket holds, and the reader does not read.
        for _ in 0..10_000 {
            lines.write_all(&[b'x'; 1024]).unwrap();
        }
    }
}
