//! The filter `default_deny`, assembled as a binary search: a few comparisons decide about any system call, however long the list.
//! (The kernel runs a filter only where the answer depends on arguments, or is no; yes it remembers by number.)
//!
//! What is not listed fails with EPERM and is not killed: programs try things and go on without, and a killed one says nothing
//! about why. The call of another architecture is killed, for no program of this image makes one by accident.

use rustix::io::Errno;

use super::allowlist::{ALLOWED, LAST};
use crate::syscall::check_result;

/// Operation codes of classic BPF (`linux/bpf_common.h`): what this filter needs of them.
const LOAD: u16 = 0x20;
const JUMP: u16 = 0x05;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_AT_LEAST: u16 = 0x35;
const JUMP_ANY_BIT: u16 = 0x45;
const RETURN: u16 = 0x06;

/// Offsets in `struct seccomp_data`; of an argument the lower half, which is all the kernel looks at in those used here.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const fn argument(index: u32) -> u32 {
    16 + 8 * index
}

/// `AUDIT_ARCH_X86_64`.
const X86_64: u32 = 0xc000_003e;

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const KILL: u32 = libc::SECCOMP_RET_KILL_PROCESS;
const fn fail(errno: Errno) -> u32 {
    libc::SECCOMP_RET_ERRNO | errno.raw_os_error().cast_unsigned()
}

/// The namespaces that clone makes (`CLONE_NEW*` of `linux/sched.h`; CLONE_NEWTIME is not clone's).
const NAMESPACES: u32 = 0x7e02_0000;

type Instruction = libc::sock_filter;

const fn instruction(code: u16, k: u32) -> Instruction {
    Instruction { code, jt: 0, jf: 0, k }
}

/// Jumps by so many instructions if true, and if false.
const fn branch(code: u16, k: u32, jt: u8, jf: u8) -> Instruction {
    Instruction { code, jt, jf, k }
}

/// What is done from one number on, up to the next one's.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Action {
    Return(u32),
    Socket,
    Clone,
    Ioctl,
    Personality,
}

impl Action {
    fn code(self) -> Vec<Instruction> {
        match self {
            Action::Return(value) => vec![instruction(RETURN, value)],
            Action::Socket => vec![
                instruction(LOAD, argument(0)),
                branch(JUMP_EQUAL, libc::AF_UNIX.cast_unsigned(), 6, 0),
                branch(JUMP_EQUAL, libc::AF_INET.cast_unsigned(), 5, 0),
                branch(JUMP_EQUAL, libc::AF_INET6.cast_unsigned(), 4, 0),
                branch(JUMP_EQUAL, libc::AF_NETLINK.cast_unsigned(), 0, 2),
                instruction(LOAD, argument(2)),
                branch(JUMP_EQUAL, libc::NETLINK_ROUTE.cast_unsigned(), 1, 0),
                instruction(RETURN, fail(Errno::AFNOSUPPORT)),
                instruction(RETURN, ALLOW),
            ],
            Action::Clone => vec![
                instruction(LOAD, argument(0)),
                branch(JUMP_ANY_BIT, NAMESPACES, 0, 1),
                instruction(RETURN, fail(Errno::PERM)),
                instruction(RETURN, ALLOW),
            ],
            Action::Ioctl => vec![
                instruction(LOAD, argument(1)),
                branch(JUMP_EQUAL, TIOCSTI, 1, 0),
                branch(JUMP_EQUAL, TIOCLINUX, 0, 1),
                instruction(RETURN, fail(Errno::PERM)),
                instruction(RETURN, ALLOW),
            ],
            Action::Personality => vec![
                instruction(LOAD, argument(0)),
                branch(JUMP_EQUAL, 0, 2, 0),
                branch(JUMP_EQUAL, u32::MAX, 1, 0),
                instruction(RETURN, fail(Errno::PERM)),
                instruction(RETURN, ALLOW),
            ],
        }
    }
}

/// `asm-generic/ioctls.h`; their type differs from C library to C library.
const TIOCSTI: u32 = 0x5412;
const TIOCLINUX: u32 = 0x541c;

/// A filter that is ready to be installed.
pub struct Filter(Vec<Instruction>);

impl Filter {
    /// Assembles `default_deny`.
    pub fn default_deny() -> Filter {
        let ranges = ranges();
        let mut code = vec![
            instruction(LOAD, ARCHITECTURE),
            branch(JUMP_EQUAL, X86_64, 1, 0),
            instruction(RETURN, KILL),
            instruction(LOAD, NUMBER),
        ];
        search(&ranges, &mut code);
        Filter(code)
    }

    /// Installs it for this thread and what it becomes. A system call only. Needs `no_new_privs`.
    pub fn install(&self) -> Result<(), Errno> {
        let program = libc::sock_fprog {
            // A few hundred: the kernel's own limit is 4096.
            len: u16::try_from(self.0.len()).map_err(|_| Errno::TOOBIG)?,
            filter: self.0.as_ptr().cast_mut(),
        };
        // SAFETY: the kernel reads `len` instructions at `filter`, which outlive the call.
        check_result(unsafe {
            libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program)
        })
    }
}

/// The whole range of numbers, cut where the answer changes: (first number, action), ascending from 0.
fn ranges() -> Vec<(u32, Action)> {
    let last = usize::try_from(LAST).unwrap_or(0);
    let mut actions = vec![Action::Return(fail(Errno::PERM)); last + 1];
    let mut set = |call: u32, action| {
        if let Some(slot) = usize::try_from(call).ok().and_then(|call| actions.get_mut(call)) {
            *slot = action;
        }
    };
    for call in ALLOWED.iter().flat_map(|group| group.calls) {
        set(call.number, Action::Return(ALLOW));
    }
    for (call, action) in [
        (libc::SYS_socket, Action::Socket),
        (libc::SYS_clone, Action::Clone),
        (libc::SYS_clone3, Action::Return(fail(Errno::NOSYS))),
        (libc::SYS_ioctl, Action::Ioctl),
        (libc::SYS_personality, Action::Personality),
    ] {
        set(u32::try_from(call).unwrap_or(u32::MAX), action);
    }
    let mut ranges: Vec<(u32, Action)> = Vec::new();
    for (call, action) in (0..).zip(actions) {
        if ranges.last().is_none_or(|(_, before)| *before != action) {
            ranges.push((call, action));
        }
    }
    // The x32 ABI's numbers are above all others, and fail like those of the future.
    ranges.push((LAST + 1, Action::Return(fail(Errno::NOSYS))));
    ranges
}

/// Appends the search in `ranges`, of which one applies.
fn search(ranges: &[(u32, Action)], code: &mut Vec<Instruction>) {
    let (left, right) = ranges.split_at(ranges.len() / 2);
    let (Some(_), Some((start, _))) = (left.first(), right.first()) else {
        code.extend(ranges.iter().flat_map(|(_, action)| action.code()));
        return;
    };
    let at = code.len();
    code.push(branch(JUMP_AT_LEAST, *start, 0, 0));
    search(left, code);
    let distance = code.len() - at - 1;
    match u8::try_from(distance) {
        Ok(distance) => code[at].jt = distance,
        Err(_) => {
            // Too far for a branch: over a jump, which goes as far as it likes.
            code[at].jf = 1;
            code.insert(at + 1, instruction(JUMP, u32::try_from(distance).unwrap_or(u32::MAX)));
        }
    }
    search(right, code);
}

#[cfg(test)]
#[path = "default_deny_test.rs"]
mod tests;
