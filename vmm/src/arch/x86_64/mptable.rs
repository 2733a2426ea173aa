//! The Intel MultiProcessor table, through which a guest without ACPI finds its processors and its
//! I/O APIC.
//!
//! Source: Intel MultiProcessor Specification 1.4, chapter 4.

use super::layout::{IO_APIC, IRQ_LINES, LOCAL_APIC, MP_TABLE};

/// The version of local and I/O APIC that KVM emulates (integrated APIC).
const APIC_VERSION: u8 = 0x14;

const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IO_APIC: u8 = 2;
const ENTRY_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;

const INTERRUPT: u8 = 0;
const NMI: u8 = 1;
const EXTINT: u8 = 3;
const ALL_APICS: u8 = 0xff;

/// The size of the table's header.
const HEADER_BYTES: usize = 44;

/// Builds the floating pointer and, after it, the configuration table, as they lie at [`MP_TABLE`].
///
/// Interrupts follow the ISA bus: edge-triggered, active high, which is what an irqfd delivers.
pub fn build_mp_table(vcpus: u8) -> Vec<u8> {
    let (count, entries) = build_entries(vcpus);
    let mut table = Vec::with_capacity(HEADER_BYTES + entries.len());
    table.extend_from_slice(b"PCMP");
    #[expect(
        clippy::cast_possible_truncation,
        reason = "some 500 bytes with the largest number of vCPUs"
    )]
    table.extend_from_slice(&((HEADER_BYTES + entries.len()) as u16).to_le_bytes());
    table.extend_from_slice(&[4, 0]); // specification 1.4; checksum
    table.extend_from_slice(b"CHITIN  MICROVM     ");
    table.extend_from_slice(&[0; 6]); // no OEM table
    table.extend_from_slice(&count.to_le_bytes());
    table.extend_from_slice(&LOCAL_APIC.to_le_bytes());
    table.extend_from_slice(&[0; 4]); // no extended entries
    table.extend_from_slice(&entries);
    table[7] = checksum(&table);
    [&build_floating_pointer(), table.as_slice()].concat()
}

fn build_floating_pointer() -> [u8; 16] {
    #[expect(clippy::cast_possible_truncation, reason = "below 1 MiB")]
    let [a, b, c, d] = (MP_TABLE.0 as u32 + 16).to_le_bytes();
    let mut pointer = [b'_', b'M', b'P', b'_', a, b, c, d, 1, 4, 0, 0, 0, 0, 0, 0];
    pointer[10] = checksum(&pointer);
    pointer
}

/// Builds the entries of the table, and counts them.
fn build_entries(vcpus: u8) -> (u16, Vec<u8>) {
    let io_apic_id = vcpus;
    let mut entries = Vec::new();
    let mut count: u16 = 0;
    let mut add = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count += 1;
    };
    for id in 0..vcpus {
        add(&processor_entry(id));
    }
    add(&[ENTRY_BUS, 0, b'I', b'S', b'A', b' ', b' ', b' ']);
    let [a, b, c, d] = IO_APIC.to_le_bytes();
    add(&[ENTRY_IO_APIC, io_apic_id, APIC_VERSION, 1, a, b, c, d]);
    for line in 0..IRQ_LINES {
        add(&[ENTRY_INTERRUPT, INTERRUPT, 0, 0, 0, line, io_apic_id, line]);
    }
    add(&[ENTRY_LOCAL_INTERRUPT, EXTINT, 0, 0, 0, 0, 0, 0]);
    add(&[ENTRY_LOCAL_INTERRUPT, NMI, 0, 0, 0, 0, ALL_APICS, 1]);
    (count, entries)
}

fn processor_entry(id: u8) -> [u8; 20] {
    let mut entry = [0; 20];
    let flags = 1 | u8::from(id == 0) << 1; // enabled, bootstrap
    entry[..4].copy_from_slice(&[ENTRY_PROCESSOR, id, APIC_VERSION, flags]);
    entry[4..8].copy_from_slice(&[0, 6, 0, 0]); // signature: family 6
    entry[8..12].copy_from_slice(&[1, 2, 0, 0]); // features: FPU and APIC on chip
    entry
}

/// Returns the byte with which all bytes add up to zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::super::layout::LOW_END;
    use super::*;

    #[test]
    fn mp_table_fits_and_its_checksums_are_zero() {
        for vcpus in 1..=crate::spec::MAX_VCPUS {
            let bytes = build_mp_table(vcpus);
            assert_eq!(checksum(&bytes[..16]), 0);
            assert_eq!(checksum(&bytes[16..]), 0);
            assert!(MP_TABLE.0 + bytes.len() as u64 <= LOW_END.0);
            let length = u16::from_le_bytes([bytes[20], bytes[21]]);
            assert_eq!(usize::from(length), bytes.len() - 16);
        }
    }

    #[test]
    fn processors_come_first_with_one_bootstrap_processor() {
        let bytes = build_mp_table(8);
        let processors: Vec<_> = bytes[60..].chunks(20).take(8).collect();
        assert!((0u8..).zip(&processors).all(|(id, entry)| entry[..2] == [0, id]));
        assert_eq!(processors.iter().filter(|entry| entry[3] & 2 != 0).count(), 1);
    }
}
