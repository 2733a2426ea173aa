//! The Intel MultiProcessor table: how a guest without ACPI finds its processors and its I/O APIC.
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

/// The floating pointer and behind it the configuration table, as they lie at
/// [`MP_TABLE`](super::layout::MP_TABLE).
///
/// Interrupts follow the ISA bus: edge-triggered, active high, which is what an irqfd delivers.
pub fn mp_table(vcpus: u8) -> Vec<u8> {
    let io_apic_id = vcpus;
    let mut entries = Vec::new();
    let mut count: u16 = 0;
    let mut entry = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count += 1;
    };

    for id in 0..vcpus {
        let flags = 1 | u8::from(id == 0) << 1; // enabled, bootstrap
        // Signature: family 6; feature flags: FPU and APIC on chip.
        entry(&[
            ENTRY_PROCESSOR,
            id,
            APIC_VERSION,
            flags,
            0,
            6,
            0,
            0,
            1,
            2,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
        ]);
    }
    entry(&[ENTRY_BUS, 0, b'I', b'S', b'A', b' ', b' ', b' ']);
    let [a, b, c, d] = IO_APIC.to_le_bytes();
    entry(&[ENTRY_IO_APIC, io_apic_id, APIC_VERSION, 1, a, b, c, d]);
    for line in 0..IRQ_LINES {
        entry(&[ENTRY_INTERRUPT, INTERRUPT, 0, 0, 0, line, io_apic_id, line]);
    }
    entry(&[ENTRY_LOCAL_INTERRUPT, EXTINT, 0, 0, 0, 0, 0, 0]);
    entry(&[ENTRY_LOCAL_INTERRUPT, NMI, 0, 0, 0, 0, ALL_APICS, 1]);

    let mut table = Vec::with_capacity(44 + entries.len());
    table.extend_from_slice(b"PCMP");
    #[expect(
        clippy::cast_possible_truncation,
        reason = "some 500 bytes with the largest number of vCPUs"
    )]
    table.extend_from_slice(&(44 + entries.len() as u16).to_le_bytes());
    table.extend_from_slice(&[4, 0]); // specification 1.4; checksum
    table.extend_from_slice(b"CHITIN  MICROVM     ");
    table.extend_from_slice(&[0; 6]); // no OEM table
    table.extend_from_slice(&count.to_le_bytes());
    table.extend_from_slice(&LOCAL_APIC.to_le_bytes());
    table.extend_from_slice(&[0; 4]); // no extended entries
    table.extend_from_slice(&entries);
    table[7] = checksum(&table);

    #[expect(clippy::cast_possible_truncation, reason = "below 1 MiB")]
    let [a, b, c, d] = (MP_TABLE.0 as u32 + 16).to_le_bytes();
    let mut pointer = [b'_', b'M', b'P', b'_', a, b, c, d, 1, 4, 0, 0, 0, 0, 0, 0];
    pointer[10] = checksum(&pointer);
    [&pointer, table.as_slice()].concat()
}

/// What makes all bytes add up to zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::super::layout::LOW_END;
    use super::*;

    #[test]
    fn both_checksums_are_zero_and_the_table_fits() {
        for vcpus in 1..=crate::spec::MAX_VCPUS {
            let bytes = mp_table(vcpus);
            assert_eq!(checksum(&bytes[..16]), 0);
            assert_eq!(checksum(&bytes[16..]), 0);
            assert!(MP_TABLE.0 + bytes.len() as u64 <= LOW_END.0);
            let length = u16::from_le_bytes([bytes[20], bytes[21]]);
            assert_eq!(usize::from(length), bytes.len() - 16);
        }
    }

    #[test]
    fn processors_come_first_and_one_is_the_bootstrap_processor() {
        let bytes = mp_table(8);
        let processors: Vec<_> = bytes[60..].chunks(20).take(8).collect();
        assert!((0u8..).zip(&processors).all(|(id, entry)| entry[..2] == [0, id]));
        assert_eq!(processors.iter().filter(|entry| entry[3] & 2 != 0).count(), 1);
    }
}
