//! Settings of a kernel, or of namespaces, that serve the sandbox alone.

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Setter};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::error::{Context, SystemError};

/// Sets the host name and raises the loopback interface.
pub fn set_up_network() -> Result<(), SystemError> {
    rustix::system::sethostname(b"chitin").context("set", "the host name")?;
    raise_loopback().context("raise", "the loopback interface")
}

/// Sets parameters of a microVM's kernel.
pub fn set_parameters() -> Result<(), SystemError> {
    // The BPF compiler takes 2 MiB of fresh memory for its first program, which costs more than ten
    // milliseconds in a microVM. A filter hardly ever runs, because the kernel remembers the calls
    // that it always allows (seccomp's bitmap).
    clear_parameter("/proc/sys/net/core/bpf_jit_enable")?;
    // Otherwise a thread checks twice a second whether memory is fragmented, and an idle sandbox
    // never rests.
    clear_parameter("/proc/sys/vm/compaction_proactiveness")?;
    // In a new user namespace every user has all capabilities, and with them access to the parts of
    // the kernel that are attacked most.
    clear_parameter("/proc/sys/user/max_user_namespaces")
}

/// Sets a kernel parameter to 0, if the kernel has it.
fn clear_parameter(path: &'static str) -> Result<(), SystemError> {
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    match rustix::fs::open(path, flags, Mode::empty())
        .and_then(|file| rustix::io::write(&file, b"0"))
    {
        Ok(_) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(errno).context("write", path),
    }
}

#[expect(clippy::cast_possible_truncation, reason = "the flags are 16 bits wide")]
const INTERFACE_UP: libc::c_short = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;

/// `linux/sockios.h`. The type of this constant differs between C libraries.
const SIOCSIFFLAGS: Opcode = 0x8914;

/// Raises the loopback interface, the only one of a sandbox.
pub fn raise_loopback() -> Result<(), Errno> {
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, flags, None)?;
    // SAFETY: all-zero is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l'.cast_signed();
    request.ifr_name[1] = b'o'.cast_signed();
    request.ifr_ifru.ifru_flags = INTERFACE_UP;
    // SAFETY: SIOCSIFFLAGS reads one `ifreq` and writes no memory of this process.
    unsafe {
        let set_flags = Setter::<SIOCSIFFLAGS, libc::ifreq>::new(request);
        rustix::ioctl::ioctl(&socket, set_flags)
    }
}
