//! What the kernel finds in memory when it starts.
//!
//! Source: `Documentation/arch/x86/boot.rst` (64-bit protocol) and `zero-page.rst` of Linux.

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{Bytes, GuestAddress};

use super::layout::{
    BOOT_PARAMS, CMDLINE, CMDLINE_BYTES, HIGH_START, LOG, LOG_BYTES, MP_TABLE, SETUP_SEED,
    ram_ranges,
};
use super::mptable::mp_table;
use crate::memory::GuestRam;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// `setup_data` of this type is mixed into the kernel's random number generator and credited.
const SETUP_RNG_SEED: u32 = 9;
/// As much as the generator's state holds.
const SEED_BYTES: usize = 32;

/// Boot parameters could not be written: the guest has no memory where they belong.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// No memory at one of the fixed addresses of [`layout`](super::layout).
    #[error("write {what} at guest address {address:#x}")]
    Write {
        /// What was to be written.
        what: &'static str,
        /// Guest physical.
        address: u64,
        /// Why not.
        source: vm_memory::GuestMemoryError,
    },
    /// linux-loader could not place the boot parameters.
    #[error("write boot parameters at guest address {address:#x}")]
    Parameters {
        /// Guest physical.
        address: u64,
        /// Why not.
        source: linux_loader::configurator::Error,
    },
    /// The command line is longer than the kernel reads.
    #[error("kernel command line of {bytes} bytes: the kernel reads {CMDLINE_BYTES}")]
    CommandLine {
        /// Its length with the terminating NUL.
        bytes: usize,
    },
    /// The host's random number generator failed.
    #[error("get {SEED_BYTES} bytes of entropy for the guest")]
    Entropy(#[source] std::io::Error),
}

/// Writes everything the kernel expects to find in memory, except itself.
///
/// # Errors
/// [`BootError`]; with memory of a valid [`VmSpec`](crate::VmSpec) only the entropy can fail.
pub fn write_boot_data(
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
    write("the MP table", &mp_table(vcpus), MP_TABLE)?;
    write("the entropy seed", &setup_seed()?, SETUP_SEED)?;

    let mut params = boot_params::default();
    params.hdr.boot_flag = 0xaa55;
    params.hdr.header = u32::from_le_bytes(*b"HdrS");
    params.hdr.version = 0x20f;
    params.hdr.type_of_loader = 0xff; // no assigned number
    params.hdr.kernel_alignment = 0x100_0000;
    #[expect(clippy::cast_possible_truncation, reason = "below 1 MiB")]
    {
        params.hdr.cmd_line_ptr = CMDLINE.0 as u32;
        params.hdr.cmdline_size = cmdline.len() as u32 - 1;
    }
    params.hdr.setup_data = SETUP_SEED.0;
    let map = e820(ram_bytes);
    params.e820_table[..map.len()].copy_from_slice(&map);
    #[expect(clippy::cast_possible_truncation, reason = "five entries at most")]
    {
        params.e820_entries = map.len() as u8;
    }
    LinuxBootConfigurator::write_bootparams(&BootParams::new(&params, BOOT_PARAMS), ram)
        .map_err(|source| BootError::Parameters { address: BOOT_PARAMS.0, source })
}

/// Guest RAM as the kernel is to see it. What the kernel's own message log lies in is reserved, so that nothing else
/// is ever put there.
fn e820(ram_bytes: u64) -> Vec<boot_e820_entry> {
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

/// One `struct setup_data`: next, type, length, data. The kernel wipes it after use.
fn setup_seed() -> Result<[u8; 16 + SEED_BYTES], BootError> {
    let mut data = [0; 16 + SEED_BYTES];
    data[8..12].copy_from_slice(&SETUP_RNG_SEED.to_le_bytes());
    #[expect(clippy::cast_possible_truncation, reason = "32")]
    data[12..16].copy_from_slice(&(SEED_BYTES as u32).to_le_bytes());
    let seed = &mut data[16..];
    // SAFETY: `seed` is writable memory of the length given, and the call keeps no pointer.
    let got = unsafe { libc::getrandom(seed.as_mut_ptr().cast(), seed.len(), 0) };
    // Requests up to 256 bytes are never cut short or interrupted once the generator is ready (getrandom(2)).
    if usize::try_from(got) != Ok(SEED_BYTES) {
        return Err(BootError::Entropy(std::io::Error::last_os_error()));
    }
    Ok(data)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    #[test]
    fn the_map_covers_ram_without_overlap() {
        for mib in [64u64, 3072, 3073, 16384] {
            let map = e820(mib << 20);
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
    fn seeds_differ_and_parameters_point_at_them() {
        assert_ne!(setup_seed().unwrap()[16..], setup_seed().unwrap()[16..]);
        let ram = memory::create(64 << 20).unwrap();
        write_boot_data(&ram, 64 << 20, 1, "quiet").unwrap();
        let params: boot_params = ram.read_obj(BOOT_PARAMS).unwrap();
        let (seed, count) = (params.hdr.setup_data, params.e820_entries);
        assert_eq!((seed, count), (SETUP_SEED.0, 4));
        let mut line = [0; 6];
        ram.read_slice(&mut line, CMDLINE).unwrap();
        assert_eq!(&line, b"quiet\0");
    }

    #[test]
    fn a_long_command_line_is_refused() {
        let ram = memory::create(64 << 20).unwrap();
        let line = "x".repeat(CMDLINE_BYTES);
        assert!(matches!(
            write_boot_data(&ram, 64 << 20, 1, &line),
            Err(BootError::CommandLine { bytes: 2049 })
        ));
    }
}
