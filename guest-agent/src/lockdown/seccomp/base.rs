//! The filters of every sandbox. The agent installs them for itself, and its children inherit them;
//! one more is for its children only.

use std::collections::BTreeMap;

use rustix::io::Errno;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

use super::NAMESPACES;
use super::default_deny::Filter;

/// Marks system calls of the x32 ABI (`__X32_SYSCALL_BIT` of the kernel's uapi).
const X32: i64 = 0x4000_0000;

/// A flag of unshare(2) and clone3(2) only: in clone(2), its bit belongs to the signal.
const CLONE_NEWTIME: u32 = 0x80;

/// System calls that fail with ENOSYS, as on a kernel built without them. The microVM's kernel is;
/// those of other tiers are not, and the workload should see no difference. Calls that need
/// capabilities are not repeated here.
const ABSENT: [i64; 9] = [
    // Opens sockets and files without passing this filter.
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    // The most frequent ways for an unprivileged user to attack a kernel. Programs work without
    // them.
    libc::SYS_bpf,
    libc::SYS_userfaultfd,
    libc::SYS_perf_event_open,
    // Namespaces do not separate key rings.
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
];

/// Installs the filters for this thread and its descendants. Needs `no_new_privs`.
pub fn install_filters() -> Result<(), Errno> {
    for filter in build_filters().map_err(|_| Errno::INVAL)? {
        seccompiler::apply_filter(&filter).map_err(|error| match error {
            seccompiler::Error::Prctl(error) | seccompiler::Error::Seccomp(error) => {
                Errno::from_io_error(&error).unwrap_or(Errno::IO)
            }
            _ => Errno::INVAL,
        })?;
    }
    Ok(())
}

fn build_filters() -> Result<[BpfProgram; 3], BackendError> {
    // The host identifies the channel by its socket, and any process may open vsock sockets: this
    // filter alone keeps the workload off it. A kernel without vsock fails with EAFNOSUPPORT, which
    // programs expect.
    let is_vsock = SeccompCondition::new(
        0,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::Eq,
        libc::AF_VSOCK.cast_unsigned().into(),
    )?;
    let vsock = SeccompRule::new(vec![is_vsock])?;
    // seccompiler ends a process that makes calls of another architecture (int 0x80). x32 has the
    // architecture of x86_64, so each rule is added for its numbers as well.
    let sockets =
        [libc::SYS_socket, libc::SYS_socket | X32].map(|call| (call, vec![vsock.clone()]));
    let absent = ABSENT.iter().flat_map(|&call| [(call, vec![]), (call | X32, vec![])]);
    // A process that creates a user namespace has all capabilities in it, on the kernel of a microVM
    // as well as on that of gVisor, and with them it reaches the parts of a kernel that are attacked
    // most. With any namespace it could mount, change its root, or open raw sockets.
    let clone: Vec<SeccompRule> =
        NAMESPACES.into_iter().map(require_flag).collect::<Result<_, _>>()?;
    let mut unshare = clone.clone();
    unshare.push(require_flag(CLONE_NEWTIME)?);
    let namespaces = [
        (libc::SYS_unshare, unshare),
        (libc::SYS_clone, clone),
        // Without a rule of its own, each call matches.
        (libc::SYS_setns, vec![]),
    ];
    let namespaces = namespaces
        .into_iter()
        .flat_map(|(call, rules)| [(call, rules.clone()), (call | X32, rules)]);
    Ok([
        compile_denials(namespaces.collect(), libc::EPERM)?,
        compile_denials(sockets.into_iter().collect(), libc::EAFNOSUPPORT)?,
        compile_denials(absent.collect(), libc::ENOSYS)?,
    ])
}

/// Assembles the filter that only children get: clone3 fails with ENOSYS. Its flags are in memory,
/// where a filter cannot read them, and every C library falls back to clone. The agent itself starts
/// processes with it, in a cgroup.
pub fn assemble_child_filter() -> Result<Filter, Errno> {
    let calls = [libc::SYS_clone3, libc::SYS_clone3 | X32].map(|call| (call, vec![]));
    let program = compile_denials(calls.into_iter().collect(), libc::ENOSYS);
    Ok(Filter::from_program(&program.map_err(|_| Errno::INVAL)?))
}

/// Makes a rule for calls whose first argument has this flag.
fn require_flag(flag: u32) -> Result<SeccompRule, BackendError> {
    let flag = u64::from(flag);
    let is_set =
        SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(flag), flag)?;
    SeccompRule::new(vec![is_set])
}

/// Compiles a filter in which calls that match a rule fail with `errno`.
fn compile_denials(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    errno: i32,
) -> Result<BpfProgram, BackendError> {
    let deny = SeccompAction::Errno(errno.cast_unsigned());
    SeccompFilter::new(rules, SeccompAction::Allow, deny, TargetArch::x86_64)?.try_into()
}
