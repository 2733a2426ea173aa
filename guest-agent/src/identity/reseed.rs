//! Gives a restored sandbox its own entropy, time and names, before anything of the workload runs
//! in it again.

use std::os::fd::AsRawFd;

use chitin_protocol::{Failure, MIN_ENTROPY, Reseed};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::time::{ClockId, Timespec};
use zeroize::Zeroize;

use super::boot_id::BootIdFile;
use crate::error::make_failure;
use crate::syscall::check_result;

/// `_IOW('R', 0x03, int[2])` and `_IO('R', 0x07)` of the kernel's `linux/random.h`.
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

/// The most entropy that is accepted, in bytes. The generator's key has 32.
const MAX_ENTROPY: usize = 64;

/// Applies all parts of a reseed, in an order in which a failure leaves nothing running on old
/// entropy.
pub fn apply_reseed(reseed: &Reseed, boot_id: &BootIdFile) -> Result<(), Failure> {
    let failed = |operation| move |errno| make_failure(operation, b"", errno);
    add_entropy(reseed.entropy.expose())
        .map_err(failed("reseed the kernel's random number generator"))?;
    let seconds = i64::try_from(reseed.unix_ns / 1_000_000_000).unwrap_or(i64::MAX);
    let nanoseconds = i64::try_from(reseed.unix_ns % 1_000_000_000).unwrap_or(0);
    let now = Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    rustix::time::clock_settime(ClockId::Realtime, now).map_err(failed("set the clock"))?;
    rustix::system::sethostname(make_host_name(&reseed.instance).as_bytes())
        .map_err(failed("set the host name"))?;
    boot_id.write(&reseed.instance).map_err(failed("set the boot id"))
}

/// Makes a host name of `chitin-` and the first four bytes of the instance id.
fn make_host_name(instance: &[u8; 16]) -> String {
    let [a, b, c, d, ..] = instance;
    format!("chitin-{a:02x}{b:02x}{c:02x}{d:02x}")
}

/// The kernel's `struct rand_pool_info`: the number of bits, the number of bytes, and the bytes.
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
    // SAFETY: the kernel reads two integers and as many bytes as the second one says, at most
    // `MAX_ENTROPY`. All of them are in `entropy`, which outlives the call.
    let added = check_result(unsafe {
        libc::ioctl(random.as_raw_fd(), RNDADDENTROPY as _, &raw const entropy)
    });
    entropy.bytes.zeroize();
    added?;
    // Otherwise the new entropy would wait for the generator's next reseed, and until then all
    // copies would draw the same numbers.
    // SAFETY: RNDRESEEDCRNG takes no argument and accesses no memory of this process.
    check_result(unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG as _, 0) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_little_entropy_is_refused() {
        assert_eq!(add_entropy(&[0; MIN_ENTROPY - 1]), Err(Errno::INVAL));
        assert_eq!(add_entropy(&[0; MAX_ENTROPY + 1]), Err(Errno::INVAL));
    }

    #[test]
    fn host_name_begins_with_the_instance_id() {
        let instance = [0xab, 0, 1, 2, 3, 4, 0xff, 6, 0xff, 8, 9, 10, 11, 12, 13, 14];
        assert_eq!(make_host_name(&instance), "chitin-ab000102");
    }
}
