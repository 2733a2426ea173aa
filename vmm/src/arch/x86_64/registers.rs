//! The state in which a guest is entered: 64-bit mode, flat segments, and the lowest GiB mapped to
//! itself.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout::{BOOT_PARAMS, GDT, PAGE_TABLES};
use crate::memory::GuestRam;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
/// SSE state is saved and SSE instructions are allowed.
pub const CR4_OSFXSR: u64 = 1 << 9;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

const PAGE_PRESENT_WRITABLE: u64 = 0b11;
const PAGE_LARGE: u64 = 1 << 7;
const PAGE_BYTES: u64 = 4096;
const LARGE_PAGE_BYTES: u64 = 2 << 20;

/// Null, unused, 64-bit code (0x10), data (0x18): the selectors of the boot protocol.
const GDT_ENTRIES: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLED: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

/// The model-specific registers that firmware would have set, by index and value: string
/// instructions are fast, memory is cached.
pub const ENTRY_MSRS: [(u32, u64); 2] = [
    (MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
    (MSR_MTRR_DEF_TYPE, MTRR_ENABLED | MTRR_WRITE_BACK),
];

/// Writes the descriptor table and the page tables: 512 pages of 2 MiB, each mapped to itself.
///
/// The kernel replaces both within its first instructions.
///
/// # Errors
/// The guest has no memory at [`GDT`] or [`PAGE_TABLES`].
pub fn write_page_tables(ram: &GuestRam) -> Result<(), GuestMemoryError> {
    let write = |entries: &[u64], at: GuestAddress| {
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        ram.write_slice(&bytes, at)
    };
    write(&GDT_ENTRIES, GDT)?;
    let pdpt = PAGE_TABLES.0 + PAGE_BYTES;
    let pd = pdpt + PAGE_BYTES;
    write(&[pdpt | PAGE_PRESENT_WRITABLE], PAGE_TABLES)?;
    write(&[pd | PAGE_PRESENT_WRITABLE], GuestAddress(pdpt))?;
    let pages: Vec<u64> = (0..512)
        .map(|page| (page * LARGE_PAGE_BYTES) | PAGE_PRESENT_WRITABLE | PAGE_LARGE)
        .collect();
    write(&pages, GuestAddress(pd))
}

/// Turns the reset state of a vCPU into the state at the kernel's entry point.
pub fn enter_long_mode(sregs: &mut kvm_sregs) {
    let segment = |selector, kind, l, db| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db,
        s: 1,
        l,
        g: 1,
        ..Default::default()
    };
    let data = segment(0x18, 0x3, 0, 1);
    sregs.cs = segment(0x10, 0xb, 1, 0);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    // A busy 64-bit TSS: VMX refuses to enter a guest without one.
    sregs.tr = kvm_segment { limit: 0xffff, type_: 0xb, present: 1, ..Default::default() };
    #[expect(clippy::cast_possible_truncation, reason = "31")]
    {
        sregs.gdt = kvm_dtable {
            base: GDT.0,
            limit: (size_of_val(&GDT_ENTRIES) - 1) as u16,
            ..Default::default()
        };
    }
    sregs.idt = kvm_dtable::default();
    sregs.cr3 = PAGE_TABLES.0;
    sregs.cr4 = CR4_PAE;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_NE | CR0_PG;
    sregs.efer = EFER_LME | EFER_LMA;
}

/// Returns the general registers at the entry point: interrupts off, `RSI` at the boot parameters,
/// and a stack in the page below them.
pub fn entry_registers(entry: GuestAddress) -> kvm_regs {
    kvm_regs {
        rip: entry.0,
        rsi: BOOT_PARAMS.0,
        rsp: BOOT_PARAMS.0,
        rflags: 2,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::super::layout::ram_ranges;
    use super::*;
    use crate::memory;

    #[test]
    fn page_tables_map_the_kernel_to_itself() {
        let ram = memory::create_ram(&ram_ranges(64 << 20)).unwrap();
        write_page_tables(&ram).unwrap();
        let load = |at: u64| ram.read_obj::<u64>(GuestAddress(at)).unwrap();
        let address = 0x100_0000u64;
        let pdpt = load(PAGE_TABLES.0) & !0xfff;
        let pd = load(pdpt) & !0xfff;
        let entry = load(pd + address / LARGE_PAGE_BYTES * 8);
        assert_eq!(entry, address | PAGE_PRESENT_WRITABLE | PAGE_LARGE);
    }
}
