//! The guest's physical address space.
//!
//! ```text
//! 0x0000_0000  unused page, so that a null pointer is not a structure
//! 0x0000_0500  GDT
//! 0x0000_7000  boot parameters ("zero page")
//! 0x0000_8000  entropy seed (setup_data)
//! 0x0000_9000  page tables: PML4, PDPT, PD
//! 0x0002_0000  kernel command line
//! 0x0006_0000  kernel messages that outlive the guest (ramoops), reserved
//! 0x0009_fc00  MP table, where the kernel looks for it: the last KiB below 640 KiB
//! 0x000a_0000  ── hole: video memory and firmware of a PC ──
//! 0x0010_0000  RAM; the kernel is mapped at the address in its ELF header (16 MiB)
//! 0xc000_0000  ── hole: devices ──
//! 0xd000_0000    virtio-mmio, 4 KiB each
//! 0xfec0_0000    I/O APIC, local APICs, KVM's own pages
//! 0x1_0000_0000  RAM that does not fit below 3 GiB
//! above          the root image (virtio-pmem), 128 MiB aligned
//! ```

use vm_memory::GuestAddress;

/// The global descriptor table, read once by the processor when segments are loaded.
pub const GDT: GuestAddress = GuestAddress(0x500);
/// `struct boot_params`, 4 KiB.
pub const BOOT_PARAMS: GuestAddress = GuestAddress(0x7000);
/// One `struct setup_data` with the entropy seed.
pub const SETUP_SEED: GuestAddress = GuestAddress(0x8000);
/// Three pages of page tables.
pub const PAGE_TABLES: GuestAddress = GuestAddress(0x9000);
/// The kernel command line.
pub const CMDLINE: GuestAddress = GuestAddress(0x2_0000);
/// The most bytes of command line, with its terminating NUL: `COMMAND_LINE_SIZE` of Linux on x86.
pub const CMDLINE_BYTES: usize = 2048;
/// Kernel messages that the monitor reads after the guest's end. Below 1 MiB, which the kernel
/// never gives to its allocator, so that the reservation costs the guest nothing.
pub const LOG: GuestAddress = GuestAddress(0x6_0000);
/// The size of the log: a power of two, as ramoops requires. A panic and the messages that led to
/// it are some 8 KiB.
pub const LOG_BYTES: u64 = 64 * 1024;
/// The MP table.
pub const MP_TABLE: GuestAddress = GuestAddress(0x9_fc00);
/// The end of conventional memory.
pub const LOW_END: GuestAddress = GuestAddress(0xa_0000);
/// RAM above the hole of the firmware; the kernel may not be lower.
pub const HIGH_START: GuestAddress = GuestAddress(0x10_0000);

/// The start of the hole for devices. RAM beyond it continues at [`ABOVE_4G`].
pub const DEVICE_HOLE: GuestAddress = GuestAddress(0xc000_0000);
/// RAM that does not fit below [`DEVICE_HOLE`].
pub const ABOVE_4G: GuestAddress = GuestAddress(0x1_0000_0000);

/// The first virtio-mmio device.
pub const VIRTIO_MMIO: GuestAddress = GuestAddress(0xd000_0000);
/// The register window of one virtio-mmio device: the kernel's parameter rounds to pages.
pub const VIRTIO_MMIO_BYTES: u64 = 0x1000;

/// The I/O APIC that KVM emulates.
pub const IO_APIC: u32 = 0xfec0_0000;
/// The local APICs that KVM emulates.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages that KVM needs on Intel processors for real mode, in the device hole.
pub const KVM_TSS: usize = 0xfffb_d000;

/// The interrupt line of the serial console, as on a PC.
pub const SERIAL_IRQ: u32 = 4;
/// The serial console's first port, as on a PC.
pub const SERIAL_PORT: u64 = 0x3f8;
/// Ports of a 16550.
pub const SERIAL_PORTS: u64 = 8;
/// The interrupt line of the first virtio-mmio device; others follow. Above the lines of a PC's
/// fixed devices.
pub const VIRTIO_IRQ: u32 = 5;
/// Lines of the I/O APIC.
pub const IRQ_LINES: u8 = 24;

/// The alignment of the root image's guest address: one section of the guest's memory map
/// (`SECTION_SIZE_BITS` 27), so that no section is shared with RAM.
pub const IMAGE_ALIGN: u64 = 128 << 20;

/// Returns guest RAM as ranges of guest addresses, lowest first; at most two.
pub fn ram_ranges(bytes: u64) -> Vec<(GuestAddress, u64)> {
    let low = bytes.min(DEVICE_HOLE.0);
    let mut ranges = vec![(GuestAddress(0), low)];
    if bytes > low {
        ranges.push((ABOVE_4G, bytes - low));
    }
    ranges
}

/// Returns the address of the root image: above 4 GiB and above all RAM.
pub fn image_address(ram_bytes: u64) -> GuestAddress {
    let ram_end = ABOVE_4G.0 + ram_bytes.saturating_sub(DEVICE_HOLE.0);
    GuestAddress(ram_end.next_multiple_of(IMAGE_ALIGN))
}

// Structures below 1 MiB must not overlap. The check is here because each is written by another
// file.
const _: () = {
    assert!(GDT.0 + 4 * 8 <= BOOT_PARAMS.0);
    assert!(BOOT_PARAMS.0 + 4096 <= SETUP_SEED.0);
    assert!(SETUP_SEED.0 + 48 <= PAGE_TABLES.0);
    assert!(PAGE_TABLES.0 + 3 * 4096 <= CMDLINE.0);
    assert!(CMDLINE.0 + CMDLINE_BYTES as u64 <= LOG.0);
    assert!(LOG.0 + LOG_BYTES <= MP_TABLE.0);
    assert!(LOG_BYTES.is_power_of_two());
};

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn ram_ranges_leave_out_the_device_hole() {
        assert_eq!(ram_ranges(64 << 20), [(GuestAddress(0), 64 << 20)]);
        assert_eq!(ram_ranges(3 * GIB), [(GuestAddress(0), 3 * GIB)]);
        assert_eq!(
            ram_ranges(16 * GIB),
            [(GuestAddress(0), 3 * GIB), (GuestAddress(4 * GIB), 13 * GIB)]
        );
    }

    #[test]
    fn root_image_is_above_all_ram() {
        assert_eq!(image_address(64 << 20), GuestAddress(4 * GIB));
        assert_eq!(image_address(3 * GIB), GuestAddress(4 * GIB));
        assert_eq!(image_address(3 * GIB + 1), GuestAddress(4 * GIB + IMAGE_ALIGN));
        assert_eq!(image_address(16 * GIB), GuestAddress(17 * GIB));
    }
}
