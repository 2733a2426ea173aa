//! For the tests of filters, under the feature `seccomp-tests`: a port at which a guest has its monitor do what it must not.

use std::ptr;

use super::event_loop::{Mailbox, Request};
use crate::bus::BusDevice;

/// Where no PC has anything.
pub(super) const PORT: u64 = 0x7e0;

/// The port: a letter says what is done, and by which thread.
pub(super) struct Trial(pub(super) Mailbox);

impl BusDevice for Trial {
    fn read(&mut self, _: u64, _: &mut [u8]) {}

    fn write(&mut self, _: u64, data: &[u8]) {
        match data.first() {
            Some(letter @ (b'A'..=b'Z')) => forbidden(*letter),
            Some(letter) => self.0.send(Request::Trial(letter.to_ascii_uppercase())),
            None => {}
        }
    }
}

/// Does what no thread may.
pub(super) fn forbidden(letter: u8) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: none of these touches memory that anybody uses, and none is let through.
    unsafe {
        match letter {
            b'S' => drop(libc::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0)),
            b'O' => drop(libc::open(c"/".as_ptr(), libc::O_RDONLY)),
            b'E' => drop(libc::execve(c"/".as_ptr(), ptr::null(), ptr::null())),
            b'X' => drop(libc::mmap(
                ptr::null_mut(),
                4096,
                libc::PROT_READ | libc::PROT_EXEC,
                flags,
                -1,
                0,
            )),
            b'P' => drop(libc::mprotect(ptr::null_mut(), 0, libc::PROT_EXEC)),
            // KVM_CREATE_VM, and pushing characters back into a terminal.
            b'K' => drop(libc::ioctl(0, 0xae01, 0)),
            b'T' => drop(libc::ioctl(2, libc::TIOCSTI, c"x".as_ptr())),
            b'R' => drop(libc::kill(1, 0)),
            _ => {}
        }
    }
}
