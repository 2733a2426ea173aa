//! What a restored sandbox gets of its own before anything of the workload runs in it again.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use chitin_protocol::{Failure, MIN_ENTROPY, Reseed};
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount_bind, mount_remount};
use rustix::time::{ClockId, Timespec};
use zeroize::Zeroize;

use crate::failure;
use crate::syscall::check_result;

/// `_IOW('R', 0x03, int[2])` and `_IO('R', 0x07)` of the kernel's `linux/random.h`.
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

/// The most entropy taken at once, in bytes; the generator's key has 32.
const MAX_ENTROPY: usize = 64;

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Where the file that covers [`BOOT_ID`] is made. The workload can write here too, but it is frozen.
const BOOT_ID_SOURCE: &str = "/dev/shm/.boot_id";

/// Does all of it, in an order in which a failure leaves nothing running on old entropy.
pub fn reseed(reseed: &Reseed, boot_id: &BootId) -> Result<(), Failure> {
    let failed = |what| move |errno| failure(what, b"", errno);
    add_entropy(reseed.entropy.expose())
        .map_err(failed("reseed the kernel's random number generator"))?;
    let seconds = i64::try_from(reseed.unix_ns / 1_000_000_000).unwrap_or(i64::MAX);
    let nanoseconds = i64::try_from(reseed.unix_ns % 1_000_000_000).unwrap_or(0);
    let now = Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    rustix::time::clock_settime(ClockId::Realtime, now).map_err(failed("set the clock"))?;
    rustix::system::sethostname(host_name(&reseed.instance).as_bytes())
        .map_err(failed("set the host name"))?;
    boot_id.set(&reseed.instance).map_err(failed("set the boot id"))
}

/// `chitin-` and the first four bytes of the instance.
fn host_name(instance: &[u8; 16]) -> String {
    let [a, b, c, d, ..] = instance;
    format!("chitin-{a:02x}{b:02x}{c:02x}{d:02x}")
}

/// The kernel's `struct rand_pool_info`: bits, bytes, and the bytes themselves.
#[repr(C)]
struct Entropy {
    bits: libc::c_int,
    len: libc::c_int,
    bytes: [u8; MAX_ENTROPY],
}

fn add_entropy(bytes: &[u8]) -> Result<(), Errno> {
    if !(MIN_ENTROPY..=MAX_ENTROPY).contains(&bytes.len()) {
        return Err(Errno::INVAL);
    }
    let len = i32::try_from(bytes.len()).map_err(|_| Errno::INVAL)?;
    let mut entropy = Entropy { bits: len * 8, len, bytes: [0; MAX_ENTROPY] };
    entropy.bytes[..bytes.len()].copy_from_slice(bytes);
    let random = rustix::fs::open("/dev/random", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    // SAFETY: the kernel reads the two lengths and as many bytes as the second says, all of them in `entropy`.
    let added = check_result(unsafe {
        libc::ioctl(random.as_raw_fd(), RNDADDENTROPY as _, &raw const entropy)
    });
    entropy.bytes.zeroize();
    added?;
    // Without it the new entropy would wait for the generator's next turn, and until then all copies draw the same.
    // SAFETY: takes no argument.
    check_result(unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG as _, 0) })
}

/// What is read as the boot id. The kernel makes that once and never again, so that a file of ours lies over it.
#[derive(Debug)]
pub struct BootId(OwnedFd);

impl BootId {
    /// Puts the file, which says what the kernel says, over it. To be done while a sandbox is still to be saved, so that a
    /// copy only has to write, and while the workload is frozen.
    pub fn cover() -> Result<BootId, Errno> {
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let text = std::fs::read(BOOT_ID)
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        // One that the workload has put there, before it was frozen, to be in the way.
        let _ = rustix::fs::unlinkat(CWD, BOOT_ID_SOURCE, AtFlags::empty());
        let file = rustix::fs::open(BOOT_ID_SOURCE, flags, Mode::from_raw_mode(0o444))?;
        let covered = write_all(&file, &text)
            .and_then(|()| mount_bind(BOOT_ID_SOURCE, BOOT_ID))
            .and_then(|()| {
                let flags =
                    MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
                mount_remount(BOOT_ID, flags | MountFlags::NOEXEC, "")
            });
        rustix::fs::unlinkat(CWD, BOOT_ID_SOURCE, AtFlags::empty())?;
        covered.map(|()| BootId(file))
    }

    fn set(&self, instance: &[u8; 16]) -> Result<(), Errno> {
        write_all(&self.0, uuid(instance).as_bytes())
    }
}

/// Replaces the beginning of a file, in one go or not at all.
fn write_all(file: impl AsFd, bytes: &[u8]) -> Result<(), Errno> {
    let written = rustix::io::pwrite(file, bytes, 0)?;
    if written == bytes.len() { Ok(()) } else { Err(Errno::IO) }
}

/// As the kernel writes it: a version 4 UUID and a newline.
fn uuid(bytes: &[u8; 16]) -> String {
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
    fn names_are_made_of_the_instance() {
        let instance = [0xab, 0, 1, 2, 3, 4, 0xff, 6, 0xff, 8, 9, 10, 11, 12, 13, 14];
        assert_eq!(host_name(&instance), "chitin-ab000102");
        assert_eq!(uuid(&instance), "ab000102-0304-4f06-bf08-090a0b0c0d0e\n");
    }

    #[test]
    fn too_little_entropy_is_refused() {
        assert_eq!(add_entropy(&[0; MIN_ENTROPY - 1]), Err(Errno::INVAL));
        assert_eq!(add_entropy(&[0; MAX_ENTROPY + 1]), Err(Errno::INVAL));
    }
}
