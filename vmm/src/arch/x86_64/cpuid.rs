//! What a guest is told about its processor: what KVM supports, less what a sandbox has no use for, with a topology.

use std::fmt;

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

use crate::state::Malformed;
use crate::state::wire::{Reader, Writer};

const LEAF_1_ECX_VMX: u32 = 1 << 5;
const LEAF_1_ECX_PDCM: u32 = 1 << 15;
const LEAF_1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF_1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF_1_EDX_HTT: u32 = 1 << 28;
const LEAF_7_EBX_SGX: u32 = 1 << 2;
const LEAF_7_ECX_SGX_LC: u32 = 1 << 30;
/// `KVM_FEATURE_ASYNC_PF` of the leaf of KVM's features, and what it can be done by (Documentation/virt/kvm/x86/cpuid.rst).
const LEAF_4000_0001_EAX_ASYNC_PF: u32 = 1 << 4 | 1 << 10 | 1 << 14;
const LEAF_8000_0001_ECX_SVM: u32 = 1 << 2;
const LEAF_8000_0001_ECX_PERFCTR: u32 = 1 << 23 | 1 << 24 | 1 << 28;

/// Fits what KVM supports to one vCPU of `vcpus`.
///
/// `deadline` says whether KVM emulates the TSC deadline timer, which it does not list by itself; a guest with it needs
/// neither calibration nor any other timer.
///
/// Taken out: nested virtualization and SGX, which are large and have been attacked; performance counters, which measure what
/// else the host does; and asynchronous page faults, for which every copy of a template would be interrupted before it does
/// anything else, where a sandbox has little else to do while a page comes. Mitigations and their feature bits stay.
pub fn for_vcpu(supported: &CpuId, index: u8, vcpus: u8, deadline: bool) -> CpuId {
    let mut cpuid = supported.clone();
    cpuid.retain(|entry| !matches!(entry.function, 0xb | 0x1f));
    for entry in cpuid.as_mut_slice() {
        fit(entry, index, vcpus, deadline);
    }
    for entry in topology(0xb, index, vcpus) {
        // The list has room for 256 entries and KVM knows some 60; were it full, the guest would fall back on leaf 1.
        let _ = cpuid.push(entry);
    }
    cpuid
}

/// What a guest can tell of the processor it runs on. A guest that was saved goes on only where this is the same: it has
/// looked once, when it booted, and relies on what it found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Processor {
    vendor: [u8; 12],
    /// Family, model and stepping, as leaf 1 packs them.
    signature: u32,
    /// Over everything that the first vCPU is told. No digest in the sense of cryptography: it tells apart processors and
    /// kernels, which do not try to look alike.
    told: [u64; 2],
}

impl Processor {
    /// The processor that CPUID describes like this.
    pub fn of(cpuid: &CpuId) -> Self {
        let mut this = Self { vendor: [0; 12], signature: 0, told: [0x6368_6974_696e, 1] };
        for entry in cpuid.as_slice() {
            match entry.function {
                0 => {
                    for (bytes, register) in
                        this.vendor.chunks_mut(4).zip([entry.ebx, entry.edx, entry.ecx])
                    {
                        bytes.copy_from_slice(&register.to_le_bytes());
                    }
                }
                1 => this.signature = entry.eax,
                _ => {}
            }
            let kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, .. } = *entry;
            for word in [function, index, flags, eax, ebx, ecx, edx] {
                let [first, second] = &mut this.told;
                *first =
                    (*first ^ u64::from(word)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
                *second = second.wrapping_add(*first).rotate_left(17) ^ u64::from(word);
            }
        }
        this
    }

    /// Writes all of it.
    pub fn encode(&self, writer: &mut Writer) {
        writer.plain(&self.vendor);
        writer.plain(&self.signature);
        writer.plain(&self.told);
    }

    /// Reads it back.
    ///
    /// # Errors
    /// There are not enough bytes.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Self { vendor: reader.plain()?, signature: reader.plain()?, told: reader.plain()? })
    }
}

impl fmt::Display for Processor {
    /// As `/proc/cpuinfo` numbers them; what is told beyond that is shown as a few digits, which differ if it does.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let field = |shift: u32, mask: u32| self.signature >> shift & mask;
        let family = field(8, 0xf) + if field(8, 0xf) == 0xf { field(20, 0xff) } else { 0 };
        let model = field(4, 0xf) + (field(16, 0xf) << 4);
        let told = self.told[0] & 0xffff_ffff;
        let vendor = String::from_utf8_lossy(&self.vendor);
        write!(f, "{vendor} {family}/{model}/{} with features {told:08x}", field(0, 0xf))
    }
}

fn fit(entry: &mut kvm_cpuid_entry2, index: u8, vcpus: u8, deadline: bool) {
    let id = u32::from(index);
    let count = u32::from(vcpus);
    match entry.function {
        0x1 => {
            entry.ebx = entry.ebx & 0x0000_ffff | id << 24 | count.next_power_of_two() << 16;
            entry.ecx &= !(LEAF_1_ECX_VMX | LEAF_1_ECX_PDCM | LEAF_1_ECX_TSC_DEADLINE);
            entry.ecx |= LEAF_1_ECX_HYPERVISOR;
            if deadline {
                entry.ecx |= LEAF_1_ECX_TSC_DEADLINE;
            }
            entry.edx = entry.edx & !LEAF_1_EDX_HTT | if vcpus > 1 { LEAF_1_EDX_HTT } else { 0 };
        }
        // Intel caches: how many processors share one (the last level: all), and how many cores there are.
        0x4 if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 0x7;
            let sharing = if level >= 3 { count.next_power_of_two() - 1 } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharing << 14 | (count.next_power_of_two() - 1) << 26;
        }
        0x7 if entry.index == 0 => {
            entry.ebx &= !LEAF_7_EBX_SGX;
            entry.ecx &= !LEAF_7_ECX_SGX_LC;
        }
        // Performance counters, SGX, SVM, AMD's performance counters.
        0xa | 0x12 | 0x8000_000a | 0x8000_0022 => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        0x4000_0001 => entry.eax &= !LEAF_4000_0001_EAX_ASYNC_PF,
        0x8000_0001 => entry.ecx &= !(LEAF_8000_0001_ECX_SVM | LEAF_8000_0001_ECX_PERFCTR),
        // AMD: cores, and bits of the APIC id that number them.
        0x8000_0008 => {
            entry.ecx = entry.ecx & !0xf0ff | count.next_power_of_two().ilog2() << 12 | (count - 1)
        }
        // AMD caches, as with leaf 4.
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

/// Extended topology (leaf 0xb): one thread per core, all cores in one package.
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
        CpuId::from_entries(&[
            leaf(0x1),
            leaf(0x7),
            leaf(0xa),
            leaf(0xb),
            leaf(0x4000_0001),
            leaf(0x8000_0001),
        ])
        .unwrap()
    }

    fn leaf(cpuid: &CpuId, function: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|entry| entry.function == function).unwrap()
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id() {
        for index in 0..8 {
            let cpuid = for_vcpu(&supported(), index, 8, true);
            assert_eq!(leaf(&cpuid, 1).ebx >> 24, u32::from(index));
            assert_eq!(leaf(&cpuid, 0xb).edx, u32::from(index));
        }
    }

    #[test]
    fn a_processor_is_told_apart_by_anything_it_says() {
        let here = for_vcpu(&supported(), 0, 1, true);
        let mut vendor = here.clone();
        vendor
            .push(kvm_cpuid_entry2 {
                ebx: 0x6874_7541,
                edx: 0x6974_6e65,
                ecx: 0x444d_4163,
                ..Default::default()
            })
            .unwrap();
        let this = Processor::of(&vendor);
        assert!(this.to_string().starts_with("AuthenticAMD 270/255/15 with features "), "{this}");
        assert_eq!(Processor::of(&vendor), this);
        for leaf in 0..vendor.as_slice().len() {
            let mut other = vendor.clone();
            other.as_mut_slice()[leaf].ecx ^= 1;
            assert_ne!(Processor::of(&other), this);
        }
        let mut writer = Writer::default();
        this.encode(&mut writer);
        let bytes = writer.into_bytes();
        assert_eq!(bytes.len(), 32);
        assert_eq!(Processor::decode(&mut Reader::new(&bytes)).unwrap(), this);
    }

    #[test]
    fn what_a_sandbox_has_no_use_for_is_not_there() {
        let cpuid = for_vcpu(&supported(), 0, 1, false);
        assert_eq!(leaf(&cpuid, 1).ecx & (LEAF_1_ECX_VMX | LEAF_1_ECX_TSC_DEADLINE), 0);
        assert_eq!(leaf(&cpuid, 0x8000_0001).ecx & LEAF_8000_0001_ECX_SVM, 0);
        assert_eq!(leaf(&cpuid, 0xa).eax, 0);
        assert_eq!(leaf(&cpuid, 0x4000_0001).eax & LEAF_4000_0001_EAX_ASYNC_PF, 0);
        assert_ne!(leaf(&cpuid, 1).ecx & LEAF_1_ECX_HYPERVISOR, 0);
    }
}
