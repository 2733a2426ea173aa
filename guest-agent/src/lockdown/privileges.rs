//! Users and capabilities.

use rustix::fs::{Gid, Uid};
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, CapabilitySets};

/// The capability that a workload keeps, so that it can serve port 80 as an ordinary user.
const KEPT: CapabilitySet = CapabilitySet::NET_BIND_SERVICE;

/// Removes every capability but [`KEPT`] from the agent's bounding set.
///
/// Capabilities that the agent does not have are skipped. A container's bounding set does not have
/// them either, because its runtime makes both sets of one list, and a call for each of forty takes
/// milliseconds under gVisor.
pub fn shrink_bounding_set(permitted: CapabilitySet) -> Result<(), Errno> {
    let all = (0..u64::BITS).map(|number| CapabilitySet::from_bits_retain(1 << number));
    all.filter(|&capability| permitted.contains(capability) && capability != KEPT)
        .try_for_each(rustix::thread::remove_capability_from_bounding_set)
}

/// Drops all privileges of the child except those of the user and [`KEPT`]. `permitted` are the
/// agent's capabilities, which this step needs. An agent that is an ordinary user can only stay
/// that user, so `uid` and `gid` have to be its own.
///
/// Makes system calls only.
pub fn switch_user(uid: u32, gid: u32, permitted: CapabilitySet) -> Result<(), Errno> {
    rustix::thread::set_keep_capabilities(true)?;
    if permitted.contains(CapabilitySet::SETGID) {
        rustix::thread::set_thread_groups(&[])?;
    }
    // The child has one thread. The C library's functions would try to reach all threads of the
    // agent.
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    rustix::thread::set_thread_res_gid(gid, gid, gid)?;
    rustix::thread::set_thread_res_uid(uid, uid, uid)?;
    let kept = KEPT & permitted;
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: kept };
    rustix::thread::set_capabilities(None, sets)?;
    match rustix::thread::clear_ambient_capability_set() {
        // gVisor has no ambient set. There the exec drops every capability, which is more than
        // asked.
        Err(Errno::INVAL) => return Ok(()),
        other => other?,
    }
    if !kept.is_empty() {
        rustix::thread::configure_capability_in_ambient_set(kept, true)?;
    }
    Ok(())
}
