use serde::Serialize;

/// The times at which one sandbox reached its phases, in nanoseconds of `CLOCK_MONOTONIC` since
/// [`spawned`](Phases::spawned). `None` means that the phase was not reached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Phases {
    /// The launch began, for a microVM with its monitor's process. The time of the clock itself.
    #[serde(skip)]
    pub spawned: u64,
    /// The monitor was about to run the guest's first instruction.
    pub entered_ns: Option<u64>,
    /// The kernel had started the agent: the time of the agent's hello less the time that the agent
    /// reports to have spent until then.
    pub kernel_ns: Option<u64>,
    /// The agent's hello was read.
    pub agent_ns: Option<u64>,
    /// The first byte of workload output was read.
    pub exec_ns: Option<u64>,
    /// The end of the workload was read.
    pub exit_ns: Option<u64>,
}
