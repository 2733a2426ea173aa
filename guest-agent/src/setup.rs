//! Sets up the agent and its sandbox, until the event loop starts.
//!
//! The order is chosen for boot time. The host answers the connection while the file systems are
//! made, and does its own work after `Ready` while the agent completes the steps that no request
//! can precede: requests wait in the channel until the event loop starts.

use crate::cgroup::pids_v1::PidsCgroup;
use crate::cgroup::{Cgroups, WorkloadCgroup};
use crate::copy_jobs::CopyJobs;
use crate::descriptors::fill_standard_fds;
use crate::egress::Egress;
use crate::error::{Context, Error, SystemError};
use crate::event_loop::Agent;
use crate::identity::Identity;
use crate::io::channel::Channel;
use crate::io::poll::{EventFlags, Token};
use crate::io::transport::{Transport, send_ready};
use crate::io::vsock::{CONNECT_TIMEOUT, UnconnectedSocket};
use crate::limit_watch::LimitWatch;
use crate::lockdown::{Lockdown, limits};
use crate::mode::Mode;
use crate::processes::Processes;
use crate::root_fs::{self, AgentView};
use crate::secrets::Secrets;
use crate::signals::SignalFd;
use crate::{kernel, log_line, loopback};

impl Agent {
    /// Sets up the sandbox and reports that it is ready. `started_ns` is the time at which this
    /// program began (`CLOCK_BOOTTIME`).
    pub fn set_up(mode: Mode, started_ns: u64) -> Result<Agent, Error> {
        fill_standard_fds()?;
        let (channel, next_socket) = open_channel(mode)?;
        let view =
            if mode.build_root { Some(root_fs::build_root(mode.is_microvm())?) } else { None };
        let signals = SignalFd::open(mode)?;
        channel.await_connection(Some(CONNECT_TIMEOUT))?;
        let connection = send_ready(&channel, started_ns);

        protect_agent();
        if mode.stdio && !mode.build_root {
            root_fs::own_work_directory()?;
        }
        if mode.is_microvm() {
            kernel::set_parameters()?;
        }
        let lockdown = Lockdown::apply_to_agent()?;
        let mut cgroups = Cgroups::default();
        let (mut root, mut scratch_disk) = (None, None);
        if let Some(view) = view {
            kernel::set_up_network()?;
            cgroups.v2 = create_workload_cgroup(mode, &view)?;
            (root, scratch_disk) = (Some(view.root), Some(view.scratch));
        } else if rustix::process::getpid().is_init() {
            loopback::configure_in_container();
        }
        if mode.own_kernel {
            cgroups.pids_v1 = create_pids_cgroup();
        }
        let limit_watch = LimitWatch::open(&cgroups, scratch_disk.as_ref());
        let copies = CopyJobs::new(root)?;

        let transport = Transport::new(channel, connection)?;
        transport
            .poll
            .add(&signals, Token::Signals, EventFlags::IN)
            .and_then(|()| transport.poll.add(copies.wake_fd(), Token::CopyJobs, EventFlags::IN))
            .context("watch", "a descriptor")?;
        Ok(Agent {
            transport,
            signals,
            identity: Identity::new(next_socket),
            processes: Processes::default(),
            secrets: Secrets::new(mode.build_root),
            copies,
            egress: Egress::default(),
            lockdown,
            cgroups,
            scratch_disk,
            limit_watch,
        })
    }
}

/// Opens the channel, which in a microVM is not connected yet, and the socket of the channel after
/// a freeze.
fn open_channel(mode: Mode) -> Result<(Channel, Option<UnconnectedSocket>), SystemError> {
    if mode.is_microvm() {
        let channel = Channel::Vsock(UnconnectedSocket::open()?.start_connect()?);
        Ok((channel, Some(UnconnectedSocket::open()?)))
    } else {
        Ok((Channel::take_stdio()?, None))
    }
}

/// Protects the agent from the workload. These steps can fail for lack of rights in a container,
/// and the agent is safe without them.
fn protect_agent() {
    // No process of the workload's user may inspect the agent, not even between fork and exec.
    let _ = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable);
    // Orphans become children of the agent even where it is not PID 1.
    let _ = rustix::process::set_child_subreaper(Some(rustix::process::getpid()));
    let _ = limits::set_oom_score(c"-1000");
    limits::raise_open_files();
}

fn create_workload_cgroup(
    mode: Mode,
    view: &AgentView,
) -> Result<Option<WorkloadCgroup>, SystemError> {
    match WorkloadCgroup::create(&view.cgroup) {
        // Outside a microVM the hierarchy belongs to another system, which may deny this.
        Err(error) if !mode.is_microvm() => {
            log_line(error);
            Ok(None)
        }
        created => created.map(Some),
    }
}

/// Creates the cgroup that counts processes. A kernel that cannot count them is reported when the
/// host asks for a limit.
fn create_pids_cgroup() -> Option<PidsCgroup> {
    PidsCgroup::create().inspect_err(|error| log_line(error)).ok()
}
