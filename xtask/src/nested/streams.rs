//! The streams between this process and the emulated machine, a thread each.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::sync::mpsc::Sender;

use chitin_nested_init::Report;

/// The last bytes of the console that are kept for an error message.
const CONSOLE_LIMIT: usize = 256 << 10;

/// An event for the thread that waits for the end.
pub enum Event {
    /// PID 1 reports progress.
    Report(Report),
    /// This many bytes in total of stdout (0) or stderr (1) were passed on.
    Output(usize, u64),
    /// Our own output has no reader any more.
    BrokenPipe,
    /// QEMU has closed the control port: it has ended.
    Gone,
}

/// Keeps the last bytes of a source, and prints all of it if `verbose`.
pub fn keep_tail(mut source: Box<dyn Read + Send>, tail: &Mutex<VecDeque<u8>>, verbose: bool) {
    let mut buffer = [0; 4096];
    while let Ok(len @ 1..) = source.read(&mut buffer) {
        if verbose {
            let _ = io::stderr().write_all(&buffer[..len]);
        }
        let Ok(mut tail) = tail.lock() else { return };
        tail.extend(&buffer[..len]);
        let excess = tail.len().saturating_sub(CONSOLE_LIMIT);
        tail.drain(..excess);
    }
}

/// Sends an event for each report of PID 1, and one for the end of QEMU.
pub fn read_reports(control: UnixStream, events: &Sender<Event>) {
    let lines = BufReader::new(control).lines();
    for report in lines.map_while(Result::ok).filter_map(|line| line.parse().ok()) {
        if events.send(Event::Report(report)).is_err() {
            return;
        }
    }
    let _ = events.send(Event::Gone);
}

/// Copies output of the command, and sends an event for each piece.
pub fn pass_output(
    stream: usize,
    mut from: UnixStream,
    mut to: impl Write,
    events: &Sender<Event>,
) {
    let mut buffer = vec![0; 64 << 10];
    let mut total = 0;
    while let Ok(len @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..len]).and_then(|()| to.flush()).is_err() {
            let _ = events.send(Event::BrokenPipe);
            return;
        }
        total += len as u64;
        if events.send(Event::Output(stream, total)).is_err() {
            return;
        }
    }
}

/// Copies our standard input to the command, and announces its end on the control port.
pub fn send_input(mut port: UnixStream, mut control: UnixStream) {
    let mut buffer = vec![0; 64 << 10];
    let mut total = 0u64;
    let mut stdin = io::stdin().lock();
    loop {
        match stdin.read(&mut buffer) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            // An unreadable standard input counts as ended.
            Ok(0) | Err(_) => break,
            Ok(len) if port.write_all(&buffer[..len]).is_err() => return,
            Ok(len) => total += len as u64,
        }
    }
    let _ = control.write_all(format!("eof {total}\n").as_bytes());
    // The port itself stays open: to the guest, a closed one would mean that the host has gone.
    std::mem::forget(port);
}
