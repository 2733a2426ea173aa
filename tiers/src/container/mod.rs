//! The common part of the container tiers: the agent is PID 1, the channel is its standard input
//! and output, and the root is the read-only one of microVMs, as an archive.

mod leftovers;
mod limits;
mod log;
mod owner;
mod root_archive;

use std::time::Duration;

pub(crate) use leftovers::report_leftover;
pub use leftovers::take_leftovers;
pub(crate) use limits::{
    CREDENTIAL_BYTES, CREDENTIALS, Limits, read_only_mount_bytes, scratch_mounts,
};
pub(crate) use log::Log;
pub(crate) use owner::Owner;
pub(crate) use root_archive::RootArchive;

use chitin_vmm::HostError;

use crate::Error;

/// The command of every container.
pub(crate) const AGENT: [&str; 2] = ["/init", "--stdio"];

/// The host name in every container.
pub(crate) const HOST_NAME: &str = "chitin";

/// Capabilities of the agent, which drops them before the workload starts: to change the user and
/// empty the bounding set, to end the user's processes, to copy files in and out, to pass on
/// CAP_NET_BIND_SERVICE, and to add an address to the loopback interface of the container's network
/// namespace. The agent itself gives up the last one before it reads a message of the host.
pub(crate) const CAPABILITIES: [&str; 9] = [
    "SETUID",
    "SETGID",
    "SETPCAP",
    "KILL",
    "CHOWN",
    "FOWNER",
    "DAC_OVERRIDE",
    "NET_BIND_SERVICE",
    "NET_ADMIN",
];

/// Time within which the agent must answer. It takes less than a second; a loaded, emulated machine
/// takes longer.
pub(crate) const START_LIMIT: Duration = Duration::from_secs(60);

/// Time within which a container must end. The agent ends with its channel, and the container with
/// the agent, in milliseconds.
pub(crate) const STOP_LIMIT: Duration = Duration::from_secs(10);

/// Returns a random container name.
pub(crate) fn random_name() -> Result<String, Error> {
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(HostError::during("get random bytes"))?;
    Ok(format!("chitin-{:016x}", u64::from_ne_bytes(random)))
}
