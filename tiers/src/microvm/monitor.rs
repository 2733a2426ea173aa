//! The process of a monitor, seen from the library.
//!
//! Two socket pairs connect the monitor to this process and have no name anywhere: the control
//! socket is its standard input, and the channel's descriptor arrives on a packet of the control
//! socket. The monitor ends when its control socket closes, which also happens when this process is
//! killed.
//!
//! The child of this process is the supervisor of a jail and the guest runs in the supervisor's
//! child, unless the jail is turned off.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use chitin_spec::EndCause;
use chitin_vmm::control::Request;
use chitin_vmm::jail::Jail;
use chitin_vmm::{EndReason, Event, FailureCode, HostError, VmSpec};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
    sendmsg, socketpair,
};
use tokio::net::UnixDatagram;
use tokio::process::Child;
use tokio::sync::watch;

use crate::clock::monotonic_ns;
use crate::{Artifacts, Error, GuestEnd, GuestFiles};

/// Largest packet from a monitor. Its last one carries 32 KiB of log, at most six bytes each in
/// JSON.
const MAX_EVENT: usize = 256 * 1024;

/// Maximum descriptors of one packet: a channel and the three files of a template.
const MAX_FDS: usize = 4;

/// Time within which the kernel must have removed a guest. A longer time is a fault of the host.
const REMOVAL_LIMIT: Duration = Duration::from_secs(20);

/// The reports of a monitor so far.
#[derive(Debug, Clone, Default)]
pub struct Reported {
    /// Moment of the first entry into the guest, `CLOCK_MONOTONIC` nanoseconds.
    pub entered: Option<u64>,
    /// The guest is ready and waits for its channel.
    pub prepared: bool,
    /// The jail of the monitor.
    pub jail: Option<Jail>,
    /// The guest is frozen and waits to be saved.
    pub frozen: bool,
    /// End of the monitor.
    pub end: Option<MonitorEnd>,
}

/// The end of a monitor.
#[derive(Debug, Clone)]
pub enum MonitorEnd {
    /// The monitor could not start the guest.
    Failed {
        /// Cause, for programs.
        code: FailureCode,
        /// Message with the remedy, for people.
        message: String,
    },
    /// The guest ended after it had been entered.
    Guest(GuestEnd),
    /// The guest was saved, or its working set recorded.
    Saved,
}

/// A running monitor. Dropping it ends the monitor.
#[derive(Debug)]
pub struct Monitor {
    /// The monitor, or the supervisor of its jail.
    child: Child,
    /// The child is the supervisor of a jail.
    jailed: bool,
    /// Our end of the control socket. Closing it stops the monitor.
    control: Option<Arc<UnixDatagram>>,
    listener: Option<tokio::task::JoinHandle<()>>,
    /// The reports so far.
    pub reported: watch::Receiver<Reported>,
    /// Start of the process, `CLOCK_MONOTONIC` nanoseconds.
    pub spawned: u64,
}

/// Starts a monitor, with the guest's files if it restores one. Returns it with the channel to the
/// agent.
pub fn launch_monitor(
    artifacts: &Artifacts,
    spec: &VmSpec,
    files: Option<&GuestFiles>,
) -> Result<(Monitor, UnixStream), Error> {
    let (channel, theirs) = create_channel()?;
    let monitor = spawn_monitor(artifacts, spec, files, Some(theirs))?;
    Ok((monitor, channel))
}

/// Starts a monitor that prepares the guest and then waits for [`Monitor::enter_guest`].
pub fn prepare_monitor(
    artifacts: &Artifacts,
    spec: &VmSpec,
    files: Option<&GuestFiles>,
) -> Result<Monitor, Error> {
    let spec = VmSpec { prepared: true, ..spec.clone() };
    spawn_monitor(artifacts, &spec, files, None)
}

/// Creates a channel and returns our end and the monitor's.
fn create_channel() -> Result<(UnixStream, OwnedFd), Error> {
    let (ours, theirs) = UnixStream::pair().map_err(HostError::during("create a socket pair"))?;
    Ok((ours, theirs.into()))
}

fn spawn_monitor(
    artifacts: &Artifacts,
    spec: &VmSpec,
    files: Option<&GuestFiles>,
    channel: Option<OwnedFd>,
) -> Result<Monitor, Error> {
    let (control, control_theirs) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(HostError::during("create a socket pair"))?;

    let spawned = monotonic_ns();
    let child = tokio::process::Command::new(&artifacts.monitor)
        // Our environment may hold secrets, and the monitor needs nothing of it.
        .env_clear()
        .stdin(Stdio::from(control_theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::inherit())
        // This process handles Ctrl-C; the monitor must not get the signal first.
        .process_group(0)
        // A supervisor must live on to remove its child after the control socket has closed.
        .kill_on_drop(!spec.jail)
        .spawn()
        .map_err(|source| Error::Spawn { path: artifacts.monitor.clone(), source })?;

    let mut fds: Vec<_> = channel.iter().map(AsFd::as_fd).collect();
    if let Some(files) = files {
        fds.extend([files.memory.as_fd(), files.state.as_fd(), files.key.as_fd()]);
    }
    send_packet(&control, spec, &fds)?;
    tracing::debug!(
        pid = child.id(),
        jailed = spec.jail,
        restore = spec.restore,
        "monitor started"
    );

    let control = Arc::new(into_datagram(control).map_err(HostError::during("watch the monitor"))?);
    let (sender, reported) = watch::channel(Reported::default());
    let listener = tokio::spawn(receive_events(control.clone(), sender));
    let (control, listener) = (Some(control), Some(listener));
    Ok(Monitor { child, jailed: spec.jail, control, listener, reported, spawned })
}

/// Sends one packet of JSON with descriptors.
fn send_packet(
    control: impl AsFd,
    packet: &impl serde::Serialize,
    fds: &[BorrowedFd<'_>],
) -> Result<(), Error> {
    let operation = "send a request to the monitor";
    let json = serde_json::to_vec(packet).map_err(HostError::during(operation))?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(fds));
    // The wait for the answer reports a monitor that has ended already.
    match sendmsg(control, &[IoSlice::new(&json)], &mut ancillary, SendFlags::NOSIGNAL) {
        Ok(_) | Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => Ok(()),
        Err(errno) => Err(HostError::during(operation)(errno).into()),
    }
}

/// Converts the socket for tokio. `recv(2)` treats sequenced packets like datagrams, except that it
/// returns 0 bytes at the end.
fn into_datagram(control: OwnedFd) -> io::Result<UnixDatagram> {
    let control = std::os::unix::net::UnixDatagram::from(control);
    control.set_nonblocking(true)?;
    UnixDatagram::from_std(control)
}

/// Publishes the reports of the monitor until it has ended.
async fn receive_events(control: Arc<UnixDatagram>, reported: watch::Sender<Reported>) {
    let mut packet = vec![0; MAX_EVENT];
    let end = loop {
        let message = match control.recv(&mut packet).await {
            Ok(0) | Err(_) => {
                break MonitorEnd::Failed {
                    code: FailureCode::Killed,
                    message: "the monitor ended without a report: it may have been killed".into(),
                };
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
                let broken = |fault| format!("after a device fault: {fault}");
                let detail = detail.or(fault.map(broken));
                let cause = classify_end(reason);
                let reason = describe_end(reason, detail);
                break MonitorEnd::Guest(GuestEnd { cause, reason, log });
            }
            Ok(Event::Failed { code, error }) => {
                break MonitorEnd::Failed { code, message: error };
            }
            Ok(Event::Frozen) => {
                reported.send_modify(|reported| reported.frozen = true);
            }
            Ok(Event::Saved { .. } | Event::Recorded { .. }) => {
                break MonitorEnd::Saved;
            }
            Ok(Event::Prepared) => {
                reported.send_modify(|reported| reported.prepared = true);
            }
            Err(error) => {
                let message = format!("the monitor sent an invalid event: {error}");
                break MonitorEnd::Failed { code: FailureCode::Control, message };
            }
        }
    };
    match &end {
        MonitorEnd::Failed { code, message } => tracing::debug!(?code, message, "monitor failed"),
        MonitorEnd::Guest(end) => tracing::debug!(reason = end.reason, "guest ended"),
        MonitorEnd::Saved => tracing::debug!("guest saved"),
    }
    reported.send_modify(|reported| reported.end = Some(end));
}

fn classify_end(reason: EndReason) -> EndCause {
    match reason {
        EndReason::Reset => EndCause::GuestPanic,
        EndReason::Fault => EndCause::GuestFault,
        // Only the host stops a monitor or closes its sockets, and this process has not.
        EndReason::Stopped | EndReason::Kvm => EndCause::Host,
    }
}

fn describe_end(reason: EndReason, detail: Option<String>) -> String {
    let reason = match reason {
        EndReason::Reset => "it panicked, rebooted or crashed",
        EndReason::Stopped => "its monitor was told to stop",
        EndReason::Fault => "it broke the rules of a device",
        EndReason::Kvm => "KVM could not continue",
    };
    match detail {
        Some(detail) => format!("{reason} ({detail})"),
        None => reason.into(),
    }
}

impl Monitor {
    /// Waits for the end of the monitor and returns it.
    pub async fn wait_for_end(&mut self) -> MonitorEnd {
        match self.reported.wait_for(|reported| reported.end.is_some()).await {
            Ok(reported) => reported.end.clone(),
            Err(_) => None,
        }
        .unwrap_or_else(|| MonitorEnd::Failed {
            code: FailureCode::Killed,
            message: "the monitor was stopped".into(),
        })
    }

    /// Waits until the guest is prepared. Returns false if the monitor has ended instead.
    pub async fn wait_until_prepared(&mut self) -> bool {
        let done =
            self.reported.wait_for(|reported| reported.prepared || reported.end.is_some()).await;
        done.is_ok_and(|reported| reported.end.is_none())
    }

    /// Enters a prepared guest, whose time starts now. Returns the channel to the agent.
    pub fn enter_guest(&mut self) -> Result<UnixStream, Error> {
        let (channel, theirs) = create_channel()?;
        self.spawned = monotonic_ns();
        if let Some(control) = &self.control {
            send_packet(control, &Request::Go {}, &[theirs.as_fd()])?;
        }
        Ok(channel)
    }

    /// Waits until the guest is frozen. Returns false if the monitor has ended instead.
    pub async fn wait_until_frozen(&mut self) -> bool {
        let done =
            self.reported.wait_for(|reported| reported.frozen || reported.end.is_some()).await;
        done.is_ok_and(|reported| reported.end.is_none())
    }

    /// Sends a request that ends the monitor, and waits for the end.
    ///
    /// # Errors
    /// Fails if the monitor ended for another reason.
    pub async fn send_last_request(
        &mut self,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), Error> {
        if let Some(control) = &self.control {
            send_packet(control, request, fds)?;
        }
        match self.wait_for_end().await {
            MonitorEnd::Saved => Ok(()),
            MonitorEnd::Failed { code, message } => Err(Error::Monitor { code, message }),
            MonitorEnd::Guest(end) => Err(Error::GuestEnded(end)),
        }
    }

    /// Ends the monitor and waits until its process is gone.
    pub async fn stop(&mut self) {
        self.control = None;
        if let Some(listener) = self.listener.take() {
            listener.abort();
            // The socket is closed once the task has ended.
            let _ = listener.await;
        }
        // When the control socket closes, a supervisor kills its child and waits for it.
        let removed =
            self.jailed && tokio::time::timeout(REMOVAL_LIMIT, self.child.wait()).await.is_ok();
        if removed {
            return;
        }
        // Nothing in the guest is worth a clean shutdown.
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

#[cfg(test)]
#[path = "monitor_test.rs"]
mod tests;
