//! The boot parameters: everything that the kernel finds in memory when it starts, except itself.
//!
//! Source: `Documentation/arch/x86/boot.rst` (64-bit protocol) and `zero-page.rst` of Linux.

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::{Bytes, GuestAddress};

use super::layout::{
    BOOT_PARAMS, CMDLINE, CMDLINE_BYTES, HIGH_START, LOG, LOG_BYTES, MP_TABLE, SETUP_SEED,
    ram_ranges,
};
use super::mptable::build_mp_table;
use crate::memory::GuestRam;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// The type of a `setup_data` that the kernel mixes into its random number generator and credits.
const SETUP_RNG_SEED: u32 = 9;
/// The size of the seed: as much as the generator's state holds.
const SEED_BYTES: usize = 32;

/// The boot parameters could not be written.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message of a variant explains its fields")]
pub enum BootError {
    /// The guest has no memory at one of the fixed addresses of [`layout`](super::layout).
    #[error("write {what} at guest address {address:#x}")]
    Write { what: &'static str, address: u64, source: vm_memory::GuestMemoryError },
    /// linux-loader could not write `struct boot_params`.
    #[error("write `struct boot_params` at guest address {address:#x}")]
    Parameters { address: u64, source: linux_loader::configurator::Error },
    /// The command line is longer than the kernel reads.
    #[error("kernel command line of {bytes} bytes: the kernel reads {CMDLINE_BYTES}")]
    CommandLine { bytes: usize },
    /// The host's random number generator has failed.
    #[error("get {SEED_BYTES} bytes of entropy for the guest")]
    Entropy(#[source] std::io::Error),
}

/// Writes the command line, the MP table, the entropy seed and `struct boot_params`.
///
/// # Errors
/// With the memory of a valid [`VmSpec`](crate::VmSpec) only [`BootError::Entropy`] is possible.
pub fn write_boot_parameters(
    ram: &GuestRam,
    ram_bytes: u64,
    vcpus: u8,
    cmdline: &str,
) -> Result<(), BootError> {
    let write = |what, bytes: &[u8], at: GuestAddress| {
        ram.write_slice(bytes, at).map_err(|source| BootError::Write {
            what,
            address: at.0,
            source,
        })
    };
    let cmdline = [cmdline.as_bytes(), &[0]].concat();
    if cmdline.len() > CMDLINE_BYTES {
        return Err(BootError::CommandLine { bytes: cmdline.len() });
    }
    write("the command line", &cmdline, CMDLINE)?;
    write("the MP table", &build_mp_table(vcpus), MP_TABLE)?;
    write("the entropy seed", &build_setup_seed()?, SETUP_SEED)?;

    let params = build_boot_params(ram_bytes, cmdline.len());
    LinuxBootConfigurator::write_bootparams(&BootParams::new(&params, BOOT_PARAMS), ram)
        .map_err(|source| BootError::Parameters { address: BOOT_PARAMS.0, source })
}

/// Builds `struct boot_params`. The length of the command line includes its terminating NUL.
fn build_boot_params(ram_bytes: u64, cmdline_bytes: usize) -> boot_params {
    let mut params = boot_params::default();
    params.hdr.boot_flag = 0xaa55;
    params.hdr.header = u32::from_le_bytes(*b"HdrS");
    params.hdr.version = 0x20f;
    params.hdr.type_of_loader = 0xff; // no assigned number
    params.hdr.kernel_alignment = 0x100_0000;
    #[expect(clippy::cast_possible_truncation, reason = "below 1 MiB")]
    {
        params.hdr.cmd_line_ptr = CMDLINE.0 as u32;
        params.hdr.cmdline_size = cmdline_bytes as u32 - 1;
    }
    params.hdr.setup_data = SETUP_SEED.0;
    let map = build_e820_map(ram_bytes);
    params.e820_table[..map.len()].copy_from_slice(&map);
    #[expect(clippy::cast_possible_truncation, reason = "five entries at most")]
    {
        params.e820_entries = map.len() as u8;
    }
    params
}

/// Builds the map of guest RAM. The memory of the kernel's message log is reserved, so that nothing
/// else is ever put there.
fn build_e820_map(ram_bytes: u64) -> Vec<boot_e820_entry> {
    let entry = |from: GuestAddress, to: u64, kind| boot_e820_entry {
        addr: from.0,
        size: to - from.0,
        r#type: kind,
    };
    let log_end = LOG.0 + LOG_BYTES;
    let mut map = vec![
        entry(GuestAddress(0), LOG.0, E820_RAM),
        entry(LOG, log_end, E820_RESERVED),
        entry(GuestAddress(log_end), MP_TABLE.0, E820_RAM),
    ];
    for (start, len) in ram_ranges(ram_bytes) {
        map.push(entry(start.max(HIGH_START), start.0 + len, E820_RAM));
    }
    map
}

/// Builds a `struct setup_data` with fresh entropy: next, type, length, data. The kernel wipes it
/// after use.
fn build_setup_seed() -> Result<[u8; 16 + SEED_BYTES], BootError> {
    let mut data = [0; 16 + SEED_BYTES];
    data[8..12].copy_from_slice(&SETUP_RNG_SEED.to_le_bytes());
    #[expect(clippy::cast_possible_truncation, reason = "32")]
    data[12..16].copy_from_slice(&(SEED_BYTES as u32).to_le_bytes());
    // Requests of up to 256 bytes are never cut short or interrupted once the generator is ready
    // (getrandom(2)).
    match getrandom(&mut data[16..], GetRandomFlags::empty()) {
        Ok(SEED_BYTES) => Ok(data),
        Ok(_) => Err(BootError::Entropy(std::io::ErrorKind::UnexpectedEof.into())),
        Err(errno) => Err(BootError::Entropy(errno.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    #[test]
    fn e820_map_covers_ram_without_overlap() {
        for mib in [64u64, 3072, 3073, 16384] {
            let map = build_e820_map(mib << 20);
            let ends = map.windows(2).all(|pair| {
                let (first, second) = (pair[0], pair[1]);
                first.addr + first.size <= second.addr
            });
            assert!(ends, "{mib} MiB");
            let total: u64 = map.iter().map(|entry| entry.size).sum();
            assert_eq!(total, (mib << 20) - (HIGH_START.0 - MP_TABLE.0));
        }
    }

    #[test]
    fn setup_seeds_differ_and_boot_params_point_at_them() {
        assert_ne!(build_setup_seed().unwrap()[16..], build_setup_seed().unwrap()[16..]);
        let ram = memory::create_ram(&ram_ranges(64 << 20)).unwrap();
        write_boot_parameters(&ram, 64 << 20, 1, "quiet").unwrap();
        let params: boot_params = ram.read_obj(BOOT_PARAMS).unwrap();
        let (seed, count) = (params.hdr.setup_data, params.e820_entries);
        assert_eq!((seed, count), (SETUP_SEED.0, 4));
        let mut line = [0; 6];
        ram.read_slice(&mut line, CMDLINE).unwrap();
        assert_eq!(&line, b"quiet\0");
    }

    #[test]
    fn long_command_line_is_refused() {
        let ram = memory::create_ram(&ram_ranges(64 << 20)).unwrap();
        let line = "x".repeat(CMDLINE_BYTES);
        assert!(matches!(
            write_boot_parameters(&ram, 64 << 20, 1, &line),
            Err(BootError::CommandLine { bytes: 2049 })
        ));
    }
}
