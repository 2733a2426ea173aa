//! The filter `default_deny`, assembled as a binary search: a few comparisons decide about any
//! system call, however long the list. (The kernel runs a filter only if the result depends on
//! arguments or is a denial. Calls that are always allowed it remembers by number.)
//!
//! A call that is not listed fails with EPERM and does not end the process: programs probe for
//! features and continue without them, and a process that was killed cannot report the reason. A
//! call of another architecture ends the process, because no program of the image makes one by
//! accident.

use rustix::io::Errno;
use seccompiler::{BpfProgram, sock_filter};

use super::NAMESPACES;
use super::allowlist::{ALLOWED, LAST};
use crate::syscall::check_result;

/// The operation codes of classic BPF (`linux/bpf_common.h`) that this filter uses.
const LOAD: u16 = 0x20;
const JUMP: u16 = 0x05;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_AT_LEAST: u16 = 0x35;
const JUMP_ANY_BIT: u16 = 0x45;
const RETURN: u16 = 0x06;

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;

/// Returns the offset of the lower half of an argument, which is all that the kernel reads of the
/// arguments checked here.
const fn argument_offset(index: u32) -> u32 {
    16 + 8 * index
}

/// `AUDIT_ARCH_X86_64`.
const X86_64: u32 = 0xc000_003e;

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const KILL: u32 = libc::SECCOMP_RET_KILL_PROCESS;

/// Returns the filter result that fails a call with `errno`.
const fn fail_with(errno: Errno) -> u32 {
    libc::SECCOMP_RET_ERRNO | errno.raw_os_error().cast_unsigned()
}

/// `asm-generic/ioctls.h`. The type of these constants differs between C libraries.
const TIOCSTI: u32 = 0x5412;
const TIOCLINUX: u32 = 0x541c;

type Instruction = libc::sock_filter;

const fn instruction(code: u16, k: u32) -> Instruction {
    Instruction { code, jt: 0, jf: 0, k }
}

/// Makes a conditional jump over `jt` instructions if the condition is true, and `jf` otherwise.
const fn branch(code: u16, k: u32, jt: u8, jf: u8) -> Instruction {
    Instruction { code, jt, jf, k }
}

/// The treatment of a range of system calls.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Action {
    Return(u32),
    Socket,
    Clone,
    Ioctl,
    Personality,
}

impl Action {
    fn assemble(self) -> Vec<Instruction> {
        match self {
            Action::Return(value) => vec![instruction(RETURN, value)],
            Action::Socket => vec![
                instruction(LOAD, argument_offset(0)),
                branch(JUMP_EQUAL, libc::AF_UNIX.cast_unsigned(), 6, 0),
                branch(JUMP_EQUAL, libc::AF_INET.cast_unsigned(), 5, 0),
                branch(JUMP_EQUAL, libc::AF_INET6.cast_unsigned(), 4, 0),
                branch(JUMP_EQUAL, libc::AF_NETLINK.cast_unsigned(), 0, 2),
                instruction(LOAD, argument_offset(2)),
                branch(JUMP_EQUAL, libc::NETLINK_ROUTE.cast_unsigned(), 1, 0),
                instruction(RETURN, fail_with(Errno::AFNOSUPPORT)),
                instruction(RETURN, ALLOW),
            ],
            Action::Clone => vec![
                instruction(LOAD, argument_offset(0)),
                branch(JUMP_ANY_BIT, NAMESPACES.iter().fold(0, |bits, flag| bits | flag), 0, 1),
                instruction(RETURN, fail_with(Errno::PERM)),
                instruction(RETURN, ALLOW),
            ],
            Action::Ioctl => vec![
                instruction(LOAD, argument_offset(1)),
                branch(JUMP_EQUAL, TIOCSTI, 1, 0),
                branch(JUMP_EQUAL, TIOCLINUX, 0, 1),
                instruction(RETURN, fail_with(Errno::PERM)),
                instruction(RETURN, ALLOW),
            ],
            Action::Personality => vec![
                instruction(LOAD, argument_offset(0)),
                branch(JUMP_EQUAL, 0, 2, 0),
                branch(JUMP_EQUAL, u32::MAX, 1, 0),
                instruction(RETURN, fail_with(Errno::PERM)),
                instruction(RETURN, ALLOW),
            ],
        }
    }
}

/// An assembled filter.
pub struct Filter(Vec<Instruction>);

impl Filter {
    /// Assembles `default_deny`.
    pub fn default_deny() -> Filter {
        let ranges = list_ranges();
        let mut code = vec![
            instruction(LOAD, ARCHITECTURE),
            branch(JUMP_EQUAL, X86_64, 1, 0),
            instruction(RETURN, KILL),
            instruction(LOAD, NUMBER),
        ];
        assemble_search(&ranges, &mut code);
        Filter(code)
    }

    /// Takes over a filter that seccompiler has compiled.
    pub fn from_program(program: &BpfProgram) -> Filter {
        let convert =
            |&sock_filter { code, jt, jf, k }: &sock_filter| Instruction { code, jt, jf, k };
        Filter(program.iter().map(convert).collect())
    }

    /// Installs the filter for this thread and its descendants. Needs `no_new_privs`.
    ///
    /// Makes one system call and allocates nothing.
    pub fn install(&self) -> Result<(), Errno> {
        let program = libc::sock_fprog {
            // A few hundred instructions; the kernel's own limit is 4096.
            len: u16::try_from(self.0.len()).map_err(|_| Errno::TOOBIG)?,
            filter: self.0.as_ptr().cast_mut(),
        };
        // SAFETY: the kernel copies `len` instructions from `filter`, which `self` owns during the
        // call.
        check_result(unsafe {
            libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program)
        })
    }
}

/// Divides the range of numbers where the action changes: (first number, action), ascending from 0.
fn list_ranges() -> Vec<(u32, Action)> {
    let last = usize::try_from(LAST).unwrap_or(0);
    let mut actions = vec![Action::Return(fail_with(Errno::PERM)); last + 1];
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
        (libc::SYS_clone3, Action::Return(fail_with(Errno::NOSYS))),
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
    // The numbers of the x32 ABI are above all others, and fail like those of later kernels.
    ranges.push((LAST + 1, Action::Return(fail_with(Errno::NOSYS))));
    ranges
}

/// Appends a binary search for the range that applies, and the ranges' actions.
fn assemble_search(ranges: &[(u32, Action)], code: &mut Vec<Instruction>) {
    let (left, right) = ranges.split_at(ranges.len() / 2);
    let (Some(_), Some((start, _))) = (left.first(), right.first()) else {
        code.extend(ranges.iter().flat_map(|(_, action)| action.assemble()));
        return;
    };
    let at = code.len();
    code.push(branch(JUMP_AT_LEAST, *start, 0, 0));
    assemble_search(left, code);
    let distance = code.len() - at - 1;
    match u8::try_from(distance) {
        Ok(distance) => code[at].jt = distance,
        Err(_) => {
            // Too far for a branch: skip over an unconditional jump, which has 32 bits.
            code[at].jf = 1;
            code.insert(at + 1, instruction(JUMP, u32::try_from(distance).unwrap_or(u32::MAX)));
        }
    }
    assemble_search(right, code);
}

#[cfg(test)]
#[path = "default_deny_test.rs"]
mod tests;
