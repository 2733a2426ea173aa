//! The CPUID of a guest: the leaves that KVM supports, without those that a sandbox has no use for,
//! and with a topology.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

use super::features::{hide_bits, is_visible};

const LEAF_1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF_1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF_1_EDX_HTT: u32 = 1 << 28;

/// Fits the CPUID that KVM supports to vCPU `index` of `vcpus`.
///
/// `has_tsc_deadline` is set if KVM emulates the TSC deadline timer, which it does not list by
/// itself; a guest with it needs neither calibration nor any other timer.
///
/// Leaves and features that a sandbox has no use for are hidden: see `features.rs`.
pub fn fit_to_vcpu(supported: &CpuId, index: u8, vcpus: u8, has_tsc_deadline: bool) -> CpuId {
    let mut cpuid = supported.clone();
    cpuid.retain(is_visible);
    for entry in cpuid.as_mut_slice() {
        hide_bits(entry);
        fit_entry(entry, index, vcpus, has_tsc_deadline);
    }
    for entry in topology(0xb, index, vcpus) {
        // The list has room for 256 entries, and KVM knows some 60; if it were full, the guest
        // would fall back on leaf 1.
        let _ = cpuid.push(entry);
    }
    cpuid
}

fn fit_entry(entry: &mut kvm_cpuid_entry2, index: u8, vcpus: u8, has_tsc_deadline: bool) {
    let id = u32::from(index);
    let count = u32::from(vcpus);
    match entry.function {
        0x1 => fit_features(entry, id, count, has_tsc_deadline),
        // Intel caches: the processors that share one (of the last level: all), and the number of
        // cores.
        0x4 if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 0x7;
            let sharing = if level >= 3 { count.next_power_of_two() - 1 } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharing << 14 | (count.next_power_of_two() - 1) << 26;
        }
        // AMD: cores, and the bits of the APIC id that number them.
        0x8000_0008 => {
            entry.ecx = entry.ecx & !0xf0ff | count.next_power_of_two().ilog2() << 12 | (count - 1)
        }
        // AMD caches, as in leaf 4.
        0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 0x7;
            let sharing = if level >= 3 { count - 1 } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharing << 14;
        }
        // AMD: extended APIC id, one thread per core, one node.
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
        _ => {}
    }
}

/// Fits leaf 1: APIC id, number of processors, features.
fn fit_features(entry: &mut kvm_cpuid_entry2, id: u32, count: u32, has_tsc_deadline: bool) {
    entry.ebx = entry.ebx & 0x0000_ffff | id << 24 | count.next_power_of_two() << 16;
    entry.ecx &= !LEAF_1_ECX_TSC_DEADLINE;
    entry.ecx |= LEAF_1_ECX_HYPERVISOR;
    if has_tsc_deadline {
        entry.ecx |= LEAF_1_ECX_TSC_DEADLINE;
    }
    entry.edx = entry.edx & !LEAF_1_EDX_HTT | if count > 1 { LEAF_1_EDX_HTT } else { 0 };
}

/// Returns the extended topology (leaf 0xb): one thread per core, all cores in one package.
fn topology(function: u32, index: u8, vcpus: u8) -> [kvm_cpuid_entry2; 3] {
    const SIGNIFICANT_INDEX: u32 = 1;
    let level = |number: u32, kind: u32, shift: u32, processors: u32| kvm_cpuid_entry2 {
        function,
        index: number,
        flags: SIGNIFICANT_INDEX,
        eax: shift,
        ebx: processors,
        ecx: number | kind << 8,
        edx: u32::from(index),
        ..Default::default()
    };
    let bits = vcpus.next_power_of_two().ilog2();
    [level(0, 1, 0, 1), level(1, 2, bits, u32::from(vcpus)), level(2, 0, 0, 0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> CpuId {
        let leaf = |function| kvm_cpuid_entry2 {
            function,
            eax: !0,
            ebx: !0,
            ecx: !0,
            edx: !0,
            ..Default::default()
        };
        let functions = [0x1, 0x7, 0xa, 0xb, 0x4000_0001, 0x8000_0001];
        CpuId::from_entries(&functions.map(leaf)).unwrap()
    }

    fn leaf(cpuid: &CpuId, function: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|entry| entry.function == function).unwrap()
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id() {
        for index in 0..8 {
            let cpuid = fit_to_vcpu(&supported(), index, 8, true);
            assert_eq!(leaf(&cpuid, 1).ebx >> 24, u32::from(index));
            assert_eq!(leaf(&cpuid, 0xb).edx, u32::from(index));
        }
    }

    #[test]
    fn unneeded_features_are_removed() {
        let cpuid = fit_to_vcpu(&supported(), 0, 1, false);
        let vmx = 1 << 5;
        assert_eq!(leaf(&cpuid, 1).ecx & (vmx | LEAF_1_ECX_TSC_DEADLINE), 0);
        assert!(cpuid.as_slice().iter().all(|entry| entry.function != 0xa));
        // Asynchronous page faults.
        assert_eq!(leaf(&cpuid, 0x4000_0001).eax & (1 << 4 | 1 << 10 | 1 << 14), 0);
        assert_ne!(leaf(&cpuid, 1).ecx & LEAF_1_ECX_HYPERVISOR, 0);
    }
}
