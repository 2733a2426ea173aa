//! The microVM tier: one `chitin-vmm` process per sandbox.
//!
//! Two socket pairs tie the monitor to this process and leave no name anywhere: the control socket is its standard
//! input, and the channel's descriptor rides on a packet of the control socket. The monitor ends when its control socket
//! closes, which happens also when this process is killed. The process started here is the keeper of a jail, unless that is
//! turned off: the guest runs in a child of it.

mod host_checks;

pub use host_checks::{Check, check_host};

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use chitin_spec::TierKind;
use chitin_vmm::control::Request;
use chitin_vmm::jail::Jail;
use chitin_vmm::{EndReason, Event, FailureCode, VmSpec};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
    sendmsg, socketpair,
};
use tokio::net::UnixDatagram;
use tokio::process::Child;
use tokio::sync::watch;

use crate::clock::now_ns;
use crate::{
    Artifacts, Capabilities, Error, GuestEnd, GuestFiles, Instance, LaunchSpec, Launched, Pending,
    Tier, Unavailable,
};

/// The largest packet taken from a monitor: its last one carries 32 KiB of log, each byte at most six in JSON.
const MAX_EVENT: usize = 256 * 1024;

/// The most descriptors on one packet: a channel and the three files of a template.
const MAX_FDS: usize = 4;

/// How long the kernel may take to clear up behind a guest. Past that something is wrong with the host.
const CLEAR_LIMIT: Duration = Duration::from_secs(20);
/// MicroVMs of these files.
#[derive(Debug, Clone)]
pub struct MicrovmTier(pub Artifacts);

/// What microVMs are made of.
pub fn capabilities() -> Capabilities {
    let version = env!("CARGO_PKG_VERSION").into();
    Capabilities { implementation: "chitin-vmm".into(), version, short_of: Vec::new() }
}

impl Tier for MicrovmTier {
    fn kind(&self) -> TierKind {
        TierKind::Ironclaw
    }

    fn probe(&self) -> Pending<'_, Result<Capabilities, Unavailable>> {
        Box::pin(async {
            let (checks, _) = check_host(&self.0).await;
            let missing: Vec<_> = checks.iter().filter(|check| !check.ok).collect();
            if missing.is_empty() {
                return Ok(capabilities());
            }
            let reasons: Vec<_> =
                missing.iter().map(|check| format!("{}: {}", check.name, check.detail)).collect();
            let remedy = "`chitin doctor` says more".into();
            Err(Unavailable { reason: reasons.join("; "), remedy })
        })
    }

    fn launch<'a>(&'a self, plan: &'a LaunchSpec) -> Pending<'a, Result<Launched, Error>> {
        Box::pin(async {
            let (monitor, stream) = launch(&self.0, &plan.spec, plan.files.as_ref())?;
            Ok(Launched { spawned: monitor.spawned, instance: Box::new(monitor), stream })
        })
    }
}

impl Instance for Monitor {
    fn ended(&mut self) -> Pending<'_, Error> {
        Box::pin(async {
            match Monitor::ended(self).await {
                End::Failed(code, reason) => Error::Monitor { code, reason },
                End::Saved => Error::Stopped,
                End::Guest(end) => Error::GuestEnded(end),
            }
        })
    }

    fn stop(&mut self) -> Pending<'_, Result<(), Error>> {
        Box::pin(async {
            Monitor::stop(self).await;
            Ok(())
        })
    }

    fn monitor(&mut self) -> Option<&mut Monitor> {
        Some(self)
    }
}

/// What a monitor has reported.
#[derive(Debug, Clone, Default)]
pub struct Reported {
    /// When the guest was entered, `CLOCK_MONOTONIC` nanoseconds.
    pub entered: Option<u64>,
    /// The guest waits for its channel.
    pub prepared: bool,
    /// What the monitor is jailed in.
    pub jail: Option<Jail>,
    /// The guest waits to be saved.
    pub frozen: bool,
    /// How it ended, if it has.
    pub end: Option<End>,
}

/// How a monitor ended.
#[derive(Debug, Clone)]
pub enum End {
    /// It never started the guest.
    Failed(FailureCode, String),
    /// The guest had been running.
    Guest(GuestEnd),
    /// The guest was saved, or what it uses was recorded.
    Saved,
}

/// A running monitor. Dropping it ends it.
#[derive(Debug)]
pub struct Monitor {
    /// The monitor, or its keeper.
    child: Child,
    /// Whether it is a keeper.
    jailed: bool,
    /// Closing this end is what stops the monitor.
    control: Option<Arc<UnixDatagram>>,
    listener: Option<tokio::task::JoinHandle<()>>,
    /// What it has reported so far.
    pub reported: watch::Receiver<Reported>,
    /// When the process was started, `CLOCK_MONOTONIC` nanoseconds.
    pub spawned: u64,
}

/// Starts a monitor, with the files of the guest if it is to be restored; the stream is the channel to the agent that
/// will answer on it.
pub fn launch(
    artifacts: &Artifacts,
    spec: &VmSpec,
    files: Option<&GuestFiles>,
) -> Result<(Monitor, UnixStream), Error> {
    let (channel, theirs) = channel()?;
    let monitor = spawn(artifacts, spec, files, Some(theirs))?;
    Ok((monitor, channel))
}

/// Starts a monitor that makes everything ready and then waits for [`Monitor::go`].
pub fn prepare(
    artifacts: &Artifacts,
    spec: &VmSpec,
    files: Option<&GuestFiles>,
) -> Result<Monitor, Error> {
    let spec = VmSpec { prepared: true, ..spec.clone() };
    spawn(artifacts, &spec, files, None)
}

/// Our end of a channel, and the monitor's.
fn channel() -> Result<(UnixStream, OwnedFd), Error> {
    let (ours, theirs) = UnixStream::pair().map_err(host("create a socket pair"))?;
    Ok((ours, theirs.into()))
}

fn spawn(
    artifacts: &Artifacts,
    spec: &VmSpec,
    files: Option<&GuestFiles>,
    channel: Option<OwnedFd>,
) -> Result<Monitor, Error> {
    let (control, control_theirs) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(|errno| host("create a socket pair")(errno.into()))?;

    let spawned = now_ns();
    let child = tokio::process::Command::new(&artifacts.monitor)
        // Our environment may hold the very secrets that are handed over; the monitor needs nothing of it.
        .env_clear()
        .stdin(Stdio::from(control_theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::inherit())
        // Ctrl-C at a terminal is for us to handle; it must not reach the monitor first.
        .process_group(0)
        // A keeper sees the control socket close, and then has to clear up behind its inmate.
        .kill_on_drop(!spec.jail)
        .spawn()
        .map_err(|source| Error::Spawn { path: artifacts.monitor.clone(), source })?;

    let mut fds: Vec<_> = channel.iter().map(AsFd::as_fd).collect();
    if let Some(files) = files {
        fds.extend([files.memory.as_fd(), files.state.as_fd(), files.key.as_fd()]);
    }
    send(&control, spec, &fds)?;
    tracing::debug!(
        pid = child.id(),
        jailed = spec.jail,
        restore = spec.restore,
        "monitor started"
    );

    let control = Arc::new(watch(control).map_err(host("watch the monitor"))?);
    let (sender, reported) = watch::channel(Reported::default());
    let listener = tokio::spawn(listen(control.clone(), sender));
    let (control, listener) = (Some(control), Some(listener));
    Ok(Monitor { child, jailed: spec.jail, control, listener, reported, spawned })
}

fn host(what: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::Host { what, source }
}

/// Sends one packet of JSON with descriptors.
fn send(
    control: impl AsFd,
    packet: &impl serde::Serialize,
    fds: &[BorrowedFd<'_>],
) -> Result<(), Error> {
    let what = "send a request to the monitor";
    let json = serde_json::to_vec(packet).map_err(|error| host(what)(error.into()))?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(fds));
    // A monitor that is dead already is found out by whoever waits for its answer.
    match sendmsg(control, &[IoSlice::new(&json)], &mut ancillary, SendFlags::NOSIGNAL) {
        Ok(_) | Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => Ok(()),
        Err(errno) => Err(host(what)(errno.into())),
    }
}

/// `recv(2)` is the same for sequenced packets as for datagrams, but that it returns 0 bytes at the end.
fn watch(control: OwnedFd) -> io::Result<UnixDatagram> {
    let control = std::os::unix::net::UnixDatagram::from(control);
    control.set_nonblocking(true)?;
    UnixDatagram::from_std(control)
}

/// Publishes what the monitor reports, until it has ended.
async fn listen(control: Arc<UnixDatagram>, reported: watch::Sender<Reported>) {
    let mut packet = vec![0; MAX_EVENT];
    let end = loop {
        let message = match control.recv(&mut packet).await {
            Ok(0) | Err(_) => {
                break End::Failed(
                    FailureCode::Killed,
                    "the monitor ended without a word; it may have been killed".into(),
                );
            }
            Ok(count) => serde_json::from_slice(&packet[..count]),
        };
        match message {
            Ok(Event::Entered { at_ns, jail }) => {
                tracing::debug!(jail = ?jail, "guest entered");
                reported.send_modify(|reported| {
                    (reported.entered, reported.jail) = (Some(at_ns), jail)
                });
            }
            Ok(Event::Ended { reason, detail, log, fault, .. }) => {
                let broken = |fault| format!("before that it broke a rule of a device: {fault}");
                let detail = detail.or(fault.map(broken));
                break End::Guest(GuestEnd { reason: in_words(reason, detail), log });
            }
            Ok(Event::Failed { code, error }) => break End::Failed(code, error),
            Ok(Event::Frozen) => {
                reported.send_modify(|reported| reported.frozen = true);
            }
            Ok(Event::Saved { .. } | Event::Recorded { .. }) => {
                break End::Saved;
            }
            Ok(Event::Prepared) => {
                reported.send_modify(|reported| reported.prepared = true);
            }
            Err(error) => {
                let reason = format!("the monitor reports what is no event: {error}");
                break End::Failed(FailureCode::Control, reason);
            }
        }
    };
    match &end {
        End::Failed(code, reason) => tracing::debug!(?code, reason, "monitor failed"),
        End::Guest(end) => tracing::debug!(reason = end.reason, "guest ended"),
        End::Saved => tracing::debug!("guest saved"),
    }
    reported.send_modify(|reported| reported.end = Some(end));
}

fn in_words(reason: EndReason, detail: Option<String>) -> String {
    let reason = match reason {
        EndReason::Reset => "it panicked, rebooted or crashed",
        EndReason::Stopped => "its monitor was told to stop",
        EndReason::Fault => "it broke the rules of a device",
        EndReason::Kvm => "KVM could not go on",
    };
    match detail {
        Some(detail) => format!("{reason} ({detail})"),
        None => reason.into(),
    }
}

impl Monitor {
    /// How the monitor ended. Waits until it has.
    pub async fn ended(&mut self) -> End {
        match self.reported.wait_for(|reported| reported.end.is_some()).await {
            Ok(reported) => reported.end.clone(),
            Err(_) => None,
        }
        .unwrap_or_else(|| End::Failed(FailureCode::Killed, "the monitor was stopped".into()))
    }

    /// Waits until everything is ready; false if it has ended instead.
    pub async fn prepared(&mut self) -> bool {
        let done =
            self.reported.wait_for(|reported| reported.prepared || reported.end.is_some()).await;
        done.is_ok_and(|reported| reported.end.is_none())
    }

    /// Has a monitor that was prepared run its guest, whose time starts now; the stream is the channel to the agent.
    pub fn go(&mut self) -> Result<UnixStream, Error> {
        let (channel, theirs) = channel()?;
        self.spawned = now_ns();
        if let Some(control) = &self.control {
            send(control, &Request::Go {}, &[theirs.as_fd()])?;
        }
        Ok(channel)
    }

    /// Waits until the guest waits to be saved; false if it has ended instead.
    pub async fn frozen(&mut self) -> bool {
        let done =
            self.reported.wait_for(|reported| reported.frozen || reported.end.is_some()).await;
        done.is_ok_and(|reported| reported.end.is_none())
    }

    /// Asks for something that the monitor answers with its end.
    pub async fn finish(&mut self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        if let Some(control) = &self.control {
            send(control, request, fds)?;
        }
        match self.ended().await {
            End::Saved => Ok(()),
            End::Failed(code, reason) => Err(Error::Monitor { code, reason }),
            End::Guest(end) => Err(Error::GuestEnded(end)),
        }
    }

    /// Ends the monitor and waits until its process is gone.
    pub async fn stop(&mut self) {
        self.control = None;
        if let Some(listener) = self.listener.take() {
            listener.abort();
            // Aborted or ended, the socket is closed once the task is gone.
            let _ = listener.await;
        }
        // A keeper kills its inmate when the control socket is closed, and waits for it.
        let cleared =
            self.jailed && tokio::time::timeout(CLEAR_LIMIT, self.child.wait()).await.is_ok();
        if cleared {
            return;
        }
        // A guest's memory is worth nothing now: there is no reason to ask first.
        let _ = self.child.start_kill();
        let _ = self.child.wait().await;
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        if let Some(listener) = self.listener.take() {
            listener.abort();
        }
    }
}
