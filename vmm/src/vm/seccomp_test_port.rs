//! A port at which a guest has its monitor make system calls that the filters forbid, for the tests
//! of the filters. Compiled under the feature `seccomp-tests` only.

use std::ptr;

use super::device_requests::{DeviceRequest, RequestSender};
use crate::bus::BusDevice;

/// A port that no device of a PC uses.
pub(super) const SECCOMP_TEST_PORT: u64 = 0x7e0;

/// The port. A letter written to it selects the call: in upper case the vCPU thread makes it, in
/// lower case the VMM thread.
pub(super) struct SeccompTestPort(pub RequestSender);

impl BusDevice for SeccompTestPort {
    fn read(&mut self, _: u64, _: &mut [u8]) {}

    fn write(&mut self, _: u64, data: &[u8]) {
        match data.first() {
            Some(letter @ (b'A'..=b'Z')) => make_forbidden_call(*letter),
            Some(letter) => {
                self.0.send(DeviceRequest::ForbiddenCall(letter.to_ascii_uppercase()));
            }
            None => {}
        }
    }
}

/// Makes a system call that no thread may make, or a fault of the monitor itself.
pub(super) fn make_forbidden_call(letter: u8) {
    let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let read_write = libc::PROT_READ | libc::PROT_WRITE;
    let read_exec = libc::PROT_READ | libc::PROT_EXEC;
    // SAFETY: no pointer but to static strings and null is passed, and no memory in use is
    // remapped: the page of `mmap` is new, and `mprotect` and `madvise` get an empty range. Without a filter
    // `execve` of a directory fails. Nothing is ever mapped at address 1: reading it ends the
    // process.
    unsafe {
        match letter {
            b'S' => drop(libc::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0)),
            b'O' => drop(libc::open(c"/".as_ptr(), libc::O_RDONLY)),
            b'E' => drop(libc::execve(c"/".as_ptr(), ptr::null(), ptr::null())),
            b'X' => drop(libc::mmap(ptr::null_mut(), 4096, read_exec, anonymous, -1, 0)),
            // A mapping that grows, one without access, and advice that shows pages to others.
            b'G' => drop(libc::mmap(
                ptr::null_mut(),
                4096,
                read_write,
                anonymous | libc::MAP_GROWSDOWN,
                -1,
                0,
            )),
            b'N' => drop(libc::mmap(ptr::null_mut(), 4096, libc::PROT_NONE, anonymous, -1, 0)),
            b'A' => drop(libc::madvise(ptr::null_mut(), 0, libc::MADV_MERGEABLE)),
            b'P' => drop(libc::mprotect(ptr::null_mut(), 0, libc::PROT_EXEC)),
            // KVM_CREATE_VM, and pushing characters back into a terminal.
            b'K' => drop(libc::ioctl(0, 0xae01, 0)),
            b'T' => drop(libc::ioctl(2, libc::TIOCSTI, c"x".as_ptr())),
            b'R' => drop(libc::kill(1, 0)),
            b'F' => {
                ptr::without_provenance::<u8>(1).read_volatile();
            }
            _ => {}
        }
    }
}
