//! The kernel command line, each option with its reason. It never has a secret: any process in the
//! guest can read it.

use linux_loader::cmdline::{Cmdline, Error};
use vm_memory::GuestAddress;

use super::layout::{CMDLINE_BYTES, LOG, LOG_BYTES, VIRTIO_MMIO_BYTES};

/// A virtio-mmio device, which the kernel finds by its option on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioMmioDevice {
    /// The start of its registers.
    pub address: GuestAddress,
    /// Its line of the I/O APIC.
    pub irq: u32,
}

/// Builds the command line of a guest with these virtio-mmio devices.
///
/// # Errors
/// It does not fit into [`CMDLINE_BYTES`].
pub fn build_command_line(devices: &[VirtioMmioDevice], console: bool) -> Result<String, Error> {
    let mut line = Cmdline::new(CMDLINE_BYTES)?;
    // A reboot is a triple fault, which is an exit of KVM and needs no device ...
    line.insert_str("reboot=t")?;
    // ... and a panic reboots at once.
    line.insert_str("panic=-1")?;
    // The clock is KVM's, so that nothing needs to be calibrated or watched.
    line.insert_str("tsc=reliable")?;
    line.insert_str("no_timer_check")?;
    // No wait for entropy: the processor's and the seed in the boot parameters are trusted.
    line.insert_str("random.trust_cpu=on")?;
    line.insert_str("random.trust_bootloader=on")?;
    if console {
        // The kernel looks for a serial port only if it is told that there is one.
        line.insert_str("8250.nr_uarts=1")?;
        line.insert_str("console=ttyS0,115200")?;
        line.insert_str("loglevel=7")?;
    } else {
        // Errors and worse are kept in the log below; a panic raises the level by itself, so that
        // its report is complete.
        line.insert_str("loglevel=4")?;
    }
    insert_message_log(&mut line)?;
    // The root image, used in place: its pages are the host's page cache.
    line.insert_str("root=/dev/pmem0 rootfstype=erofs rootflags=dax=always ro init=/init")?;
    // libnvdimm registers devices in the background, and nothing else waits for it.
    line.insert_str("rootwait")?;
    for device in devices {
        line.insert_str(format!(
            "virtio_mmio.device={}K@{:#x}:{}",
            VIRTIO_MMIO_BYTES >> 10,
            device.address.0,
            device.irq
        ))?;
    }
    Ok(line.as_cstring()?.to_string_lossy().into_owned())
}

/// Has the kernel keep its last messages in memory that the monitor reads after the end: no device,
/// and no attack surface.
fn insert_message_log(line: &mut Cmdline) -> Result<(), Error> {
    line.insert_str(format!("ramoops.mem_address={:#x} ramoops.mem_size={LOG_BYTES:#x}", LOG.0))?;
    line.insert_str(format!("ramoops.console_size={LOG_BYTES:#x}"))?;
    // The whole zone is for console messages, in ordinary cached memory, without error correction.
    line.insert_str("ramoops.record_size=0 ramoops.ftrace_size=0 ramoops.pmsg_size=0")?;
    line.insert_str("ramoops.ecc=0 ramoops.mem_type=2")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_has_devices_and_requested_console() {
        let devices = [VirtioMmioDevice { address: GuestAddress(0xd000_0000), irq: 5 }];
        let line = build_command_line(&devices, false).unwrap();
        assert!(line.contains("virtio_mmio.device=4K@0xd0000000:5"), "{line}");
        assert!(!line.contains("console=ttyS0"), "{line}");
        assert!(build_command_line(&devices, true).unwrap().contains("console=ttyS0"));
    }
}
