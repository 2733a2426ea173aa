//! System call filters: one for each thread of a jailed monitor, installed before the guest runs
//! and never removed.
//!
//! [`rules`] lists the allowed calls as data; the crate `seccompiler` assembles them into programs.
//!
//! ```text
//!   call ─▶ filter of the thread ─┬─ of another architecture ─▶ SECCOMP_RET_KILL_PROCESS ─▶ end
//!                                 ├─ allowed by a rule ───────▶ executed
//!                                 └─ refused ─▶ SECCOMP_RET_TRAP ─▶ SIGSYS, handled by `refusal`:
//!                                                 reports the call, makes a refused call again,
//!                                                 and the kernel ends the process ─▶ end
//! ```
//!
//! A thread that a guest has taken over can prevent the report. It cannot get the call executed.

mod refusal;
pub mod rules;
mod syscall_names;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::RawFd;

use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::thread::set_no_new_privs;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

use self::rules::{ArgCheck, Scope, ThreadRole};
use crate::spec::VmSpec;

/// The index of the request among the arguments of ioctl.
const IOCTL_REQUEST: u8 = 1;

/// The filters of one monitor.
#[derive(Clone, Copy, Debug)]
pub struct Filters {
    console: bool,
    restored: bool,
    prepared: bool,
    snapshotted: bool,
    recorded: bool,
}

impl Filters {
    /// Selects the filters for a specification.
    pub fn for_spec(spec: &VmSpec) -> Self {
        Self {
            console: spec.console,
            restored: spec.restore,
            prepared: spec.prepared,
            snapshotted: spec.template || spec.record,
            recorded: spec.record,
        }
    }

    fn is_in_scope(self, scope: Scope) -> bool {
        match scope {
            Scope::All => true,
            Scope::Console => self.console,
            Scope::Restored => self.restored,
            Scope::Prepared => self.prepared,
            Scope::Snapshotted => self.snapshotted,
            Scope::Recorded => self.recorded,
        }
    }

    /// Assembles the filter of a thread.
    ///
    /// # Errors
    /// The rules have an argument that no system call has, or make more than 4096 instructions.
    pub fn build_program(self, role: ThreadRole) -> Result<BpfProgram, BackendError> {
        let mut calls = BTreeMap::new();
        for rule in rules::syscall_rules(role).filter(|rule| self.is_in_scope(rule.scope)) {
            let alternatives: &mut Vec<_> = calls.entry(rule.number).or_default();
            alternatives.extend(compile_check(rule.check)?);
        }
        let requests = rules::ioctl_rules(role)
            .iter()
            .filter(|rule| self.is_in_scope(rule.scope))
            .map(|rule| compile_condition(IOCTL_REQUEST, SeccompCmpOp::Eq, rule.request))
            .collect::<Result<Vec<_>, _>>()?;
        // A call without a condition is allowed with any arguments: ioctl without a request is not.
        if !requests.is_empty() {
            calls.insert(libc::SYS_ioctl, requests);
        }
        let (refuse, allow) = (SeccompAction::Trap, SeccompAction::Allow);
        SeccompFilter::new(calls, refuse, allow, TargetArch::x86_64)?.try_into()
    }

    /// Installs the filter of this role on the calling thread, permanently.
    ///
    /// # Errors
    /// The kernel was built without filters, or does not accept the program.
    pub fn install_filter(self, role: ThreadRole) -> io::Result<()> {
        refusal::set_thread_name(match role {
            ThreadRole::Vcpu => "vCPU",
            ThreadRole::Vmm => "VMM",
        });
        let program = self.build_program(role).map_err(io::Error::other)?;
        seccompiler::apply_filter(&program).map_err(|error| match error {
            seccompiler::Error::Prctl(source) | seccompiler::Error::Seccomp(source) => source,
            other => io::Error::other(other),
        })
    }
}

/// Translates a condition on the arguments into alternatives, of which one must hold; none at all
/// allows any arguments.
fn compile_check(check: ArgCheck) -> Result<Vec<SeccompRule>, BackendError> {
    match check {
        ArgCheck::Any => Ok(Vec::new()),
        ArgCheck::BitsClear(index, bits) => {
            let masked = SeccompCmpOp::MaskedEq(bits.into());
            Ok(vec![compile_condition(index, masked, 0)?])
        }
        ArgCheck::OneOf(index, values) => {
            values.iter().map(|value| compile_condition(index, SeccompCmpOp::Eq, *value)).collect()
        }
        ArgCheck::Both(first, second) => {
            let compare = |(index, value)| compare_argument(index, SeccompCmpOp::Eq, value);
            Ok(vec![SeccompRule::new(vec![compare(first)?, compare(second)?])?])
        }
    }
}

/// Translates one comparison of an argument into a rule.
fn compile_condition(
    index: u8,
    operation: SeccompCmpOp,
    value: u32,
) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(vec![compare_argument(index, operation, value)?])
}

/// Translates one comparison of the lower half of an argument.
fn compare_argument(
    index: u8,
    operation: SeccompCmpOp,
    value: u32,
) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(index, SeccompCmpArgLen::Dword, operation, value.into())
}

/// Prepares this process, which has one thread, for filters.
///
/// Refused calls are reported to `report_fd`. Threads share one heap, because a further one would
/// call `mprotect` to grow. The process can gain no privileges from here on, which the kernel
/// requires for a filter.
///
/// # Errors
/// The kernel rejects a signal handler or `no_new_privs`, which no supported kernel does.
pub fn prepare_process(report_fd: RawFd) -> io::Result<()> {
    // SAFETY: the option takes a number, and no other thread uses the allocator meanwhile.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    refusal::install_handler(report_fd)?;
    Ok(set_no_new_privs(true)?)
}

/// Limits this process to its existing `threads`, in addition to the filters.
///
/// One more is left to KVM: when the guest is entered for the first time, KVM starts a thread in
/// this process (Linux 6.13), and refuses to enter the guest if it cannot.
///
/// # Errors
/// The kernel rejects the limit, which no supported kernel does.
pub fn limit_threads(threads: usize) -> io::Result<()> {
    let limit = Some(threads as u64 + 1);
    Ok(setrlimit(Resource::Nproc, Rlimit { current: limit, maximum: limit })?)
}

#[cfg(test)]
#[path = "seccomp_test.rs"]
mod tests;
