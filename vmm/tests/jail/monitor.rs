//! A monitor under test: its processes, its control socket and its files.

use std::fs;
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use chitin_vmm::{Event, Request, VmSpec};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags,
    SocketType, recv, sendmsg, socketpair,
};
use rustix::process::{Pid, Signal, kill_process};
use serde::Serialize;

/// The program under test.
pub const MONITOR: &str = env!("CARGO_BIN_EXE_chitin-vmm");

/// The time limit of every wait.
pub const LIMIT: Duration = Duration::from_secs(20);

/// Guest code that sleeps for ever: `hlt` in a loop. The vCPU waits in KVM, which has the interrupt
/// controllers.
pub const SLEEP: [u8; 3] = [0xf4, 0xeb, 0xfd];

/// A monitor whose guest runs, and the other ends of its sockets.
pub struct Monitor {
    /// The process that was started: the supervisor, or the monitor itself if it has no jail.
    pub supervisor: Child,
    /// The host's end of the control socket.
    pub control: Option<OwnedFd>,
    _channel: Option<OwnedFd>,
    _files: tempfile::TempDir,
}

/// The most descriptors in one packet: a channel and the files of a template.
const MAX_FDS: usize = 4;

/// Returns a kernel that consists of this code.
fn build_kernel(code: &[u8]) -> Vec<u8> {
    let mut elf = vec![0u8; 0x2000];
    elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
    let fields = [
        (18, 62u64),
        (24, 1 << 20),
        (32, 64),
        (64, 1),
        (72, 0x1000),
        (88, 1 << 20),
        (96, 4096),
        (104, 4096),
    ];
    for (at, value) in fields {
        elf[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
    (elf[54], elf[56]) = (56, 1);
    elf[0x1000..][..code.len()].copy_from_slice(code);
    elf
}

/// Returns as much of an EROFS image as a monitor reads.
fn build_image() -> Vec<u8> {
    let mut image = vec![0u8; 2 << 20];
    image[1024..1028].copy_from_slice(&0xe0f5_e1e2u32.to_le_bytes());
    image[1024 + 12] = 12;
    image
}

fn socket_pair(kind: SocketType) -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap()
}

impl Monitor {
    /// Starts a monitor with a sleeping guest, and waits until the guest has been entered.
    pub fn start() -> Monitor {
        Monitor::start_with(|_| {}, |_| {})
    }

    /// Does the same with changes to the specification and the command.
    pub fn start_with(
        change: impl FnOnce(&mut VmSpec),
        prepare: impl FnOnce(&mut Command),
    ) -> Monitor {
        let mut monitor = Monitor::launch(&SLEEP, change, prepare);
        match monitor.receive_event() {
            Event::Entered { .. } => monitor,
            other => panic!("{other:?}"),
        }
    }

    /// Starts a monitor whose guest executes this code.
    pub fn launch(
        code: &[u8],
        change: impl FnOnce(&mut VmSpec),
        prepare: impl FnOnce(&mut Command),
    ) -> Monitor {
        Monitor::launch_with_files(code, change, prepare, &[])
    }

    /// Starts a monitor with the files of a template, which follow the channel.
    pub fn launch_with_files(
        code: &[u8],
        change: impl FnOnce(&mut VmSpec),
        prepare: impl FnOnce(&mut Command),
        template: &[BorrowedFd<'_>],
    ) -> Monitor {
        let files = tempfile::tempdir().unwrap();
        let write = |name: &str, contents: &[u8]| {
            let path = files.path().join(name);
            fs::write(&path, contents).unwrap();
            path
        };
        let (kernel, image) =
            (write("kernel", &build_kernel(code)), write("image", &build_image()));
        let mut spec = VmSpec::new(kernel, image);
        spec.memory_mib = 64;
        change(&mut spec);
        let (control, far_control) = socket_pair(SocketType::SEQPACKET);
        let mut command = Command::new(MONITOR);
        command.stdin(far_control).stdout(Stdio::null()).stderr(Stdio::null());
        prepare(&mut command);
        let supervisor = command.spawn().unwrap();
        let mut monitor =
            Monitor { supervisor, control: Some(control), _channel: None, _files: files };
        if spec.prepared {
            monitor.send_packet(&spec, template);
        } else {
            monitor.send_with_channel(&spec, template);
        }
        monitor
    }

    /// Sends a request with its descriptors.
    pub fn send_request(&self, request: &Request, fds: &[BorrowedFd<'_>]) {
        self.send_packet(request, fds);
    }

    /// Gives a prepared monitor its channel.
    pub fn send_go(&mut self) {
        self.send_with_channel(&Request::Go {}, &[]);
    }

    fn send_with_channel(&mut self, packet: &impl Serialize, fds: &[BorrowedFd<'_>]) {
        let (channel, far_channel) = socket_pair(SocketType::STREAM);
        self.send_packet(packet, &[&[far_channel.as_fd()], fds].concat());
        self._channel = Some(channel);
    }

    fn send_packet(&self, packet: &impl Serialize, fds: &[BorrowedFd<'_>]) {
        let json = serde_json::to_vec(packet).unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(fds.is_empty() || ancillary.push(SendAncillaryMessage::ScmRights(fds)));
        let control = self.control.as_ref().unwrap();
        sendmsg(control, &[IoSlice::new(&json)], &mut ancillary, SendFlags::empty()).unwrap();
    }

    /// Sends SIGTERM to the supervisor, which passes it on.
    pub fn terminate(&self) {
        let pid = i32::try_from(self.supervisor.id()).ok().and_then(Pid::from_raw).unwrap();
        kill_process(pid, Signal::TERM).unwrap();
    }

    /// Waits for the next event.
    pub fn receive_event(&mut self) -> Event {
        let mut packet = vec![0; 1 << 16];
        let control = self.control.as_ref().unwrap();
        let (length, _) = recv(control, &mut packet[..], RecvFlags::empty()).unwrap();
        assert_ne!(length, 0, "the monitor ended without an event");
        serde_json::from_slice(&packet[..length]).unwrap()
    }

    /// Waits at most this long for an event, which is not received yet.
    pub fn has_event_within(&self, time: Duration) -> bool {
        let mut polls = [PollFd::new(self.control.as_ref().unwrap(), PollFlags::IN)];
        let time = Timespec::try_from(time).unwrap();
        poll(&mut polls, Some(&time)).unwrap() == 1
    }

    /// Returns the process id of the jailed child.
    pub fn child_pid(&self) -> u32 {
        let children = format!("/proc/{0}/task/{0}/children", self.supervisor.id());
        let text = fs::read_to_string(children).unwrap();
        text.trim().parse().unwrap_or_else(|_| panic!("not one child: {text:?}"))
    }

    /// Reads what the monitor has written to standard error, which has to be a pipe, until it ends.
    pub fn read_stderr(&mut self) -> String {
        let mut text = String::new();
        self.supervisor.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        text
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.control = None;
        let _ = self.supervisor.wait();
    }
}

/// Returns the path of a file of a process.
pub fn proc_file(pid: u32, name: &str) -> PathBuf {
    Path::new("/proc").join(pid.to_string()).join(name)
}

/// Reads the status of a process, and returns a function that finds its fields.
pub fn read_status(pid: u32) -> impl Fn(&str) -> String {
    let text = fs::read_to_string(proc_file(pid, "status")).unwrap();
    move |field| {
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("{field}:")));
        line.unwrap_or_else(|| panic!("no {field}"))
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" ")
    }
}
