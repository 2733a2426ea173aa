//! The serial console: a 16550 whose output goes to the monitor's standard error. There only when asked for.

use std::io::{self, Write};
use std::os::fd::AsRawFd;

use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;

/// Output is passed on a line at a time, or this much; a pipe takes as much in one piece without blocking if it takes
/// anything (`PIPE_BUF` is 4096).
const LINE_BYTES: usize = 1024;

/// The line to the guest's interrupt controller.
pub struct Line(pub EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The device.
pub struct Console(Serial<Line, NoEvents, Lines<io::Stderr>>);

impl Console {
    /// A console that writes to standard error.
    pub fn new(line: Line) -> Self {
        Self(Serial::new(line, Lines { out: io::stderr(), line: Vec::with_capacity(LINE_BYTES) }))
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
            // The guest's output is lost rather than its vCPU stuck.
            let _ = self.0.write(u8::try_from(offset).unwrap_or(u8::MAX), *byte);
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = self.0.writer_mut().pass_on();
    }
}

/// Collects bytes into lines. What the reader has no room for is dropped: a vCPU never waits for a terminal.
struct Lines<W> {
    out: W,
    line: Vec<u8>,
}

impl<W: Write + AsRawFd> Lines<W> {
    fn pass_on(&mut self) -> io::Result<()> {
        let mut poll = libc::pollfd { fd: self.out.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
        // SAFETY: one valid entry, and the call returns at once.
        let ready = unsafe { libc::poll(&raw mut poll, 1, 0) };
        let result = if ready == 1 { self.out.write_all(&self.line) } else { Ok(()) };
        self.line.clear();
        result
    }
}

impl<W: Write + AsRawFd> Write for Lines<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            self.line.push(*byte);
            if *byte == b'\n' || self.line.len() >= LINE_BYTES {
                self.pass_on()?;
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
    fn output_comes_in_lines_and_a_full_reader_loses_it() {
        let (mut reader, writer) = UnixStream::pair().unwrap();
        let mut lines = Lines { out: writer, line: Vec::new() };
        lines.write_all(b"one\ntw").unwrap();
        let mut bytes = [0; 8];
        assert_eq!(reader.read(&mut bytes).unwrap(), 4);
        // Far more than a socket holds, and nobody reads: this returns.
        for _ in 0..10_000 {
            lines.write_all(&[b'x'; 1024]).unwrap();
        }
    }
}
