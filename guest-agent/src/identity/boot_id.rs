//! The boot id of a copy. The kernel makes `boot_id` once and never again, so a file of the agent's
//! is mounted over it.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount_bind, mount_remount};

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The path at which the file is made. The workload can write here too, but it is frozen.
const SOURCE: &str = "/dev/shm/.boot_id";

/// The file that is read as the boot id.
#[derive(Debug)]
pub struct BootIdFile(OwnedFd);

impl BootIdFile {
    /// Mounts the file, with the kernel's boot id as its content, so that a copy only has to write
    /// it. Called before a sandbox is saved, while the workload is frozen.
    pub fn mount() -> Result<BootIdFile, Errno> {
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let text = std::fs::read(BOOT_ID)
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        // The workload may have put a file there, before it was frozen, to make this fail.
        let _ = rustix::fs::unlinkat(CWD, SOURCE, AtFlags::empty());
        let file = rustix::fs::open(SOURCE, flags, Mode::from_raw_mode(0o444))?;
        let mounted =
            write_start(&file, &text).and_then(|()| mount_bind(SOURCE, BOOT_ID)).and_then(|()| {
                let flags =
                    MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
                mount_remount(BOOT_ID, flags | MountFlags::NOEXEC, "")
            });
        rustix::fs::unlinkat(CWD, SOURCE, AtFlags::empty())?;
        mounted.map(|()| BootIdFile(file))
    }

    /// Replaces the boot id by one that is made of the instance id.
    pub fn write(&self, instance: &[u8; 16]) -> Result<(), Errno> {
        write_start(&self.0, format_uuid(instance).as_bytes())
    }
}

/// Replaces the beginning of a file with one write.
fn write_start(file: impl AsFd, bytes: &[u8]) -> Result<(), Errno> {
    let written = rustix::io::pwrite(file, bytes, 0)?;
    if written == bytes.len() { Ok(()) } else { Err(Errno::IO) }
}

/// Formats a version 4 UUID and a newline, as the kernel does.
fn format_uuid(bytes: &[u8; 16]) -> String {
    let mut bytes = *bytes;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let mut text = String::with_capacity(37);
    for (index, byte) in bytes.iter().enumerate() {
        if [4, 6, 8, 10].contains(&index) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boot_id_is_a_uuid_of_the_instance_id() {
        let instance = [0xab, 0, 1, 2, 3, 4, 0xff, 6, 0xff, 8, 9, 10, 11, 12, 13, 14];
        assert_eq!(format_uuid(&instance), "ab000102-0304-4f06-bf08-090a0b0c0d0e\n");
    }
}
