//! The kernel command line, each word with its reason. Nothing secret is ever on it: any process in the guest reads it.

use linux_loader::cmdline::{Cmdline, Error};

use super::layout::{CMDLINE_BYTES, LOG, LOG_BYTES, VIRTIO_MMIO_BYTES};
use crate::virtio::mmio::MmioDeviceInfo;

/// The command line of a guest with these virtio-mmio devices.
///
/// # Errors
/// It does not fit into [`CMDLINE_BYTES`](super::layout::CMDLINE_BYTES).
pub fn command_line(devices: &[MmioDeviceInfo], console: bool) -> Result<String, Error> {
    let mut line = Cmdline::new(CMDLINE_BYTES)?;
    // A guest ends itself by a triple fault, which is an exit of KVM and needs no device, ...
    line.insert_str("reboot=t")?;
    // ... and a panic ends the same way, at once.
    line.insert_str("panic=-1")?;
    // The clock comes from KVM, so nothing needs to be calibrated or watched.
    line.insert_str("tsc=reliable")?;
    line.insert_str("no_timer_check")?;
    // There is nothing to wait for in entropy: the processor's and the seed in the boot parameters are trusted.
    line.insert_str("random.trust_cpu=on")?;
    line.insert_str("random.trust_bootloader=on")?;
    if console {
        // The kernel looks for no serial port unless told that there is one.
        line.insert_str("8250.nr_uarts=1")?;
        line.insert_str("console=ttyS0,115200")?;
        line.insert_str("loglevel=7")?;
    } else {
        // Errors and worse are kept in the log below; a panic raises the level by itself, so that its report is whole.
        line.insert_str("loglevel=4")?;
    }
    // The last messages, in memory that the monitor reads after the end: no device, and nothing to attack.
    line.insert_str(format!("ramoops.mem_address={:#x} ramoops.mem_size={LOG_BYTES:#x}", LOG.0))?;
    line.insert_str(format!("ramoops.console_size={LOG_BYTES:#x}"))?;
    // All of it is one zone for console messages, in ordinary cached memory, without error correction.
    line.insert_str(
        "ramoops.record_size=0 ramoops.ftrace_size=0 ramoops.pmsg_size=0 ramoops.ecc=0 ramoops.mem_type=2",
    )?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestAddress;

    #[test]
    fn devices_are_announced_and_the_console_only_when_asked_for() {
        let devices = [MmioDeviceInfo { address: GuestAddress(0xd000_0000), irq: 5 }];
        let line = command_line(&devices, false).unwrap();
        assert!(
            line.contains("virtio_mmio.device=4K@0xd0000000:5") && !line.contains("console=ttyS0")
        );
        assert!(command_line(&devices, true).unwrap().contains("console=ttyS0"));
    }
}
