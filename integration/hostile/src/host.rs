//! One monitor with one hostile guest, seen from the host.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
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
use chitin_vmm::control::{EndReason, Event, MAX_LOG_BYTES};
use chitin_vmm::virtio::GuestFault;
use chitin_vmm::{VmSpec, spec};
use rustix::net::{
    AddressFamily, SocketFlags, SocketType, socketpair, sockopt::set_socket_send_buffer_size,
};
use tempfile::TempDir;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::program::Program;
use crate::{PING, PONG};

/// The time limit of one guest. The longest takes three seconds where KVM only emulates.
const GUEST_LIMIT: Duration = Duration::from_secs(30);
/// The time limit of a monitor to exit after it has reported the end.
const EXIT_LIMIT: Duration = Duration::from_secs(5);
/// Room for an event with the longest log, each byte of which may take six in JSON.
const MAX_EVENT_BYTES: usize = MAX_LOG_BYTES * 6 + 4096;

/// The files in a guest's directory, from its start to its end.
const FILES: [&str; 3] = ["root.img", "stderr", "vmlinux"];

/// The behavior of the host's end of the channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostBehavior {
    /// Reads everything and answers each ping.
    AnswersPings,
    /// Never reads.
    NeverReads,
}

/// The end of a guest and of its monitor.
#[derive(Debug)]
pub struct Outcome {
    /// The cause of the guest's end.
    pub reason: EndReason,
    /// Details of the cause, if the reason does not say it all.
    pub detail: Option<String>,
    /// The guest's log.
    pub log: String,
    /// The number of faults.
    pub faults: u64,
    /// The first fault.
    pub fault: Option<GuestFault>,
    /// The most memory that the monitor had resident, including the guest's.
    pub peak_kib: u64,
}

/// A monitor that runs a hostile guest.
pub struct HostileGuest {
    child: Child,
    control: UnixDatagram,
    channel: UnixStream,
    reader: Option<JoinHandle<()>>,
    received_bytes: Arc<AtomicU64>,
    dir: TempDir,
}

impl HostileGuest {
    /// Starts a monitor for a program, with a channel.
    ///
    /// # Errors
    /// An operation of the host fails.
    pub fn start(monitor: &Path, program: Program, behavior: HostBehavior) -> Result<Self> {
        let dir = tempfile::tempdir().context("make a directory")?;
        let kernel = dir.path().join("vmlinux");
        let file = File::create(&kernel).context("create the program's file")?;
        program.write_elf(&file).context("write the program")?;
        let root_image = dir.path().join("root.img");
        write_root_image(&root_image).context("write a root image")?;

        let (child, control) = spawn_monitor(monitor, &dir)?;
        control.set_read_timeout(Some(GUEST_LIMIT)).context("set up the control socket")?;
        let (channel, theirs) = UnixStream::pair().context("make a channel")?;
        if behavior == HostBehavior::NeverReads {
            // With the smallest buffer, little is on the way to a host that does not read.
            set_socket_send_buffer_size(&theirs, 1).context("make the channel's buffer small")?;
        }
        let received_bytes = Arc::default();
        let mut guest = Self { child, control, channel, reader: None, received_bytes, dir };
        let spec = VmSpec { memory_mib: spec::MIN_MEMORY_MIB, ..VmSpec::new(kernel, root_image) };
        guest.send_spec(&spec, theirs.into())?;
        if behavior == HostBehavior::AnswersPings {
            let channel = guest.channel.try_clone().context("share the channel")?;
            let received_bytes = Arc::clone(&guest.received_bytes);
            guest.reader = Some(thread::spawn(move || answer_pings(channel, &received_bytes)));
        }
        Ok(guest)
    }

    /// Returns how many bytes have come from the guest.
    pub fn received_bytes(&self) -> u64 {
        self.received_bytes.load(Ordering::Relaxed)
    }

    fn send_spec(&self, spec: &VmSpec, channel: OwnedFd) -> Result<()> {
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
    /// The monitor does not report the end in time, does not exit properly, prints something, or
    /// leaves something behind.
    pub fn wait(mut self) -> Result<Outcome> {
        let end = self.receive_end();
        if end.is_err() {
            let _ = self.child.kill();
        }
        let (status, peak_kib) = self.wait_for_exit()?;
        let stderr = fs::read(self.dir.path().join("stderr")).context("read standard error")?;
        let stderr = String::from_utf8_lossy(&stderr);
        let event = end.with_context(|| format!("{status}; its standard error: {stderr:?}"))?;
        ensure!(status.success(), "the monitor ended with {status}: {stderr}");
        ensure!(stderr.is_empty(), "the monitor printed: {stderr}");
        self.check_nothing_left()?;
        match event {
            Event::Ended { reason, detail, log, faults, fault } => {
                Ok(Outcome { reason, detail, log, faults, fault, peak_kib })
            }
            event => bail!("not the end of a guest: {event:?}"),
        }
    }

    /// Closes the channel, which makes the monitor end the guest, and waits for the end.
    ///
    /// # Errors
    /// As for [`wait`](Self::wait).
    pub fn stop(self) -> Result<Outcome> {
        self.channel.shutdown(Shutdown::Both).context("close the channel")?;
        self.wait()
    }

    /// Receives events until the last one.
    fn receive_end(&self) -> Result<Event> {
        let mut packet = vec![0; MAX_EVENT_BYTES];
        loop {
            let count = self.control.recv(&mut packet).context("wait for the guest's end")?;
            ensure!(count > 0, "the monitor ended without an event");
            let event = serde_json::from_slice(&packet[..count]).context("read an event")?;
            if let end @ (Event::Ended { .. } | Event::Failed { .. }) = event {
                return Ok(end);
            }
        }
    }

    /// Waits for the monitor's process. Returns its status and its peak memory.
    fn wait_for_exit(&mut self) -> Result<(ExitStatus, u64)> {
        let deadline = Instant::now() + EXIT_LIMIT;
        let result = loop {
            if let Some(result) = poll_exit(&self.child).context("wait for the monitor")? {
                break result;
            }
            if Instant::now() > deadline {
                let _ = self.child.kill();
                bail!("the monitor does not exit after the guest's end");
            }
            thread::sleep(Duration::from_millis(2));
        };
        // The channel has ended with the monitor, so its reader returns.
        if let Some(reader) = self.reader.take() {
            ensure!(reader.join().is_ok(), "the channel's reader failed");
        }
        Ok(result)
    }

    /// Checks that the monitor has left no process and no file.
    fn check_nothing_left(&self) -> Result<()> {
        let processes = processes_in(self.dir.path())?;
        ensure!(processes.is_empty(), "processes left behind: {processes:?}");
        let mut files = fs::read_dir(&self.dir)?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<Result<Vec<_>>>()?;
        files.sort();
        ensure!(files == FILES, "files left behind: {files:?}");
        Ok(())
    }
}

/// Starts a monitor in a directory, by which a process that it leaves behind is found. Returns its
/// control socket.
fn spawn_monitor(monitor: &Path, dir: &TempDir) -> Result<(Child, UnixDatagram)> {
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .context("make a control socket")?;
    let stderr = File::create(dir.path().join("stderr")).context("create a file")?;
    let child = Command::new(monitor)
        .stdin(theirs)
        .stdout(stderr.try_clone()?)
        .stderr(stderr)
        .current_dir(dir)
        .env("TMPDIR", dir.path())
        .spawn()
        .with_context(|| format!("start {}", monitor.display()))?;
    Ok((child, UnixDatagram::from(ours)))
}

/// Returns the status and the peak memory of a process that has exited. The standard library does
/// not report the latter.
fn poll_exit(child: &Child) -> io::Result<Option<(ExitStatus, u64)>> {
    let pid = libc::pid_t::try_from(child.id()).map_err(io::Error::other)?;
    let mut status = 0;
    let mut usage = MaybeUninit::<libc::rusage>::uninit();
    // SAFETY: both pointers are valid for writes. The process is a child that nothing else waits
    // for, so that `pid` still names it.
    let waited = unsafe { libc::wait4(pid, &raw mut status, libc::WNOHANG, usage.as_mut_ptr()) };
    match waited {
        0 => Ok(None),
        waited if waited == pid => {
            // SAFETY: the call has returned a process, and then it has filled `usage`.
            let usage = unsafe { usage.assume_init() };
            let peak_kib = u64::try_from(usage.ru_maxrss).unwrap_or(u64::MAX);
            Ok(Some((ExitStatus::from_raw(status), peak_kib)))
        }
        _ => Err(io::Error::last_os_error()),
    }
}

/// Writes the image of an empty file system. Nothing looks into it, but the monitor checks its
/// superblock.
fn write_root_image(path: &Path) -> io::Result<()> {
    let file = File::create(path)?;
    file.set_len(2 << 20)?;
    file.write_all_at(&0xe0f5_e1e2u32.to_le_bytes(), 1024)?;
    file.write_all_at(&[12], 1024 + 12)?;
    file.write_all_at(&1u32.to_le_bytes(), 1024 + 36)
}

/// Reads a channel to its end, and answers pings.
fn answer_pings(mut channel: UnixStream, received_bytes: &AtomicU64) {
    let mut bytes = vec![0; 64 * 1024];
    while let Ok(count @ 1..) = channel.read(&mut bytes) {
        received_bytes.fetch_add(count as u64, Ordering::Relaxed);
        // A ping is sent in one packet, with nothing after it.
        if bytes[..count].ends_with(PING) && channel.write_all(PONG).is_err() {
            break;
        }
    }
}

/// Returns the processes whose working directory is this.
fn processes_in(dir: &Path) -> Result<Vec<PathBuf>> {
    let dir = fs::canonicalize(dir)?;
    let processes = fs::read_dir("/proc")
        .context("list processes")?
        .filter_map(|entry| Some(entry.ok()?.path()));
    Ok(processes
        .filter(|path| fs::read_link(path.join("cwd")).is_ok_and(|cwd| cwd == dir))
        .collect())
}
