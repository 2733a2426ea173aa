use serde::Serialize;

/// Where the time of one sandbox went. Each moment is measured from [`spawned`](Phases::spawned), in nanoseconds of
/// `CLOCK_MONOTONIC`; `None` means that it was not reached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Phases {
    /// When the monitor's process was started, on the clock itself.
    #[serde(skip)]
    pub spawned: u64,
    /// The monitor was about to run the guest's first instruction.
    pub entered_ns: Option<u64>,
    /// The kernel had started the agent: the hello less the time the agent says it took to get there.
    pub kernel_ns: Option<u64>,
    /// The agent's hello was read.
    pub agent_ns: Option<u64>,
    /// The first byte of workload output was read.
    pub exec_ns: Option<u64>,
    /// The end of the workload was read.
    pub exit_ns: Option<u64>,
}
