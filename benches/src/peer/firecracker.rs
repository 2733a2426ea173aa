//! Firecracker: booted from a configuration file, its fastest way; saved and restored over its
//! API.
//!
//! Each guest has a directory, which is the working directory of its process. All sockets
//! therefore have the same relative names in every process, which a restored guest requires.

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

use super::connection::{CommandResult, GuestConnection, PORT};
use super::{BOOT_LIMIT, Peer, PeerError, RootDevice, failed};

/// The init of its guests, in the root image.
const INIT: &str = "/usr/lib/chitin/peer";

const API_SOCKET: &str = "api.sock";
const VSOCK_SOCKET: &str = "v.sock";
const CONFIG: &str = "config.json";
const LOG: &str = "log";

/// Bytes of the log that an error shows.
const LOG_BYTES: usize = 600;

/// The largest answer that is read from the API.
const MAX_ANSWER: usize = 64 * 1024;

/// The interval at which the API socket is looked for: no event reports it.
const POLL_INTERVAL: Duration = Duration::from_micros(100);

/// A saved guest.
pub struct Snapshot {
    state: PathBuf,
    memory: PathBuf,
}

/// A running guest. Dropping it ends it.
pub struct Guest {
    child: Child,
    connection: GuestConnection<UnixStream>,
    /// The time at which the process was started.
    pub started: Instant,
    /// The time at which the first byte of the guest was read.
    pub hello: Instant,
    dir: PathBuf,
}

impl Peer {
    /// Boots a guest.
    pub async fn boot(&self) -> Result<Guest, PeerError> {
        self.boot_with(&["--no-api"]).await
    }

    async fn boot_with(&self, arguments: &[&str]) -> Result<Guest, PeerError> {
        let dir = self.create_guest_dir()?;
        let json = self.config().to_string();
        fs::write(dir.join(CONFIG), json)
            .map_err(failed("write a configuration of Firecracker"))?;
        let listener = UnixListener::bind(dir.join(format!("{VSOCK_SOCKET}_{PORT}")))
            .map_err(failed("listen for a guest of Firecracker"))?;
        let started = Instant::now();
        let mut child =
            self.spawn_process(&dir, &[arguments, &["--config-file", CONFIG]].concat())?;
        let connected = async {
            let (stream, _) = listener.accept().await?;
            GuestConnection::accept(stream).await
        };
        let connection = wait_for_guest(&mut child, &dir, connected).await?;
        Ok(Guest { child, connection, started, hello: Instant::now(), dir })
    }

    /// Boots a guest, runs a command in it, and saves it.
    pub async fn save(&self, command: &[u8]) -> Result<Snapshot, PeerError> {
        let mut guest = self.boot_with(&["--api-sock", API_SOCKET]).await?;
        guest.run(command).await?;
        let snapshot =
            Snapshot { state: guest.dir.join("state"), memory: guest.dir.join("memory") };
        let Guest { mut child, connection, dir, .. } = guest;
        // A snapshot keeps no connection; it keeps the guest's listener.
        drop(connection);
        let connect = async || {
            UnixStream::connect(dir.join(API_SOCKET))
                .await
                .map_err(failed("connect to the API of Firecracker"))
        };
        let save = json!({
            "snapshot_type": "Full",
            "snapshot_path": snapshot.state,
            "mem_file_path": snapshot.memory,
        });
        let pause = json!({ "state": "Paused" });
        send_request(connect().await?, "PATCH", "/vm", &pause, "to pause a guest").await?;
        send_request(connect().await?, "PUT", "/snapshot/create", &save, "to save a guest").await?;
        child.kill().await.map_err(failed("end Firecracker"))?;
        Ok(snapshot)
    }

    /// Restores a guest.
    pub async fn restore(&self, snapshot: &Snapshot) -> Result<Guest, PeerError> {
        let dir = self.create_guest_dir()?;
        let load = json!({
            "snapshot_path": snapshot.state,
            "mem_backend": { "backend_type": "File", "backend_path": snapshot.memory },
            "resume_vm": true,
        });
        let api = dir.join(API_SOCKET);
        let started = Instant::now();
        let mut child = self.spawn_process(&dir, &["--api-sock", API_SOCKET])?;
        let stream = loop {
            if let Ok(stream) = UnixStream::connect(&api).await {
                break stream;
            }
            if let Ok(Some(_)) = child.try_wait() {
                return Err(process_error(&dir, "ended"));
            }
            // The only thread may sleep: it has nothing else to do.
            std::thread::sleep(POLL_INTERVAL);
        };
        send_request(stream, "PUT", "/snapshot/load", &load, "to restore a guest").await?;
        let connected = async {
            GuestConnection::dial(UnixStream::connect(dir.join(VSOCK_SOCKET)).await?).await
        };
        let connection = wait_for_guest(&mut child, &dir, connected).await?;
        Ok(Guest { child, connection, started, hello: Instant::now(), dir })
    }

    fn create_guest_dir(&self) -> Result<PathBuf, PeerError> {
        let failed = failed("create a directory for a guest of Firecracker");
        for number in 0..u32::MAX {
            let dir = self.scratch.path().join(number.to_string());
            match fs::create_dir(&dir) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                created => return created.map(|()| dir).map_err(failed),
            }
        }
        Err(failed(io::ErrorKind::AlreadyExists.into()))
    }

    fn spawn_process(&self, dir: &Path, arguments: &[&str]) -> Result<Child, PeerError> {
        let log = File::create(dir.join(LOG)).map_err(failed("create a log for Firecracker"))?;
        let same = log.try_clone().map_err(failed("create a log for Firecracker"))?;
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

    /// Returns a command that boots a guest from this configuration, in a new directory.
    pub fn boot_command(&self, config: &Path) -> Result<Command, PeerError> {
        let mut command = Command::new(&self.binary);
        command.args(["--no-api", "--config-file"]).arg(config);
        command.current_dir(self.create_guest_dir()?).env_clear();
        Ok(command)
    }

    /// Returns the configuration of a guest.
    pub fn config(&self) -> serde_json::Value {
        // The kernel command line of Chitin's monitor, and the init; Firecracker adds the words for
        // its devices.
        let root = match self.root {
            RootDevice::Blk => "root=/dev/vda rootfstype=erofs ro",
            RootDevice::Pmem => "root=/dev/pmem0 rootfstype=erofs rootflags=dax=always ro",
        };
        let boot_args = format!(
            "reboot=t panic=-1 tsc=reliable no_timer_check random.trust_cpu=on loglevel=4 {root} \
             rootwait init={INIT}"
        );
        let mut config = json!({
            "boot-source": { "kernel_image_path": self.kernel, "boot_args": boot_args },
            "machine-config": { "vcpu_count": self.vcpus, "mem_size_mib": self.memory_mib },
            "vsock": { "guest_cid": 3, "uds_path": VSOCK_SOCKET },
        });
        match self.root {
            RootDevice::Blk => {
                config["drives"] = json!([{
                    "drive_id": "root",
                    "path_on_host": self.image,
                    "is_root_device": false,
                    "is_read_only": true,
                }]);
            }
            RootDevice::Pmem => {
                config["drives"] = json!([]);
                config["pmem"] = json!([{
                    "id": "root",
                    "path_on_host": self.image,
                    "root_device": false,
                    "read_only": true,
                }]);
            }
        }
        config
    }
}

impl Guest {
    /// Runs a command, encoded as words that end in NUL.
    pub async fn run(&mut self, command: &[u8]) -> Result<CommandResult, PeerError> {
        self.connection
            .run(command)
            .await
            .map_err(failed("run a command in a guest of Firecracker"))
    }

    /// Sends this many bytes and waits until the guest has read them.
    pub async fn send_bytes(&mut self, count: usize) -> Result<(), PeerError> {
        self.connection.send_bytes(count).await.map_err(failed("send to a guest of Firecracker"))
    }

    /// Receives this many bytes and returns the time at which the first arrived.
    pub async fn receive_bytes(&mut self, count: usize) -> Result<Instant, PeerError> {
        self.connection
            .receive_bytes(count)
            .await
            .map_err(failed("receive from a guest of Firecracker"))
    }

    /// Returns the process id while the process runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Ends the process and waits until it is gone.
    pub async fn stop(mut self) -> Result<(), PeerError> {
        self.child.kill().await.map_err(failed("end Firecracker"))
    }
}

/// Waits for the connection of a guest while its process lives.
async fn wait_for_guest<T>(
    child: &mut Child,
    dir: &Path,
    connected: impl Future<Output = io::Result<T>>,
) -> Result<T, PeerError> {
    tokio::select! {
        connected = timeout(BOOT_LIMIT, connected) => match connected {
            Ok(connected) => connected.map_err(failed("read from a guest of Firecracker")),
            Err(_) => Err(process_error(dir, "runs, but its guest sends nothing")),
        },
        _ = child.wait() => Err(process_error(dir, "ended before its guest sent anything")),
    }
}

/// Returns an error with the end of the log.
fn process_error(dir: &Path, event: &'static str) -> PeerError {
    let log = fs::read(dir.join(LOG)).unwrap_or_default();
    let end = &log[log.len().saturating_sub(LOG_BYTES)..];
    PeerError::Failed { event, log: String::from_utf8_lossy(end).trim().to_owned() }
}

/// Sends one request to the API, on a connection of its own.
async fn send_request(
    mut stream: UnixStream,
    method: &str,
    path: &str,
    body: &serde_json::Value,
    request: &'static str,
) -> Result<(), PeerError> {
    let body = body.to_string();
    let text = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let answer = async {
        stream.write_all(text.as_bytes()).await?;
        read_answer(BufReader::new(stream)).await
    };
    let timed_out = |_| Err(io::ErrorKind::TimedOut.into());
    match timeout(BOOT_LIMIT, answer).await.unwrap_or_else(timed_out) {
        Ok((200..=299, _)) => Ok(()),
        Ok((_, answer)) => Err(PeerError::Refused { request, answer }),
        Err(error) => Err(failed("talk to the API of Firecracker")(error)),
    }
}

/// Reads the status and the body of an HTTP answer.
pub(super) async fn read_answer(
    mut stream: impl AsyncBufReadExt + Unpin,
) -> io::Result<(u16, String)> {
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
                status = line.split(' ').nth(1).and_then(|code| code.parse().ok()).or(Some(0));
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
