//! The loopback interface, the only one of a sandbox.

use std::net::Ipv4Addr;

use rustix::io::Errno;
use rustix::ioctl::{Opcode, Setter};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use rustix::thread::CapabilitySet;

use crate::log_line;

/// A second address of the interface, that of the resolver.
///
/// With `AI_ADDRCONFIG`, getaddrinfo(3) of glibc resolves names to IPv4 addresses only if an
/// interface has one besides 127.0.0.1. Any other serves, also a loopback address.
const SECOND_ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 53);

/// The index of the loopback interface in every network namespace.
const INTERFACE: u32 = 1;

/// Adds the second address in a container, whose runtime has raised the interface, and gives up the
/// capability for it. Without the capability, only names with `AI_ADDRCONFIG` fail to resolve.
pub fn configure_in_container() {
    if let Err(errno) = add_second_address() {
        log_line(format_args!("cannot add an address to the loopback interface: {errno}"));
    }
    if let Err(errno) = drop_net_admin() {
        log_line(format_args!("cannot give up CAP_NET_ADMIN: {errno}"));
    }
}

fn drop_net_admin() -> Result<(), Errno> {
    let mut sets = rustix::thread::capabilities(None)?;
    sets.effective.remove(CapabilitySet::NET_ADMIN);
    sets.permitted.remove(CapabilitySet::NET_ADMIN);
    rustix::thread::set_capabilities(None, sets)
}

/// Adds [`SECOND_ADDRESS`] to the interface (rtnetlink(7)). Needs `CAP_NET_ADMIN`.
pub fn add_second_address() -> Result<(), Errno> {
    let (family, flags) = (AddressFamily::NETLINK, SocketFlags::CLOEXEC);
    // Without a protocol, the first one: NETLINK_ROUTE.
    let socket = rustix::net::socket_with(family, SocketType::RAW, flags, None)?;
    // A socket without a peer talks to the kernel, which answers before the call returns.
    rustix::net::send(&socket, &make_request(SECOND_ADDRESS), SendFlags::empty())?;
    let mut answer = [0; 256];
    let (_, length) = rustix::net::recv(&socket, &mut answer[..], RecvFlags::DONTWAIT)?;
    // After the header of an acknowledgement: 0, or the negated error.
    let error = answer.get(..length).and_then(|answer| answer.get(16..20)).ok_or(Errno::BADMSG)?;
    match error.try_into().map_or(libc::EBADMSG, |error| -i32::from_ne_bytes(error)) {
        0 | libc::EEXIST => Ok(()),
        errno => Err(Errno::from_raw_os_error(errno)),
    }
}

/// Makes an `RTM_NEWADDR` request: header, `ifaddrmsg`, and the address in two attributes.
fn make_request(address: Ipv4Addr) -> Vec<u8> {
    let flags = [libc::NLM_F_REQUEST, libc::NLM_F_ACK, libc::NLM_F_CREATE, libc::NLM_F_EXCL];
    let flags = flags.into_iter().fold(0, |all, flag| all | flag.cast_unsigned());
    let attribute = |kind: u16| {
        [&8_u16.to_ne_bytes(), &kind.to_ne_bytes(), address.octets().as_slice()].concat()
    };
    // IPv4, a prefix of 8 bits, no flags.
    let family = libc::AF_INET.to_ne_bytes()[0];
    let body = [
        [family, 8, 0, libc::RT_SCOPE_HOST].as_slice(),
        &INTERFACE.to_ne_bytes(),
        &attribute(libc::IFA_LOCAL),
        &attribute(libc::IFA_ADDRESS),
    ]
    .concat();
    let length = u32::try_from(16 + body.len()).unwrap_or(0);
    // Both are numbers of 16 bits: together one of 32, with the kind in its lower half.
    let kind_and_flags = u32::from(libc::RTM_NEWADDR) | flags << 16;
    // Sequence number and port are 0.
    [length.to_ne_bytes().as_slice(), &kind_and_flags.to_ne_bytes(), &[0; 8], &body].concat()
}

#[expect(clippy::cast_possible_truncation, reason = "the flags are 16 bits wide")]
const INTERFACE_UP: libc::c_short = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;

/// `linux/sockios.h`. The type of this constant differs between C libraries.
const SIOCSIFFLAGS: Opcode = 0x8914;

/// Raises the loopback interface, the only one of a sandbox.
pub fn raise_interface() -> Result<(), Errno> {
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
