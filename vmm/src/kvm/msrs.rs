//! Model-specific registers: reading, writing, and the list of those worth saving.

use std::ops::RangeInclusive;

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use super::error::{During, KvmError};

/// `IA32_TIME_STAMP_COUNTER`.
pub(super) const MSR_TSC: u32 = 0x10;
/// `IA32_TSC_DEADLINE`.
pub(super) const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// The registers that KVM adds: clocks, asynchronous page faults, stolen time, end of interrupt.
/// KVM lists most of them.
pub(super) const KVM_MSRS: RangeInclusive<u32> = 0x4b56_4d00..=0x4b56_4dff;

/// The memory type range registers, which KVM keeps and does not list.
const MTRRS: [RangeInclusive<u32>; 5] =
    [0x200..=0x20f, 0x250..=0x250, 0x258..=0x259, 0x268..=0x26f, 0x2ff..=0x2ff];

/// `MSR_KVM_WALL_CLOCK`, old and new. Writing one makes KVM write the time of day into guest
/// memory, and nothing else: a guest does it when it needs the time, and a restored one would only
/// copy a page.
const WALL_CLOCK_MSRS: [u32; 2] = [0x11, 0x4b56_4d00];

/// Lists the registers that may be worth saving. The time stamp counter and its deadline are saved
/// separately.
pub(super) fn list_saved_msrs(kvm: &Kvm) -> Result<Vec<u32>, KvmError> {
    let listed = kvm.get_msr_index_list().during("list model-specific registers")?;
    let mut indices = listed.as_slice().to_vec();
    indices.extend(KVM_MSRS);
    indices.extend(MTRRS.into_iter().flatten());
    indices.retain(|index| {
        !matches!(*index, MSR_TSC | MSR_TSC_DEADLINE) && !WALL_CLOCK_MSRS.contains(index)
    });
    indices.sort_unstable();
    indices.dedup();
    Ok(indices)
}

/// Reads a register. Returns `None` if the vCPU does not have it.
pub(super) fn read_msr(vcpu: &VcpuFd, index: u32) -> Option<u64> {
    let mut msrs = Msrs::from_entries(&[kvm_msr_entry { index, ..Default::default() }]).ok()?;
    (vcpu.get_msrs(&mut msrs).ok()? == 1).then(|| msrs.as_slice()[0].data)
}

/// Writes registers, each by index and value.
///
/// # Errors
/// KVM does not set all of them.
pub(super) fn write_msrs(vcpu: &VcpuFd, values: &[(u32, u64)]) -> Result<(), KvmError> {
    let requested = values.len();
    let entries: Vec<_> = values
        .iter()
        .map(|(index, data)| kvm_msr_entry { index: *index, data: *data, ..Default::default() })
        .collect();
    let msrs = Msrs::from_entries(&entries).map_err(|_| KvmError::Msrs { done: 0, requested })?;
    let done = vcpu.set_msrs(&msrs).during("set model-specific registers")?;
    if done == requested { Ok(()) } else { Err(KvmError::Msrs { done, requested }) }
}
