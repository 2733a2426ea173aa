//! Protection against speculation across processes: other guests on the same core, and predictions
//! that they have trained. Whatever of it a host lacks is reported, and does not prevent a start.

use rustix::io::Errno;
use rustix::process::{
    SpeculationFeature, SpeculationFeatureControl, SpeculationFeatureState,
    control_speculative_feature, getpid, speculative_feature_state,
};
use rustix::thread::{CoreSchedulingScope, create_core_scheduling_cookie};
use serde::{Deserialize, Serialize};

/// `PR_SET_MEMORY_MERGE` of Linux 6.4; the headers of the C library are older.
const PR_SET_MEMORY_MERGE: libc::c_int = 67;

/// A protection of the monitor's process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protection {
    /// It is on, and cannot be turned off in this process.
    On,
    /// The processor does not have the weakness, or has no simultaneous multithreading.
    NotNeeded,
    /// The kernel was built or started without it.
    #[default]
    Unavailable,
}

/// Protections against speculation. All threads of the monitor inherit them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Speculation {
    /// Two threads of one core run this monitor, or one of them is idle (`PR_SCHED_CORE`).
    pub core_scheduling: Protection,
    /// Loads do not bypass earlier stores (`PR_SPEC_STORE_BYPASS`).
    pub store_bypass: Protection,
    /// Predictions of indirect branches are separate from those of other processes
    /// (`PR_SPEC_INDIRECT_BRANCH`).
    pub indirect_branch: Protection,
}

impl Speculation {
    /// Returns each protection with its name, for users.
    pub fn list(&self) -> [(&'static str, Protection); 3] {
        [
            ("core scheduling", self.core_scheduling),
            ("mitigation of speculative store bypass", self.store_bypass),
            ("mitigation of indirect branch speculation", self.indirect_branch),
        ]
    }
}

/// Protects this process, which has one thread, and the threads that it will start.
pub(super) fn restrict_speculation() -> Speculation {
    forbid_merging();
    Speculation {
        core_scheduling: create_core_cookie(),
        store_bypass: disable(SpeculationFeature::SpeculativeStoreBypass),
        indirect_branch: disable(SpeculationFeature::IndirectBranchSpeculation),
    }
}

/// Gives this process a core scheduling cookie of its own.
fn create_core_cookie() -> Protection {
    match create_core_scheduling_cookie(getpid(), CoreSchedulingScope::ThreadGroup) {
        Ok(()) => Protection::On,
        // No core has a second thread.
        Err(Errno::NODEV) => Protection::NotNeeded,
        Err(_) => Protection::Unavailable,
    }
}

fn disable(feature: SpeculationFeature) -> Protection {
    match control_speculative_feature(feature, SpeculationFeatureControl::FORCE_DISABLE) {
        Ok(()) => Protection::On,
        // The kernel refuses the request where the state does not depend on the process.
        Err(_) => judge_state(speculative_feature_state(feature)),
    }
}

/// Judges the state of a feature that a process cannot change.
fn judge_state(state: Result<Option<SpeculationFeatureState>, Errno>) -> Protection {
    match state {
        Ok(Some(state)) if state.is_empty() => Protection::NotNeeded,
        Ok(Some(state))
            if state.intersects(
                SpeculationFeatureState::DISABLE | SpeculationFeatureState::FORCE_DISABLE,
            ) =>
        {
            Protection::On
        }
        _ => Protection::Unavailable,
    }
}

/// Keeps the kernel from merging equal pages of guests (KSM), which the parent may have asked for:
/// the time of a write tells whether another guest has the same page.
fn forbid_merging() {
    // A kernel that does not know the request does not merge either.
    // SAFETY: the call takes numbers only.
    unsafe { libc::prctl(PR_SET_MEMORY_MERGE, 0, 0, 0, 0) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_of_a_mitigation_is_judged() {
        use SpeculationFeatureState as State;
        for (state, expected) in [
            (Ok(Some(State::empty())), Protection::NotNeeded),
            (Ok(Some(State::DISABLE)), Protection::On),
            (Ok(Some(State::PRCTL | State::FORCE_DISABLE)), Protection::On),
            (Ok(Some(State::ENABLE)), Protection::Unavailable),
            (Ok(Some(State::PRCTL | State::ENABLE)), Protection::Unavailable),
            (Ok(None), Protection::Unavailable),
            (Err(Errno::NODEV), Protection::Unavailable),
        ] {
            assert_eq!(judge_state(state), expected, "{state:?}");
        }
    }

    #[test]
    fn report_names_each_protection() {
        let json = serde_json::to_value(Speculation::default()).unwrap();
        for name in ["core_scheduling", "store_bypass", "indirect_branch"] {
            assert_eq!(json[name], "unavailable");
        }
    }
}
