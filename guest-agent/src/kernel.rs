//! Settings of a kernel, or of namespaces, that serve the sandbox alone.

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::error::{Context, SystemError};
use crate::loopback;

/// Sets the host name, and raises the loopback interface with its two addresses.
pub fn set_up_network() -> Result<(), SystemError> {
    rustix::system::sethostname(b"chitin").context("set", "the host name")?;
    loopback::raise_interface().context("raise", "the loopback interface")?;
    loopback::add_second_address().context("add an address to", "the loopback interface")
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
