//! The host's end of the protocol that `benches/peer/` serves.

use std::io;
use std::time::Instant;

use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};

/// The vsock port that both ends use.
pub const PORT: u32 = 1024;

/// The byte that the guest sends first on each connection.
const HELLO: u8 = b'h';

const BUFFER_SIZE: usize = 64 * 1024;

/// A command that has run in a guest.
pub struct CommandResult {
    /// The time at which its first byte was read.
    pub output: Instant,
    /// The time at which its exit code was read.
    pub exit: Instant,
    /// It has printed at least one byte.
    pub has_printed: bool,
    /// Its exit code.
    pub code: u8,
}

/// A connection with a guest that has sent its hello.
pub struct GuestConnection<S>(BufReader<S>);

impl<S: AsyncRead + AsyncWrite + Unpin> GuestConnection<S> {
    /// Waits for the hello on a connection that the guest has made.
    pub async fn accept(stream: S) -> io::Result<Self> {
        Self::wait_for_hello(BufReader::new(stream)).await
    }

    /// Dials the port of the guest over a Unix socket of Firecracker and waits for the hello.
    pub async fn dial(mut stream: S) -> io::Result<Self> {
        stream.write_all(format!("CONNECT {PORT}\n").as_bytes()).await?;
        let mut stream = BufReader::new(stream);
        let mut line = Vec::new();
        stream.read_until(b'\n', &mut line).await?;
        if !line.starts_with(b"OK ") {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        Self::wait_for_hello(stream).await
    }

    async fn wait_for_hello(mut stream: BufReader<S>) -> io::Result<Self> {
        match stream.read_u8().await? {
            HELLO => Ok(Self(stream)),
            _ => Err(protocol_error()),
        }
    }

    /// Runs a command, encoded as words that end in NUL.
    pub async fn run(&mut self, command: &[u8]) -> io::Result<CommandResult> {
        self.send_request(b'x', command.len(), command).await?;
        let has_printed = self.0.fill_buf().await?.first().is_some_and(|byte| *byte != 0);
        let output = Instant::now();
        let mut text = Vec::new();
        if self.0.read_until(0, &mut text).await? == 0 || text.last() != Some(&0) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let code = self.0.read_u8().await?;
        Ok(CommandResult { output, exit: Instant::now(), has_printed, code })
    }

    /// Sends this many bytes and waits until the guest has read them.
    pub async fn send_bytes(&mut self, count: usize) -> io::Result<()> {
        let buffer = vec![0x5a; BUFFER_SIZE];
        self.send_request(b'w', count, &[]).await?;
        let mut left = count;
        while left > 0 {
            let count = left.min(buffer.len());
            self.0.get_mut().write_all(&buffer[..count]).await?;
            left -= count;
        }
        match self.0.read_u8().await? {
            b'w' => Ok(()),
            _ => Err(protocol_error()),
        }
    }

    /// Receives this many bytes and returns the time at which the first arrived.
    pub async fn receive_bytes(&mut self, count: usize) -> io::Result<Instant> {
        let mut buffer = vec![0; BUFFER_SIZE];
        self.send_request(b'r', count, &[]).await?;
        let mut first = None;
        let mut left = count;
        while left > 0 {
            let count = left.min(buffer.len());
            match self.0.read(&mut buffer[..count]).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => left -= read,
            }
            first.get_or_insert_with(Instant::now);
        }
        first.ok_or_else(protocol_error)
    }

    async fn send_request(&mut self, kind: u8, length: usize, rest: &[u8]) -> io::Result<()> {
        let length = u32::try_from(length).map_err(|_| io::ErrorKind::InvalidInput)?;
        let bytes = [&[kind], &length.to_le_bytes()[..], rest].concat();
        self.0.get_mut().write_all(&bytes).await
    }
}

fn protocol_error() -> io::Error {
    let reason = "unexpected answer: the guest's init is not that of this root image";
    io::Error::new(io::ErrorKind::InvalidData, reason)
}
