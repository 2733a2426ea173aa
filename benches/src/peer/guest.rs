//! The host's end of what `benches/peer/` serves.

use std::io;
use std::time::Instant;

use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};

/// The vsock port that both ends agree on.
pub const PORT: u32 = 1024;

const PIECE: usize = 64 * 1024;

/// A command that has run.
pub struct Ran {
    /// When its first byte was read.
    pub output: Instant,
    /// When its end was read.
    pub exit: Instant,
    /// Whether it printed anything.
    pub printed: bool,
    /// Its exit code.
    pub code: u8,
}

/// A connection with a guest that has said that it is there.
pub struct Conversation<S>(BufReader<S>);

impl<S: AsyncRead + AsyncWrite + Unpin> Conversation<S> {
    /// Waits for the guest's first byte.
    pub async fn begin(stream: S) -> io::Result<Self> {
        let mut stream = BufReader::new(stream);
        match stream.read_u8().await? {
            b'h' => Ok(Self(stream)),
            _ => Err(unexpected()),
        }
    }

    /// The same over a socket of Firecracker's that leads to whatever the guest listens on.
    pub async fn connect(mut stream: S) -> io::Result<Self> {
        stream.write_all(format!("CONNECT {PORT}\n").as_bytes()).await?;
        let mut stream = BufReader::new(stream);
        let mut line = Vec::new();
        stream.read_until(b'\n', &mut line).await?;
        if !line.starts_with(b"OK ") {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        match stream.read_u8().await? {
            b'h' => Ok(Self(stream)),
            _ => Err(unexpected()),
        }
    }

    /// Runs a command, given as words that end in NUL.
    pub async fn run(&mut self, words: &[u8]) -> io::Result<Ran> {
        self.request(b'x', words.len(), words).await?;
        let printed = self.0.fill_buf().await?.first().is_some_and(|byte| *byte != 0);
        let output = Instant::now();
        let mut text = Vec::new();
        if self.0.read_until(0, &mut text).await? == 0 || text.last() != Some(&0) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let code = self.0.read_u8().await?;
        Ok(Ran { output, exit: Instant::now(), printed, code })
    }

    /// Sends so many bytes, and waits until the guest has read them.
    pub async fn send(&mut self, bytes: usize) -> io::Result<()> {
        let piece = vec![0x5a; PIECE];
        self.request(b'w', bytes, &[]).await?;
        let mut left = bytes;
        while left > 0 {
            let count = left.min(piece.len());
            self.0.get_mut().write_all(&piece[..count]).await?;
            left -= count;
        }
        match self.0.read_u8().await? {
            b'w' => Ok(()),
            _ => Err(unexpected()),
        }
    }

    /// Reads so many bytes; returns when the first of them was there.
    pub async fn receive(&mut self, bytes: usize) -> io::Result<Instant> {
        let mut piece = vec![0; PIECE];
        self.request(b'r', bytes, &[]).await?;
        let mut first = None;
        let mut left = bytes;
        while left > 0 {
            let count = left.min(piece.len());
            match self.0.read(&mut piece[..count]).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => left -= read,
            }
            first.get_or_insert_with(Instant::now);
        }
        first.ok_or_else(unexpected)
    }

    async fn request(&mut self, kind: u8, length: usize, rest: &[u8]) -> io::Result<()> {
        let length = u32::try_from(length).map_err(|_| io::ErrorKind::InvalidInput)?;
        let bytes = [&[kind], &length.to_le_bytes()[..], rest].concat();
        self.0.get_mut().write_all(&bytes).await
    }
}

fn unexpected() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "the guest's program is not the one of this root image",
    )
}
