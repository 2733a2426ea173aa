//! The features of a processor that a guest may see: an allow-list of CPUID leaves, and of the bits
//! in those leaves that list features.
//!
//! KVM offers what it can virtualize, and offers more with each version. A guest gets what a
//! workload computes with. Left out are: nested virtualization and enclaves, which are large and
//! have been attacked; transactions (TSX), by which a guest observes addresses without a fault;
//! everything that counts, samples or traces instructions; state that a template would have to
//! save and does not (AMX, control-flow enforcement); and what only firmware or hosts use.
//!
//! Leaves that describe mitigations of speculation pass whole, in both directions: a bit that is
//! unknown here and hidden would make a guest kernel less safe, not the host.
//!
//! Sources: Intel's Software Developer's Manual, volume 2A, CPUID; AMD's Architecture Programmer's
//! Manual, volume 3, appendix E; `Documentation/virt/kvm/x86/cpuid.rst` of Linux.

use kvm_bindings::kvm_cpuid_entry2;

/// All bits of a register.
const ALL: u32 = u32::MAX;

/// The visible bits of EAX, EBX, ECX and EDX.
type VisibleBits = [u32; 4];

/// Returns the visible bits of a leaf, or `None` if a guest does not have the leaf.
fn visible_bits(function: u32, index: u32) -> Option<VisibleBits> {
    Some(match (function, index) {
        // Vendor; caches; deterministic caches; states of XSAVE, as far as KVM enables them;
        // frequency of the time stamp counter; KVM's signature; names; address sizes with
        // mitigations; hints; caches; topology; mitigations.
        (0x0 | 0x2 | 0x4 | 0xd | 0x15 | 0x4000_0000, _)
        | (0x8000_0000 | 0x8000_0002..=0x8000_0006, _)
        | (0x8000_0008 | 0x8000_0019 | 0x8000_001a | 0x8000_001d | 0x8000_001e, _)
        | (0x8000_0021, _) => [ALL; 4],
        // The signature and the topology are fitted to the vCPU.
        (0x1, _) => [ALL, ALL, bits(LEAF_1_ECX), bits(LEAF_1_EDX)],
        // The timer of the local APIC always runs.
        (0x6, _) => [1 << 2, 0, 0, 0],
        (0x7, 0) => [ALL, bits(LEAF_7_EBX), bits(LEAF_7_ECX), bits(LEAF_7_EDX)],
        (0x7, 1) => [bits(LEAF_7_1_EAX), 0, 0, bits(LEAF_7_1_EDX)],
        // Controls of speculation.
        (0x7, 2) => [0, 0, 0, ALL],
        (0x4000_0001, _) => [bits(KVM_FEATURES), 0, 0, ALL],
        (0x8000_0001, _) => [ALL, ALL, bits(AMD_ECX), bits(AMD_EDX)],
        // The time stamp counter is invariant.
        (0x8000_0007, _) => [0, 0, 0, 1 << 8],
        _ => return None,
    })
}

/// Returns whether a guest has this leaf.
pub(super) fn is_visible(entry: &kvm_cpuid_entry2) -> bool {
    visible_bits(entry.function, entry.index).is_some()
}

/// Hides the bits of a leaf that a guest may not see.
pub(super) fn hide_bits(entry: &mut kvm_cpuid_entry2) {
    let [eax, ebx, ecx, edx] = visible_bits(entry.function, entry.index).unwrap_or_default();
    entry.eax &= eax;
    entry.ebx &= ebx;
    entry.ecx &= ecx;
    entry.edx &= edx;
}

const fn bits(list: &[u32]) -> u32 {
    let (mut bits, mut at) = (0, 0);
    while at < list.len() {
        bits |= 1 << list[at];
        at += 1;
    }
    bits
}

/// SSE3, PCLMULQDQ, SSSE3, FMA, CMPXCHG16B, PCID, SSE4.1, SSE4.2, x2APIC, MOVBE, POPCNT, TSC
/// deadline, AES, XSAVE, OSXSAVE, AVX, F16C, RDRAND, hypervisor.
const LEAF_1_ECX: &[u32] =
    &[0, 1, 9, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31];

/// FPU, VME, DE, PSE, TSC, MSR, PAE, MCE, CMPXCHG8B, APIC, SYSENTER, MTRR, PGE, MCA, CMOV, PAT,
/// PSE-36, CLFLUSH, MMX, FXSR, SSE, SSE2, SS, HTT.
const LEAF_1_EDX: &[u32] =
    &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 19, 23, 24, 25, 26, 27, 28];

/// FSGSBASE, TSC_ADJUST, BMI1, AVX2, x87 pointers on exceptions only, SMEP, BMI2, ERMS, INVPCID,
/// no x87 CS and DS, AVX-512 F and DQ, RDSEED, ADX, SMAP, AVX-512 IFMA, CLFLUSHOPT, CLWB, AVX-512
/// PF, ER and CD, SHA, AVX-512 BW and VL. Not: SGX, HLE, RTM, MPX, resource monitoring, trace.
const LEAF_7_EBX: &[u32] =
    &[0, 1, 3, 5, 6, 7, 8, 9, 10, 13, 16, 17, 18, 19, 20, 21, 23, 24, 26, 27, 28, 29, 30, 31];

/// PREFETCHWT1, AVX-512 VBMI, UMIP, PKU, OSPKE, WAITPKG, AVX-512 VBMI2, GFNI, VAES, VPCLMULQDQ,
/// AVX-512 VNNI, BITALG and VPOPCNTDQ, LA57, RDPID, CLDEMOTE, MOVDIRI, MOVDIR64B. Not: shadow
/// stacks, key locker, SGX launch control, bus lock detection, ENQCMD.
const LEAF_7_ECX: &[u32] = &[0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 14, 16, 22, 25, 27, 28];

/// AVX-512 4VNNIW and 4FMAPS, FSRM, AVX-512 VP2INTERSECT, SRBDS_CTRL, MD_CLEAR, SERIALIZE, AVX-512
/// FP16, and the mitigations SPEC_CTRL, STIBP, L1D_FLUSH, ARCH_CAPABILITIES and SSBD. Not: what
/// belongs to TSX (11, 13, 16), branch records, indirect branch tracking, AMX.
const LEAF_7_EDX: &[u32] = &[2, 3, 4, 8, 9, 10, 14, 23, 26, 27, 28, 29, 31];

/// SHA512, SM3, SM4, AVX-VNNI, AVX-512 BF16, CMPCCXADD, fast short REP operations, AVX-IFMA.
const LEAF_7_1_EAX: &[u32] = &[0, 1, 2, 4, 5, 7, 10, 11, 12, 23];

/// AVX-VNNI-INT8, AVX-NE-CONVERT, AVX-VNNI-INT16, PREFETCHI.
const LEAF_7_1_EDX: &[u32] = &[4, 5, 10, 14];

/// Clock sources, no delay of I/O, stolen time, end of interrupt, wake-up of a halted vCPU, remote
/// TLB flush, interprocessor interrupts, polling, yield, destination ids, a stable clock. Not:
/// asynchronous page faults, which would interrupt every copy of a template before it does anything
/// else; controls of encrypted guests.
const KVM_FEATURES: &[u32] = &[0, 1, 3, 5, 6, 7, 9, 11, 12, 13, 15, 24];

/// LAHF, legacy cores, CR8, LZCNT, SSE4A, misaligned SSE, PREFETCHW, OSVW, XOP, FMA4, TBM, topology
/// extensions. Not: SVM, sampling (10), profiling (15), performance counters of any kind (23, 24,
/// 27, 28), data breakpoints, MWAITX.
const AMD_ECX: &[u32] = &[0, 1, 4, 5, 6, 7, 8, 9, 11, 16, 21, 22];

/// As in leaf 1, and SYSCALL, NX, MMX extensions, FXSR optimizations, pages of 1 GiB, RDTSCP, long
/// mode, 3DNow!.
const AMD_EDX: &[u32] = &[
    0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 20, 22, 23, 24, 25, 26, 27, 29, 30,
    31,
];

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the leaf that a guest sees if the processor and KVM had every feature.
    fn see(function: u32, index: u32) -> Option<[u32; 4]> {
        let mut entry = kvm_cpuid_entry2 {
            function,
            index,
            eax: ALL,
            ebx: ALL,
            ecx: ALL,
            edx: ALL,
            ..Default::default()
        };
        hide_bits(&mut entry);
        is_visible(&entry).then_some([entry.eax, entry.ebx, entry.ecx, entry.edx])
    }

    const ECX: usize = 2;
    const EBX: usize = 1;
    const EDX: usize = 3;

    #[test]
    fn intel_transactions_and_enclaves_are_hidden() {
        for (leaf, register, bit, name) in [
            ((0x1, 0), ECX, 2, "64-bit debug store"),
            ((0x1, 0), ECX, 3, "MONITOR"),
            ((0x1, 0), ECX, 5, "VMX"),
            ((0x1, 0), ECX, 15, "performance capabilities"),
            ((0x1, 0), EDX, 21, "debug store"),
            ((0x7, 0), EBX, 2, "SGX"),
            ((0x7, 0), EBX, 4, "HLE"),
            ((0x7, 0), EBX, 11, "RTM"),
            ((0x7, 0), EBX, 12, "resource monitoring"),
            ((0x7, 0), EBX, 25, "processor trace"),
            ((0x7, 0), ECX, 7, "shadow stacks"),
            ((0x7, 0), ECX, 30, "SGX launch control"),
            ((0x7, 0), EDX, 11, "RTM_ALWAYS_ABORT"),
            ((0x7, 0), EDX, 13, "TSX_FORCE_ABORT"),
            ((0x7, 0), EDX, 16, "TSXLDTRK"),
            ((0x7, 0), EDX, 19, "branch records"),
            ((0x7, 0), EDX, 20, "indirect branch tracking"),
            ((0x7, 0), EDX, 24, "AMX"),
        ] {
            let seen = see(leaf.0, leaf.1).unwrap();
            assert_eq!(seen[register] & 1 << bit, 0, "{name}");
        }
        for leaf in
            [0x5, 0xa, 0xf, 0x10, 0x12, 0x14, 0x17, 0x19, 0x1b, 0x1c, 0x1d, 0x1e, 0x23, 0x24]
        {
            assert_eq!(see(leaf, 0), None, "{leaf:#x}");
        }
    }

    #[test]
    fn amd_counters_and_sampling_are_hidden() {
        let seen = see(0x8000_0001, 0).unwrap();
        for (bit, name) in [
            (2, "SVM"),
            (10, "instruction based sampling"),
            (12, "SKINIT"),
            (15, "lightweight profiling"),
            (23, "PerfCtrExtCore"),
            (24, "PerfCtrExtNB"),
            (26, "data breakpoints"),
            (27, "PerfTsc"),
            (28, "PerfCtrExtLLC"),
            (29, "MWAITX"),
        ] {
            assert_eq!(seen[ECX] & 1 << bit, 0, "{name}");
        }
        // SVM, sampling, profiling, encrypted guests, resource control, PerfMonV2, host topology.
        for leaf in [0xa, 0x1b, 0x1c, 0x1f, 0x20, 0x22, 0x23, 0x25, 0x26] {
            assert_eq!(see(0x8000_0000 | leaf, 0), None, "{leaf:#x}");
        }
    }

    #[test]
    fn leaf_that_is_not_listed_is_hidden() {
        for leaf in
            [0x3, 0x8, 0x18, 0x20, 0x100, 0x4000_0002, 0x4000_0010, 0x8000_0030, 0xc000_0001]
        {
            assert_eq!(see(leaf, 0), None, "{leaf:#x}");
        }
        assert_eq!(see(0x7, 3), None);
    }

    #[test]
    fn mitigations_and_common_features_stay() {
        let leaf_7 = see(0x7, 0).unwrap();
        for bit in [10, 26, 27, 28, 29, 31] {
            assert_ne!(leaf_7[EDX] & 1 << bit, 0, "{bit}");
        }
        assert_eq!(see(0x7, 2).unwrap()[EDX], ALL);
        assert_eq!(see(0x8000_0008, 0).unwrap()[EBX], ALL);
        assert_eq!(see(0x8000_0021, 0), Some([ALL; 4]));
        // The processor levels x86-64-v2 to v4, and long mode with NX.
        let (leaf_1, amd) = (see(0x1, 0).unwrap(), see(0x8000_0001, 0).unwrap());
        for bit in [0, 9, 12, 13, 19, 20, 22, 23, 26, 27, 28, 29] {
            assert_ne!(leaf_1[ECX] & 1 << bit, 0, "{bit}");
        }
        for bit in [3, 5, 8, 16, 17, 28, 30, 31] {
            assert_ne!(leaf_7[EBX] & 1 << bit, 0, "{bit}");
        }
        assert_ne!(amd[EDX] & (1 << 11 | 1 << 20 | 1 << 29), 0);
        assert_ne!(amd[ECX] & (1 | 1 << 5), 0);
    }
}
