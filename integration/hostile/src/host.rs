//! One monitor with one hostile guest, seen from the host.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use chitin_vmm::control::{EndReason, Event, MAX_LOG_BYTES, Message};
use chitin_vmm::{VmSpec, spec};
use rustix::net::{
    AddressFamily, SocketFlags, SocketType, socketpair, sockopt::set_socket_send_buffer_size,
};
use tempfile::TempDir;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::program::Program;
use crate::{PING, PONG};

/// How long one guest may take. The longest takes three seconds where KVM only emulates.
const LIMIT: Duration = Duration::from_secs(30);
/// How long a monitor may take to be gone after it has reported the end.
const GONE_LIMIT: Duration = Duration::from_secs(5);
/// Room for an event with the longest log, each byte of which may take six in JSON.
const MAX_EVENT: usize = MAX_LOG_BYTES * 6 + 4096;

/// What is in a guest's directory, from its start to its end.
const FILES: [&str; 3] = ["root.img", "stderr", "vmlinux"];

/// What the host does with the channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Host {
    /// Reads everything, and answers each ping.
    Answers,
    /// Never reads.
    Silent,
}

/// How a guest and its monitor ended.
#[derive(Debug)]
pub struct Outcome {
    /// Who ended the guest.
    pub reason: EndReason,
    /// Why, where the reason does not say it.
    pub detail: Option<String>,
    /// The guest's last words.
    pub log: String,
    /// How many rules it broke.
    pub faults: u64,
    /// The first of them.
    pub fault: Option<String>,
    /// The most memory that the monitor had resident, with the guest's.
    pub peak_kib: u64,
}

/// A monitor that runs a guest.
pub struct Guest {
    child: Child,
    control: UnixDatagram,
    channel: UnixStream,
    reader: Option<JoinHandle<()>>,
    /// Bytes that have come from the guest.
    pub heard: Arc<AtomicU64>,
    dir: TempDir,
}

impl Guest {
    /// Starts a monitor for a program, and gives it the channel.
    ///
    /// # Errors
    /// Something of the host's fails.
    pub fn start(monitor: &Path, program: Program, host: Host) -> Result<Self> {
        let dir = tempfile::tempdir().context("make a directory")?;
        let kernel = dir.path().join("vmlinux");
        let file = File::create(&kernel).context("create the program's file")?;
        program.write(&file).context("write the program")?;
        let root_image = dir.path().join("root.img");
        image(&root_image).context("write a root image")?;

        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .context("make a control socket")?;
        let stderr = File::create(dir.path().join("stderr")).context("create a file")?;
        let mut command = Command::new(monitor);
        // By its directory a process that is left is found.
        command
            .stdin(theirs)
            .stdout(stderr.try_clone()?)
            .stderr(stderr)
            .current_dir(&dir)
            .env("TMPDIR", dir.path());
        let child = command.spawn().with_context(|| format!("start {}", monitor.display()))?;
        drop(command);
        let control = UnixDatagram::from(ours);
        control.set_read_timeout(Some(LIMIT)).context("set up the control socket")?;
        let (channel, theirs) = UnixStream::pair().context("make a channel")?;
        if host == Host::Silent {
            // As little as can be is on its way to a host that does not read.
            set_socket_send_buffer_size(&theirs, 1).context("make the channel's buffer small")?;
        }
        let heard = Arc::default();
        let mut guest = Self { child, control, channel, reader: None, heard, dir };
        let spec = VmSpec { memory_mib: spec::MIN_MEMORY_MIB, ..VmSpec::new(kernel, root_image) };
        guest.send(&spec, theirs.into())?;
        if host == Host::Answers {
            let channel = guest.channel.try_clone().context("share the channel")?;
            let heard = Arc::clone(&guest.heard);
            guest.reader = Some(thread::spawn(move || answer(channel, &heard)));
        }
        Ok(guest)
    }

    fn send(&self, spec: &VmSpec, channel: OwnedFd) -> Result<()> {
        let json = serde_json::to_vec(spec).context("write the specification")?;
        self.control
            .send_with_fd(&json[..], channel.as_raw_fd())
            .map_err(io::Error::from)
            .context("send the specification")?;
        Ok(())
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// The monitor does not report one in time, does not exit properly, complains, or leaves something behind.
    pub fn outcome(mut self) -> Result<Outcome> {
        let ended = self.ended();
        if ended.is_err() {
            // It is ours, and has not been waited for.
            let _ = self.child.kill();
        }
        let (status, peak_kib) = self.gone()?;
        let complaints = fs::read(self.dir.path().join("stderr")).context("read standard error")?;
        let complaints = String::from_utf8_lossy(&complaints);
        let event =
            ended.with_context(|| format!("{status}; its standard error: {complaints:?}"))?;
        ensure!(status.success(), "the monitor ended with {status}: {complaints}");
        ensure!(complaints.is_empty(), "the monitor complains: {complaints}");
        let left = processes_in(self.dir.path())?;
        ensure!(left.is_empty(), "left behind: {left:?}");
        let mut files = fs::read_dir(&self.dir)?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<Result<Vec<_>>>()?;
        files.sort();
        ensure!(files == FILES, "files left behind: {files:?}");
        match event {
            Event::Ended { reason, detail, log, faults, fault } => {
                Ok(Outcome { reason, detail, log, faults, fault, peak_kib })
            }
            event => bail!("not the end of a guest: {event:?}"),
        }
    }

    /// Has the monitor end the guest.
    ///
    /// # Errors
    /// As for [`outcome`](Self::outcome).
    pub fn stop(self) -> Result<Outcome> {
        self.channel.shutdown(Shutdown::Both).context("close the channel")?;
        self.outcome()
    }

    fn ended(&self) -> Result<Event> {
        let mut packet = vec![0; MAX_EVENT];
        loop {
            let count = self.control.recv(&mut packet).context("wait for the guest's end")?;
            ensure!(count > 0, "the monitor ended without a word");
            let event = serde_json::from_slice(&packet[..count]).context("read an event")?;
            match event {
                Message::Event(Event::Entered { .. }) | Message::Template(_) => {}
                Message::Event(end) => return Ok(end),
            }
        }
    }

    /// Waits for the process, and returns what it used.
    fn gone(&mut self) -> Result<(ExitStatus, u64)> {
        let pid = libc::pid_t::try_from(self.child.id()).context("a process number")?;
        let deadline = Instant::now() + GONE_LIMIT;
        let result = loop {
            let mut status = 0;
            // SAFETY: numbers, for which all zeros are valid.
            let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
            // SAFETY: both are valid for writing. The process is a child that nobody else waits for.
            let waited =
                unsafe { libc::wait4(pid, &raw mut status, libc::WNOHANG, &raw mut usage) };
            match waited {
                0 if Instant::now() > deadline => {
                    let _ = self.child.kill();
                    bail!("the monitor is still there after the guest's end");
                }
                0 => thread::sleep(Duration::from_millis(2)),
                waited if waited == pid => {
                    break (
                        ExitStatus::from_raw(status),
                        u64::try_from(usage.ru_maxrss).unwrap_or(u64::MAX),
                    );
                }
                _ => return Err(io::Error::last_os_error()).context("wait for the monitor"),
            }
        };
        // With the monitor gone the channel has ended, and so does whoever reads it.
        if let Some(reader) = self.reader.take() {
            ensure!(reader.join().is_ok(), "the channel's reader failed");
        }
        Ok(result)
    }
}

/// The image of an empty file system: nothing looks into it, but the monitor checks what it says of itself.
fn image(path: &Path) -> io::Result<()> {
    let file = File::create(path)?;
    file.set_len(2 << 20)?;
    file.write_all_at(&0xe0f5_e1e2u32.to_le_bytes(), 1024)?;
    file.write_all_at(&[12], 1024 + 12)?;
    file.write_all_at(&1u32.to_le_bytes(), 1024 + 36)
}

/// Reads a channel to its end, and answers pings.
fn answer(mut channel: UnixStream, heard: &AtomicU64) {
    let mut bytes = vec![0; 64 * 1024];
    while let Ok(count @ 1..) = channel.read(&mut bytes) {
        heard.fetch_add(count as u64, Ordering::Relaxed);
        // Sent in one packet, and with nothing behind it.
        if bytes[..count].ends_with(PING) && channel.write_all(PONG).is_err() {
            break;
        }
    }
}

/// Processes whose working directory is this.
fn processes_in(dir: &Path) -> Result<Vec<PathBuf>> {
    let dir = fs::canonicalize(dir)?;
    let processes = fs::read_dir("/proc")
        .context("list processes")?
        .filter_map(|entry| Some(entry.ok()?.path()));
    Ok(processes
        .filter(|path| fs::read_link(path.join("cwd")).is_ok_and(|cwd| cwd == dir))
        .collect())
}
