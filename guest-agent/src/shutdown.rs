//! The end of a sandbox. It ends with its channel, whatever still runs in it.

use std::time::Duration;

use rustix::process::{Pid, Signal, WaitOptions};
use rustix::system::RebootCommand;

/// The rounds of [`kill_descendants`]. Children of killed processes become the agent's, and are
/// found in the next round. A fork bomb could continue forever; a container runtime then ends the
/// rest with PID 1.
const KILL_ROUNDS: usize = 200;

/// Resets the machine, which with `reboot=t` is a triple fault and needs no device. There is
/// nothing to flush, because everything that can be written is in memory.
pub fn reset_machine() -> ! {
    let refused = rustix::system::reboot(RebootCommand::Restart);
    crate::log_line(format_args!("cannot reset the machine: {refused:?}"));
    // The end of PID 1 is a kernel panic, which resets the machine as well.
    std::process::exit(1)
}

/// Kills all descendants of the agent, which is their subreaper.
pub fn kill_descendants() {
    for _ in 0..KILL_ROUNDS {
        let children = std::fs::read_to_string("/proc/thread-self/children").unwrap_or_default();
        for pid in
            children.split_ascii_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?))
        {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(_) => return,
            }
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}
