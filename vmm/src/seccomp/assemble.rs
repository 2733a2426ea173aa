//! From rules to a program for the kernel.
//!
//! The kernel runs the program for every call whose arguments matter, which is every entry into the guest, and when a filter
//! is installed once for each number there is, to find those that are always allowed. So `KVM_RUN` is looked for first, and
//! everything else is found by halving: a list as long as ours, gone through one by one, takes five times as long to install.
//!
//! ```text
//!   other architecture? ── kill
//!   ioctl? ── KVM_RUN? ── allow          (the one that is often called)
//!        └─── another request of the list? ── allow, else refuse
//!   number ≥ the middle one's? ─┬─ … ── number = this one's? ── check of arguments ── allow, else refuse
//!                               └─ …
//! ```

use libc::{c_long, sock_filter};

use super::rules::{Check, Ioctl};

// Offsets in `struct seccomp_data`; the lower half of an argument comes first.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

/// `AUDIT_ARCH_X86_64` of Linux.
const X86_64: u32 = 0xc000_003e;

const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const AT_LEAST: u32 = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
const ANY_BIT: u32 = libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K;
const ALWAYS: u32 = libc::BPF_JMP | libc::BPF_JA;
const RETURN: u32 = libc::BPF_RET | libc::BPF_K;

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
/// A signal whose handler says what was refused; it does not return.
const REFUSE: u32 = libc::SECCOMP_RET_TRAP;
const KILL: u32 = libc::SECCOMP_RET_KILL_PROCESS;

/// A call and what its arguments must be, and what is to be done then.
pub struct Allowed {
    pub call: c_long,
    pub check: Check,
}

/// Assembles a filter that allows these calls, each once, and ioctl with these requests, the first of which is the fastest.
pub fn program(calls: &[Allowed], ioctls: &[&Ioctl]) -> Vec<sock_filter> {
    let mut calls: Vec<(u32, &Allowed)> =
        calls.iter().map(|allowed| (number(allowed.call), allowed)).collect();
    calls.sort_by_key(|(number, _)| *number);
    let mut program =
        vec![op(LOAD, ARCHITECTURE), jump(EQUAL, X86_64, 1, 0), op(RETURN, KILL), op(LOAD, NUMBER)];
    if let Some((first, rest)) = ioctls.split_first() {
        let mut rest: Vec<u32> = rest.iter().map(|ioctl| ioctl.number).collect();
        rest.sort_unstable();
        let mut body = vec![op(LOAD, ARGUMENTS + 8), jump(EQUAL, first.number, 0, 1), op(RETURN, ALLOW)];
        body.extend(halve(
            &rest,
            &|request| match request {
                Some(request) => vec![jump(EQUAL, *request, 0, 1), op(RETURN, ALLOW), op(RETURN, REFUSE)],
                None => vec![op(RETURN, REFUSE)],
            },
            &|request| *request,
        ));
        program.extend(branch(EQUAL, number(libc::SYS_ioctl), body));
    }
    program.extend(halve(
        &calls,
        &|call| match call {
            Some((number, allowed)) => {
                let mut leaf = branch(EQUAL, *number, arguments(allowed.check));
                leaf.push(op(RETURN, REFUSE));
                leaf
            }
            None => vec![op(RETURN, REFUSE)],
        },
        &|(number, _)| *number,
    ));
    program
}

/// A tree over what is sorted by `key`, with a leaf for each, or one for nothing.
fn halve<T>(
    sorted: &[T],
    leaf: &dyn Fn(Option<&T>) -> Vec<sock_filter>,
    key: &dyn Fn(&T) -> u32,
) -> Vec<sock_filter> {
    if sorted.len() <= 1 {
        return leaf(sorted.first());
    }
    let (low, high) = sorted.split_at(sorted.len() / 2);
    let middle = high.first().map_or(u32::MAX, key);
    let mut tree = branch(AT_LEAST, middle, halve(high, leaf, key));
    tree.extend(halve(low, leaf, key));
    tree
}

/// `body` where the comparison holds; otherwise what follows it.
fn branch(comparison: u32, value: u32, body: Vec<sock_filter>) -> Vec<sock_filter> {
    let mut code = match u8::try_from(body.len()) {
        Ok(length) => vec![jump(comparison, value, 0, length)],
        // A conditional jump reaches 255 instructions, an unconditional one any.
        Err(_) => {
            vec![jump(comparison, value, 1, 0), op(ALWAYS, u32::try_from(body.len()).unwrap_or(u32::MAX))]
        }
    };
    code.extend(body);
    code
}

/// Decides by the arguments.
fn arguments(check: Check) -> Vec<sock_filter> {
    match check {
        Check::Any => vec![op(RETURN, ALLOW)],
        Check::Without(argument, bits) => vec![
            op(LOAD, ARGUMENTS + 8 * u32::from(argument)),
            jump(ANY_BIT, bits, 0, 1),
            op(RETURN, REFUSE),
            op(RETURN, ALLOW),
        ],
        Check::OneOf(argument, values) => {
            let mut code = vec![op(LOAD, ARGUMENTS + 8 * u32::from(argument))];
            for value in values {
                code.extend([jump(EQUAL, *value, 0, 1), op(RETURN, ALLOW)]);
            }
            code.push(op(RETURN, REFUSE));
            code
        }
    }
}

fn number(call: c_long) -> u32 {
    // None is as large, or negative: a number that nobody has would be allowed.
    u32::try_from(call).unwrap_or(u32::MAX)
}

#[expect(clippy::cast_possible_truncation, reason = "codes have 16 bits")]
fn jump(code: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code: code as u16, jt, jf, k }
}

fn op(code: u32, k: u32) -> sock_filter {
    jump(code, k, 0, 0)
}
