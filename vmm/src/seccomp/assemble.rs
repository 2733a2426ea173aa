//! From rules to a program for the kernel.
//!
//! The kernel runs the program for every call whose arguments matter, which is every entry into the guest, and when a filter
//! is installed once for each number there is, to find those that are always allowed. So `KVM_RUN` is looked for first, and
//! everything else is found by halving: a list as long as ours, gone through one by one, takes five times as long to install.
//! Each step of that costs 42 ns of the emulated host, 2 × 462 times; so numbers are halved and not calls, because most numbers
//! are between calls, and those above the last call are out at once. Ends are there once, since the program is also translated
//! into instructions of the processor.
//!
//! ```text
//!   other architecture? ── kill
//!   ioctl? ── KVM_RUN? ── allow          (the one that is often called)
//!        └─── another request of the list? ── allow, else refuse
//!   number over the last? ── refuse
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
    let mut code = Code::with_capacity(3 * (calls.len() + ioctls.len()));
    let (allow, refuse) = (code.push(op(RETURN, ALLOW)), code.push(op(RETURN, REFUSE)));
    let kill = code.push(op(RETURN, KILL));

    let mut calls: Vec<(u32, Check)> =
        calls.iter().map(|allowed| (number(allowed.call), allowed.check)).collect();
    calls.sort_unstable_by_key(|(number, _)| *number);
    let mut entry = code.halve(&calls, refuse, by_number, &mut |code, (number, check)| {
        let checked = code.arguments(*check, allow, refuse);
        code.jump(EQUAL, *number, checked, refuse)
    });
    if let Some((last, _)) = calls.last() {
        entry = code.jump(AT_LEAST, last.saturating_add(1), refuse, entry);
    }
    if let Some((first, rest)) = ioctls.split_first() {
        let mut rest: Vec<(u32, ())> = rest.iter().map(|ioctl| (ioctl.number, ())).collect();
        rest.sort_unstable();
        let others = code.halve(&rest, refuse, by_count, &mut |code, (request, ())| {
            code.jump(EQUAL, *request, allow, refuse)
        });
        let request = code.jump(EQUAL, first.number, allow, others);
        let request = code.push_before(op(LOAD, ARGUMENTS + 8), request);
        entry = code.jump(EQUAL, number(libc::SYS_ioctl), request, entry);
    }
    let known = code.push_before(op(LOAD, NUMBER), entry);
    let right = code.jump(EQUAL, X86_64, known, kill);
    code.push_before(op(LOAD, ARCHITECTURE), right);
    code.0.reverse();
    code.0
}

/// A place in a program that is not finished: the number of instructions behind it.
type Place = usize;

/// A program that is written from its end: the kernel's jumps lead forward only, so where one leads to is there already, and
/// all ends are shared. What is not a jump goes on with what was written before it.
struct Code(Vec<sock_filter>);

impl Code {
    fn with_capacity(capacity: usize) -> Self {
        Self(Vec::with_capacity(capacity))
    }

    fn push(&mut self, op: sock_filter) -> Place {
        self.0.push(op);
        self.0.len() - 1
    }

    /// Writes what goes on at `next`.
    fn push_before(&mut self, op: sock_filter, next: Place) -> Place {
        if next + 1 != self.0.len() {
            self.leap(next);
        }
        self.push(op)
    }

    /// Goes on at `to`, however far that is.
    fn leap(&mut self, to: Place) -> Place {
        let distance = self.0.len() - to - 1;
        self.push(op(ALWAYS, u32::try_from(distance).unwrap_or(u32::MAX)))
    }

    /// Goes on where the comparison says.
    fn jump(&mut self, comparison: u32, value: u32, holds: Place, fails: Place) -> Place {
        // A conditional jump reaches 255 instructions, of which one may be the leap of the other way.
        let reach = |code: &Self, to: Place| code.0.len() - to <= usize::from(u8::MAX);
        let holds = if reach(self, holds) { holds } else { self.leap(holds) };
        let fails = if reach(self, fails) { fails } else { self.leap(fails) };
        let distance = |to: Place| u8::try_from(self.0.len() - to - 1).unwrap_or(u8::MAX);
        let op = jump(comparison, value, distance(holds), distance(fails));
        self.push(op)
    }

    /// A tree over what is sorted by its key, with a leaf for each; `nothing` where there is none. `middle` says where the
    /// second half starts.
    fn halve<T>(
        &mut self,
        sorted: &[(u32, T)],
        nothing: Place,
        middle: fn(&[(u32, T)]) -> usize,
        leaf: &mut impl FnMut(&mut Self, &(u32, T)) -> Place,
    ) -> Place {
        match sorted {
            [] => nothing,
            [one] => leaf(self, one),
            _ => {
                // Neither is empty, so that this comes to an end.
                let (low, high) = sorted.split_at(middle(sorted).clamp(1, sorted.len() - 1));
                let first = high.first().map_or(u32::MAX, |(key, _)| *key);
                let low = self.halve(low, nothing, middle, leaf);
                let high = self.halve(high, nothing, middle, leaf);
                self.jump(AT_LEAST, first, high, low)
            }
        }
    }

    /// Decides by the arguments.
    fn arguments(&mut self, check: Check, allow: Place, refuse: Place) -> Place {
        let (argument, decision) = match check {
            Check::Any => return allow,
            Check::Without(argument, bits) => (argument, self.jump(ANY_BIT, bits, refuse, allow)),
            Check::OneOf(argument, values) => {
                let one = |next, value: &u32| self.jump(EQUAL, *value, allow, next);
                (argument, values.iter().rev().fold(refuse, one))
            }
        };
        self.push_before(op(LOAD, ARGUMENTS + 8 * u32::from(argument)), decision)
    }
}

/// Half of what there is.
fn by_count<T>(sorted: &[(u32, T)]) -> usize {
    sorted.len() / 2
}

/// What has the upper half of the numbers.
fn by_number<T>(sorted: &[(u32, T)]) -> usize {
    let ends = sorted.first().zip(sorted.last());
    let middle = ends.map_or(0, |((first, _), (last, _))| first.midpoint(*last));
    sorted.partition_point(|(key, _)| *key < middle)
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
