//! Firecracker: booted from a configuration file, which is its fastest way, saved and restored over its API.
//!
//! Each guest has a directory of its own, which is the process's working directory, so that all sockets have the same names in
//! all of them, as a restored guest needs it.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::process::{Child, Command};
use tokio::time::timeout;

use super::guest::{Conversation, PORT, Ran};
use super::{BOOT_LIMIT, Peer, PeerError, Root, failed};

/// What serves in its guests.
const INIT: &str = "/usr/lib/chitin/peer";

const API: &str = "api.sock";
const VSOCK: &str = "v.sock";
const CONFIGURATION: &str = "config.json";
const LOG: &str = "log";

/// How much of its log is shown.
const LOG_BYTES: usize = 600;

/// The largest answer that is read of its API.
const MAX_ANSWER: usize = 64 * 1024;

/// How often it is looked whether the API's socket is there: nobody tells.
const LOOK: Duration = Duration::from_micros(100);

/// A saved guest.
pub struct Saved {
    state: PathBuf,
    memory: PathBuf,
}

/// A running guest. Dropping it ends it.
pub struct Guest {
    child: Child,
    conversation: Conversation<UnixStream>,
    /// When the process was started.
    pub started: Instant,
    /// When the guest's first byte was read.
    pub hello: Instant,
    dir: PathBuf,
}

impl Peer {
    /// Boots a guest.
    pub async fn boot(&self) -> Result<Guest, PeerError> {
        self.boot_with(&["--no-api"]).await
    }

    async fn boot_with(&self, arguments: &[&str]) -> Result<Guest, PeerError> {
        let dir = self.directory()?;
        let json = self.configuration().to_string();
        fs::write(dir.join(CONFIGURATION), json)
            .map_err(failed("write a configuration of Firecracker"))?;
        let listener = UnixListener::bind(dir.join(format!("{VSOCK}_{PORT}")))
            .map_err(failed("listen for a guest of Firecracker"))?;
        let started = Instant::now();
        let mut child =
            self.spawn(&dir, &[arguments, &["--config-file", CONFIGURATION]].concat())?;
        let came = async {
            let (stream, _) = listener.accept().await?;
            Conversation::begin(stream).await
        };
        let conversation = watched(&mut child, &dir, came).await?;
        Ok(Guest { child, conversation, started, hello: Instant::now(), dir })
    }

    /// Boots a guest, has it run a command, and saves it.
    pub async fn save(&self, words: &[u8]) -> Result<Saved, PeerError> {
        let mut guest = self.boot_with(&["--api-sock", API]).await?;
        guest.run(words).await?;
        let saved = Saved { state: guest.dir.join("state"), memory: guest.dir.join("memory") };
        let Guest { mut child, conversation, dir, .. } = guest;
        // A connection does not survive; the guest's listener does.
        drop(conversation);
        let connect = async || {
            UnixStream::connect(dir.join(API))
                .await
                .map_err(failed("connect to the API of Firecracker"))
        };
        let save = json!({
            "snapshot_type": "Full", "snapshot_path": saved.state, "mem_file_path": saved.memory,
        });
        let paused = json!({ "state": "Paused" });
        request(connect().await?, "PATCH", "/vm", &paused, "to pause a guest").await?;
        request(connect().await?, "PUT", "/snapshot/create", &save, "to save a guest").await?;
        child.kill().await.map_err(failed("end Firecracker"))?;
        Ok(saved)
    }

    /// Restores one.
    pub async fn restore(&self, saved: &Saved) -> Result<Guest, PeerError> {
        let dir = self.directory()?;
        let load = json!({
            "snapshot_path": saved.state,
            "mem_backend": { "backend_type": "File", "backend_path": saved.memory },
            "resume_vm": true,
        });
        let api = dir.join(API);
        let started = Instant::now();
        let mut child = self.spawn(&dir, &["--api-sock", API])?;
        let stream = loop {
            if let Ok(stream) = UnixStream::connect(&api).await {
                break stream;
            }
            if let Ok(Some(_)) = child.try_wait() {
                return Err(ended(&dir, "ended"));
            }
            // The one thread there is may sleep: there is nothing else to do.
            std::thread::sleep(LOOK);
        };
        request(stream, "PUT", "/snapshot/load", &load, "to restore a guest").await?;
        let came =
            async { Conversation::connect(UnixStream::connect(dir.join(VSOCK)).await?).await };
        let conversation = watched(&mut child, &dir, came).await?;
        Ok(Guest { child, conversation, started, hello: Instant::now(), dir })
    }

    /// A new directory.
    fn directory(&self) -> Result<PathBuf, PeerError> {
        let failed = failed("make a directory for a guest of Firecracker");
        for number in 0..u32::MAX {
            let dir = self.scratch.0.join(number.to_string());
            match fs::create_dir(&dir) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                made => return made.map(|()| dir).map_err(failed),
            }
        }
        Err(failed(io::ErrorKind::AlreadyExists.into()))
    }

    fn spawn(&self, dir: &Path, arguments: &[&str]) -> Result<Child, PeerError> {
        let log = File::create(dir.join(LOG)).map_err(failed("make a log for Firecracker"))?;
        let same = log.try_clone().map_err(failed("make a log for Firecracker"))?;
        Command::new(&self.binary)
            .args(arguments)
            .current_dir(dir)
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::from(log))
            .stderr(Stdio::from(same))
            .kill_on_drop(true)
            .spawn()
            .map_err(failed("start Firecracker"))
    }

    /// What boots a guest from this configuration, in a directory of its own.
    pub fn command(&self, configuration: &Path) -> Result<Command, PeerError> {
        let mut command = Command::new(&self.binary);
        command.args(["--no-api", "--config-file"]).arg(configuration);
        command.current_dir(self.directory()?).env_clear();
        Ok(command)
    }

    /// What a guest is made of.
    pub fn configuration(&self) -> serde_json::Value {
        // The words that our own monitor has for the kernel, and its init; Firecracker adds those for its devices.
        let root = match self.root {
            Root::Blk => "root=/dev/vda rootfstype=erofs ro",
            Root::Pmem => "root=/dev/pmem0 rootfstype=erofs rootflags=dax=always ro",
        };
        let line = format!(
            "reboot=t panic=-1 tsc=reliable no_timer_check random.trust_cpu=on loglevel=4 {root} rootwait init={INIT}"
        );
        let mut configuration = json!({
            "boot-source": { "kernel_image_path": self.kernel, "boot_args": line },
            "machine-config": { "vcpu_count": self.vcpus, "mem_size_mib": self.memory_mib },
            "vsock": { "guest_cid": 3, "uds_path": VSOCK },
        });
        match self.root {
            Root::Blk => {
                configuration["drives"] = json!([{
                    "drive_id": "root", "path_on_host": self.image, "is_root_device": false, "is_read_only": true,
                }]);
            }
            Root::Pmem => {
                configuration["drives"] = json!([]);
                configuration["pmem"] = json!([{
                    "id": "root", "path_on_host": self.image, "root_device": false, "read_only": true,
                }]);
            }
        }
        configuration
    }
}

impl Guest {
    /// Runs a command, given as words that end in NUL.
    pub async fn run(&mut self, words: &[u8]) -> Result<Ran, PeerError> {
        self.conversation
            .run(words)
            .await
            .map_err(failed("run a command in a guest of Firecracker"))
    }

    /// Sends so many bytes, and waits until the guest has read them.
    pub async fn send(&mut self, bytes: usize) -> Result<(), PeerError> {
        self.conversation.send(bytes).await.map_err(failed("send to a guest of Firecracker"))
    }

    /// Reads so many bytes; returns when the first of them was there.
    pub async fn receive(&mut self, bytes: usize) -> Result<Instant, PeerError> {
        self.conversation.receive(bytes).await.map_err(failed("read from a guest of Firecracker"))
    }

    /// The process.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Ends it, and waits until nothing of it is left.
    pub async fn stop(mut self) -> Result<(), PeerError> {
        self.child.kill().await.map_err(failed("end Firecracker"))
    }
}

/// Waits for the guest, but not longer than the process lives.
async fn watched<T>(
    child: &mut Child,
    dir: &Path,
    came: impl Future<Output = io::Result<T>>,
) -> Result<T, PeerError> {
    tokio::select! {
        came = timeout(BOOT_LIMIT, came) => match came {
            Ok(came) => came.map_err(failed("hear from a guest of Firecracker")),
            Err(_) => Err(ended(dir, "runs, but its guest says nothing")),
        },
        _ = child.wait() => Err(ended(dir, "ended before its guest said anything")),
    }
}

fn ended(dir: &Path, what: &'static str) -> PeerError {
    let log = fs::read(dir.join(LOG)).unwrap_or_default();
    let said =
        String::from_utf8_lossy(&log[log.len().saturating_sub(LOG_BYTES)..]).trim().to_owned();
    PeerError::Failed { what, said }
}

/// One request of its API, on a connection of its own.
async fn request(
    mut stream: UnixStream,
    method: &str,
    path: &str,
    body: &serde_json::Value,
    what: &'static str,
) -> Result<(), PeerError> {
    let failed = failed("speak with the API of Firecracker");
    let body = body.to_string();
    let text = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let answer = async {
        stream.write_all(text.as_bytes()).await?;
        answer(BufReader::new(stream)).await
    };
    match timeout(BOOT_LIMIT, answer).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    {
        Ok((200..=299, _)) => Ok(()),
        Ok((_, answer)) => Err(PeerError::Refused { request: what, answer }),
        Err(error) => Err(failed(error)),
    }
}

/// Status and body of an answer.
pub(super) async fn answer(mut stream: impl AsyncBufReadExt + Unpin) -> io::Result<(u16, String)> {
    let (mut status, mut length) = (None, 0);
    loop {
        let mut line = Vec::new();
        stream.read_until(b'\n', &mut line).await?;
        let line = String::from_utf8_lossy(&line).trim_end().to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        match (status, line.strip_prefix("content-length:")) {
            (None, _) => {
                status = line.split(' ').nth(1).and_then(|code| code.parse().ok()).or(Some(0))
            }
            (_, Some(count)) => length = count.trim().parse().unwrap_or(0),
            _ => {}
        }
    }
    let mut body = vec![0; std::cmp::min(length, MAX_ANSWER)];
    stream.read_exact(&mut body).await?;
    let status = status.ok_or(io::ErrorKind::UnexpectedEof)?;
    Ok((status, String::from_utf8_lossy(&body).into_owned()))
}
