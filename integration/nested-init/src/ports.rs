//! The virtio-serial ports, and the threads that copy between them and the command.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::thread;
use std::time::Duration;

use chitin_nested_init::{Launch, MAX_LAUNCH_LEN};
use rustix::event::{PollFd, PollFlags, poll};

use crate::failure::{During, Failure, Result};

/// Ports appear some time after their device.
const PORT_TRIES: u32 = 1000;
const PORT_DELAY: Duration = Duration::from_millis(5);

/// The largest write of a port.
const PIECE_BYTES: usize = 32 << 10;

/// A longer line on the control port is cut: the longest announces a 64-bit number.
const MAX_LINE_BYTES: usize = 64;

/// Opens the port of that name.
pub fn open_port(name: &str) -> Result<File> {
    for _ in 0..PORT_TRIES {
        if let Some(node) = find_port(name) {
            return OpenOptions::new()
                .read(true)
                .write(true)
                .open(Path::new("/dev").join(node))
                .during(|| format!("open port {name}"));
        }
        thread::sleep(PORT_DELAY);
    }
    Err(Failure::of_host(format!("no virtio port {name} appeared within 5 s")))
}

fn find_port(name: &str) -> Option<OsString> {
    fs::read_dir("/sys/class/virtio-ports").ok()?.flatten().find_map(|entry| {
        let found = fs::read_to_string(entry.path().join("name")).ok()?;
        (found.trim_end() == name).then(|| entry.file_name())
    })
}

/// Reads the launch message from the control port. A port reports no end of file while the host
/// lives, so the message has its length in front.
pub fn read_launch(control: &mut File) -> Result<Launch> {
    let step = || "read the launch message".to_owned();
    let mut len = [0; 4];
    control.read_exact(&mut len).during(step)?;
    let len = u32::from_le_bytes(len);
    if len > MAX_LAUNCH_LEN {
        return Err(Failure::of_host(format!("a launch message of {len} bytes is too long")));
    }
    let mut bytes = vec![0; usize::try_from(len).during(step)?];
    control.read_exact(&mut bytes).during(step)?;
    Launch::decode(&bytes).during(step)
}

/// Copies output to its port until the pipe ends, or until it is empty and the command has ended
/// (`done` hangs up): a background process that still holds the pipe delays nothing. Returns the
/// number of bytes.
pub fn copy_output(mut pipe: impl Read + AsFd, mut port: File, done: impl AsFd) -> u64 {
    let mut buffer = vec![0; PIECE_BYTES];
    let mut total = 0;
    loop {
        let mut fds = [PollFd::new(&pipe, PollFlags::IN), PollFd::new(&done, PollFlags::IN)];
        if poll(&mut fds, None).is_err() {
            continue;
        }
        if fds[0].revents().is_empty() {
            return total;
        }
        match pipe.read(&mut buffer) {
            Ok(0) | Err(_) => return total,
            Ok(len) if port.write_all(&buffer[..len]).is_err() => return total,
            Ok(len) => total += len as u64,
        }
    }
}

/// Copies the stdin port to the command until the control port announces the end. Ends the machine
/// when the host is gone.
pub fn copy_input(mut control: File, mut stdin: File, sink: Option<OwnedFd>) {
    let mut sink = sink.map(File::from);
    let mut buffer = vec![0; PIECE_BYTES];
    let mut line = Vec::new();
    let (mut end, mut total) = (None, 0u64);
    loop {
        if end == Some(total) {
            sink = None;
        }
        let mut fds = [PollFd::new(&control, PollFlags::IN), PollFd::new(&stdin, PollFlags::IN)];
        if poll(&mut fds, None).is_err() {
            continue;
        }
        let [control_events, stdin_events] = [fds[0].revents(), fds[1].revents()];
        if control_events.contains(PollFlags::IN)
            && let Ok(Some(byte)) = read_byte(&mut control)
        {
            end = take_control_byte(byte, &mut line).or(end);
            continue;
        }
        if control_events.contains(PollFlags::HUP) {
            let _ = rustix::system::reboot(rustix::system::RebootCommand::Restart);
            return;
        }
        if stdin_events.contains(PollFlags::IN) {
            let Ok(len) = stdin.read(&mut buffer) else { continue };
            total += len as u64;
            // A command that has closed its stdin, or ended, must not block the host.
            if sink.as_mut().is_some_and(|sink| sink.write_all(&buffer[..len]).is_err()) {
                sink = None;
            }
        }
    }
}

fn read_byte(source: &mut File) -> io::Result<Option<u8>> {
    let mut byte = [0];
    Ok((source.read(&mut byte)? == 1).then_some(byte[0]))
}

/// Adds a byte to the current line. Returns the length of stdin if the line announces it.
fn take_control_byte(byte: u8, line: &mut Vec<u8>) -> Option<u64> {
    if byte != b'\n' {
        if line.len() < MAX_LINE_BYTES {
            line.push(byte);
        }
        return None;
    }
    let text = String::from_utf8_lossy(line).into_owned();
    line.clear();
    text.strip_prefix("eof ")?.parse().ok()
}
