//! The system calls that each thread may make once the guest runs, each with its reason.
//!
//! The list was found by running every test with a filter that names the call it refuses, and by
//! reading what the C library and the standard library may call in addition. No listed call opens,
//! creates, connects, starts or executes anything, or changes the rights of anything.

use kvm_bindings as kvm;
use libc::c_long;

use self::ArgCheck::{Any, BitsClear, Both, OneOf};
use self::Scope::{All, Console, Prepared, Recorded, Restored, Snapshotted};

/// The role of a thread in a monitor, which decides what it may call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadRole {
    /// Runs the guest; a hostile guest talks to this thread directly.
    Vcpu,
    /// Runs the event loop that serves the guest's devices.
    Vmm,
}

/// The guests that a rule applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Every guest.
    All,
    /// A guest with a console.
    Console,
    /// A guest that is restored from a template.
    Restored,
    /// A guest that is prepared before its channel is known.
    Prepared,
    /// A guest that is saved as a template, or recorded.
    Snapshotted,
    /// A copy of a new template, whose pages are recorded.
    Recorded,
}

/// A condition on one argument of a call.
///
/// Only the lower half of the argument is compared, which is all that the kernel reads where the
/// argument is a 32-bit number. Pointers are never checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ArgCheck {
    /// Allows any arguments.
    Any,
    /// Requires that the argument at this index (from 0) has none of these bits.
    BitsClear(u8, u32),
    /// Requires that the argument at this index (from 0) is one of these values.
    OneOf(u8, &'static [u32]),
    /// Requires these values of two arguments, each with its index (from 0).
    Both((u8, u32), (u8, u32)),
}

/// An allowed system call.
#[derive(Debug)]
pub struct SyscallRule {
    /// The number of the system call.
    pub number: c_long,
    /// The name of the system call.
    pub name: &'static str,
    /// The condition on its arguments.
    pub check: ArgCheck,
    /// The guests that the rule applies to.
    pub scope: Scope,
    /// The reason for the rule.
    pub reason: &'static str,
}

/// An allowed ioctl request; ioctl with any other request is refused.
#[derive(Debug)]
pub struct IoctlRule {
    /// The number of the request.
    pub request: u32,
    /// The name of the request.
    pub name: &'static str,
    /// The guests that the rule applies to.
    pub scope: Scope,
    /// The reason for the rule.
    pub reason: &'static str,
}

const fn syscall(
    number: c_long,
    name: &'static str,
    check: ArgCheck,
    scope: Scope,
    reason: &'static str,
) -> SyscallRule {
    SyscallRule { number, name, check, scope, reason }
}

const fn ioctl(request: u32, name: &'static str, scope: Scope, reason: &'static str) -> IoctlRule {
    IoctlRule { request, name, scope, reason }
}

/// Memory of this process alone, at an address that the kernel chooses. It is never executable:
/// what a guest may write into this process stays data.
const PRIVATE_MEMORY: ArgCheck =
    Both((2, READ_WRITE), (3, (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS).cast_unsigned()));

/// Addresses without memory, and pages of the memory file in their place, read-only.
const RESERVED_ADDRESSES: ArgCheck = Both(
    (2, libc::PROT_NONE.cast_unsigned()),
    (3, (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE).cast_unsigned()),
);
const FILE_PAGES: ArgCheck = Both(
    (2, libc::PROT_READ.cast_unsigned()),
    (3, (libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE).cast_unsigned()),
);

const HUGE_PAGES: &str = "joins pages of the memory file into huge pages";

/// `MADV_COLLAPSE` of Linux 6.1; the headers of the C library are older.
const MADV_COLLAPSE: u32 = 25;

/// Shared pages of a descriptor, at an address that the kernel chooses.
const SHARED_PAGES: ArgCheck = Both((2, READ_WRITE), (3, libc::MAP_SHARED.cast_unsigned()));

const READ_WRITE: u32 = (libc::PROT_READ | libc::PROT_WRITE).cast_unsigned();

/// Waits and wake-ups between the threads of this process, by value or by bit set. The C library
/// joins a thread with a wait that is not private, because the kernel wakes it.
const FUTEX_WAITS: ArgCheck = OneOf(1, &[0, 128, 129, 137, 265]);

/// Calls of the C library's allocator, which every thread uses with one shared arena.
///
/// Only further arenas call `mprotect`, to grow; `M_ARENA_MAX` forbids those.
const MEMORY: [SyscallRule; 3] = [
    syscall(libc::SYS_brk, "brk", Any, All, "the allocator's heap grows and shrinks"),
    syscall(
        libc::SYS_mmap,
        "mmap",
        PRIVATE_MEMORY,
        All,
        "allocations of 128 KiB and more, or of any size if the heap cannot grow",
    ),
    syscall(
        libc::SYS_munmap,
        "munmap",
        Any,
        All,
        "frees such allocations, and the signal stack of a thread that ends",
    ),
];

/// Calls that any thread makes to synchronize with others, and when it ends.
const THREADS: [SyscallRule; 7] = [
    syscall(libc::SYS_futex, "futex", FUTEX_WAITS, All, "locks and channels between threads"),
    syscall(
        libc::SYS_sched_yield,
        "sched_yield",
        Any,
        All,
        "a channel whose other thread is about to finish its operation",
    ),
    syscall(
        libc::SYS_clock_gettime,
        "clock_gettime",
        Any,
        All,
        "time, on hosts whose clock cannot be read without the kernel",
    ),
    syscall(libc::SYS_rt_sigreturn, "rt_sigreturn", Any, All, "return from a signal handler"),
    syscall(
        libc::SYS_rt_sigprocmask,
        "rt_sigprocmask",
        Any,
        All,
        "a thread that ends or sends a signal blocks other signals meanwhile",
    ),
    syscall(
        libc::SYS_sigaltstack,
        "sigaltstack",
        Any,
        All,
        "the standard library disables the signal stack of a thread that ends",
    ),
    syscall(
        libc::SYS_madvise,
        "madvise",
        OneOf(2, &[libc::MADV_DONTNEED.cast_unsigned()]),
        All,
        "the C library returns the stack of a thread that ends to the kernel",
    ),
];

/// Calls of a vCPU's thread only.
const VCPU: [SyscallRule; 4] = [
    syscall(
        libc::SYS_write,
        "write",
        Any,
        All,
        "eventfds: interrupts and requests to the VMM thread; the console; the report of a refusal",
    ),
    syscall(
        libc::SYS_close,
        "close",
        Any,
        All,
        "a reset of a device by its driver closes the device's descriptors",
    ),
    syscall(libc::SYS_exit, "exit", Any, All, "the thread ends when the guest does"),
    syscall(
        libc::SYS_ppoll,
        "ppoll",
        Any,
        Console,
        "asks whether standard error accepts output: a guest does not wait for a terminal",
    ),
];

/// Calls of the VMM thread only.
const VMM: [SyscallRule; 27] = [
    syscall(libc::SYS_epoll_wait, "epoll_wait", Any, All, "the event loop"),
    syscall(libc::SYS_epoll_ctl, "epoll_ctl", Any, All, "a device is activated or reset"),
    syscall(libc::SYS_read, "read", Any, All, "the channel; the key of a template"),
    syscall(libc::SYS_readv, "readv", Any, All, "the channel, into guest memory"),
    syscall(
        libc::SYS_write,
        "write",
        Any,
        All,
        "the channel, eventfds, the events of a standalone monitor, the report of a refusal",
    ),
    syscall(libc::SYS_writev, "writev", Any, All, "the channel, from guest memory"),
    syscall(
        libc::SYS_shutdown,
        "shutdown",
        Any,
        All,
        "the guest closes one direction of its connection",
    ),
    syscall(
        libc::SYS_recvfrom,
        "recvfrom",
        Any,
        All,
        "the control socket: the length of the next request",
    ),
    syscall(
        libc::SYS_recvmsg,
        "recvmsg",
        Any,
        All,
        "the control socket: a request and its descriptors",
    ),
    syscall(
        libc::SYS_sendto,
        "sendto",
        BitsClear(5, u32::MAX),
        All,
        "the control socket: events, without a destination address",
    ),
    syscall(
        libc::SYS_getsockopt,
        "getsockopt",
        OneOf(2, &[SO_DOMAIN, SO_TYPE]),
        Prepared,
        "checks that the descriptor sent as the channel is a Unix stream socket",
    ),
    syscall(libc::SYS_close, "close", Any, All, "closes what is open when the guest has ended"),
    syscall(libc::SYS_getpid, "getpid", Any, All, "sends a signal to a thread of this process"),
    syscall(libc::SYS_gettid, "gettid", Any, All, "ends the process by a signal after a panic"),
    syscall(
        libc::SYS_tgkill,
        "tgkill",
        OneOf(2, &[KICK, SIGABRT]),
        All,
        "interrupts a vCPU that runs the guest; ends the process after a panic",
    ),
    syscall(
        libc::SYS_clock_nanosleep,
        "clock_nanosleep",
        Any,
        All,
        "waits between two signals to a vCPU",
    ),
    syscall(
        libc::SYS_restart_syscall,
        "restart_syscall",
        Any,
        All,
        "a wait continues after the process was stopped for a while",
    ),
    syscall(
        libc::SYS_mremap,
        "mremap",
        OneOf(3, &[libc::MREMAP_MAYMOVE.cast_unsigned()]),
        All,
        "a large buffer grows: the kernel log, a state",
    ),
    syscall(libc::SYS_mmap, "mmap", SHARED_PAGES, Snapshotted, "the shared page of a spare vCPU"),
    syscall(libc::SYS_mmap, "mmap", RESERVED_ADDRESSES, Recorded, HUGE_PAGES),
    syscall(libc::SYS_mmap, "mmap", FILE_PAGES, Recorded, HUGE_PAGES),
    syscall(
        libc::SYS_madvise,
        "madvise",
        OneOf(2, &[libc::MADV_DONTDUMP.cast_unsigned(), MADV_COLLAPSE]),
        Recorded,
        HUGE_PAGES,
    ),
    syscall(libc::SYS_exit_group, "exit_group", Any, All, "the process ends"),
    syscall(libc::SYS_ppoll, "ppoll", Any, Console, "the last line of the console"),
    syscall(
        libc::SYS_pread64,
        "pread64",
        Any,
        Snapshotted,
        "reads which pages a recorded guest has used",
    ),
    syscall(
        libc::SYS_ftruncate,
        "ftruncate",
        Any,
        Snapshotted,
        "sets the length of the memory file",
    ),
    syscall(libc::SYS_pwrite64, "pwrite64", Any, Snapshotted, "writes pages to the memory file"),
];

/// `SIGRTMIN` of the C library, which reserves two signals for itself.
const KICK: u32 = 34;
const SIGABRT: u32 = 6;

const SO_TYPE: u32 = 3;
const SO_DOMAIN: u32 = 39;

/// Computes the number of a request of KVM's, as `_IOC` of Linux does.
const fn kvm_request(direction: u32, number: u32, bytes: usize) -> u32 {
    // No structure of KVM's exceeds the 14 bits that a request has for the size.
    assert!(bytes < 1 << 14);
    #[expect(clippy::cast_possible_truncation, reason = "checked above")]
    let bytes = bytes as u32;
    direction << 30 | bytes << 16 | kvm::KVMIO << 8 | number
}

const NONE: u32 = 0;
const WRITE: u32 = 1;
const READ: u32 = 2;
const BOTH: u32 = READ | WRITE;

/// Requests of a vCPU's thread.
const VCPU_IOCTLS: [IoctlRule; 3] = [
    ioctl(kvm_request(NONE, 0x80, 0), "KVM_RUN", All, "enters the guest"),
    ioctl(
        SET_MSRS,
        "KVM_SET_MSRS",
        Restored,
        "sets the time stamp counter just before the guest continues",
    ),
    ioctl(
        kvm_request(NONE, 0xad, 0),
        "KVM_KVMCLOCK_CTRL",
        Restored,
        "tells the guest that it was paused",
    ),
];

const SET_MSRS: u32 = kvm_request(WRITE, 0x89, size_of::<kvm::kvm_msrs>());

const VCPU_STATE: &str = "reads the state of a vCPU and tries it on a spare one";
const CHIP_STATE: &str = "reads the state of the clock and the interrupt controllers";
const SPARE_VM: &str = "makes a spare VM, which shows which registers have to be saved";

const READ_REGS: u32 = kvm_request(READ, 0x81, size_of::<kvm::kvm_regs>());
const READ_SREGS: u32 = kvm_request(READ, 0x83, size_of::<kvm::kvm_sregs>());
const READ_MSRS: u32 = kvm_request(BOTH, 0x88, size_of::<kvm::kvm_msrs>());
const READ_FPU: u32 = kvm_request(READ, 0x8c, size_of::<kvm::kvm_fpu>());
const READ_LAPIC: u32 = kvm_request(READ, 0x8e, size_of::<kvm::kvm_lapic_state>());
const READ_MP_STATE: u32 = kvm_request(READ, 0x98, size_of::<kvm::kvm_mp_state>());
const READ_EVENTS: u32 = kvm_request(READ, 0x9f, size_of::<kvm::kvm_vcpu_events>());
const READ_DEBUGREGS: u32 = kvm_request(READ, 0xa1, size_of::<kvm::kvm_debugregs>());
const READ_XSAVE: u32 = kvm_request(READ, 0xa4, size_of::<kvm::kvm_xsave>());
const READ_XCRS: u32 = kvm_request(READ, 0xa6, size_of::<kvm::kvm_xcrs>());
const READ_CLOCK: u32 = kvm_request(READ, 0x7c, size_of::<kvm::kvm_clock_data>());
const READ_IRQCHIP: u32 = kvm_request(BOTH, 0x62, size_of::<kvm::kvm_irqchip>());
const SET_CLOCK: u32 = kvm_request(WRITE, 0x7b, size_of::<kvm::kvm_clock_data>());
const SET_CPUID: u32 = kvm_request(WRITE, 0x90, size_of::<kvm::kvm_cpuid2>());
const SUPPORTED_CPUID: u32 = kvm_request(BOTH, 0x05, size_of::<kvm::kvm_cpuid2>());
const MSR_INDEX_LIST: u32 = kvm_request(BOTH, 0x02, size_of::<kvm::kvm_msr_list>());

/// Requests of the VMM thread: none, unless the guest waits for its channel or is saved.
const VMM_IOCTLS: [IoctlRule; 25] = [
    ioctl(0x5421, "FIONBIO", Prepared, "makes the channel non-blocking"),
    ioctl(SET_CLOCK, "KVM_SET_CLOCK", Prepared, "sets the guest's clock when the guest continues"),
    ioctl(kvm_request(NONE, 0x01, 0), "KVM_CREATE_VM", Snapshotted, SPARE_VM),
    ioctl(MSR_INDEX_LIST, "KVM_GET_MSR_INDEX_LIST", Snapshotted, SPARE_VM),
    ioctl(kvm_request(NONE, 0x03, 0), "KVM_CHECK_EXTENSION", Snapshotted, SPARE_VM),
    ioctl(kvm_request(NONE, 0x04, 0), "KVM_GET_VCPU_MMAP_SIZE", Snapshotted, SPARE_VM),
    ioctl(SUPPORTED_CPUID, "KVM_GET_SUPPORTED_CPUID", Snapshotted, SPARE_VM),
    ioctl(kvm_request(NONE, 0x41, 0), "KVM_CREATE_VCPU", Snapshotted, SPARE_VM),
    ioctl(kvm_request(NONE, 0x47, 0), "KVM_SET_TSS_ADDR", Snapshotted, SPARE_VM),
    ioctl(kvm_request(NONE, 0x60, 0), "KVM_CREATE_IRQCHIP", Snapshotted, SPARE_VM),
    ioctl(SET_CPUID, "KVM_SET_CPUID2", Snapshotted, SPARE_VM),
    ioctl(SET_MSRS, "KVM_SET_MSRS", Snapshotted, VCPU_STATE),
    ioctl(READ_MSRS, "KVM_GET_MSRS", Snapshotted, VCPU_STATE),
    ioctl(READ_MP_STATE, "KVM_GET_MP_STATE", Snapshotted, VCPU_STATE),
    ioctl(READ_REGS, "KVM_GET_REGS", Snapshotted, VCPU_STATE),
    ioctl(READ_SREGS, "KVM_GET_SREGS", Snapshotted, VCPU_STATE),
    ioctl(READ_XSAVE, "KVM_GET_XSAVE", Snapshotted, VCPU_STATE),
    ioctl(READ_XCRS, "KVM_GET_XCRS", Snapshotted, VCPU_STATE),
    ioctl(READ_FPU, "KVM_GET_FPU", Snapshotted, VCPU_STATE),
    ioctl(READ_DEBUGREGS, "KVM_GET_DEBUGREGS", Snapshotted, VCPU_STATE),
    ioctl(READ_LAPIC, "KVM_GET_LAPIC", Snapshotted, VCPU_STATE),
    ioctl(kvm_request(NONE, 0xa3, 0), "KVM_GET_TSC_KHZ", Snapshotted, VCPU_STATE),
    ioctl(READ_EVENTS, "KVM_GET_VCPU_EVENTS", Snapshotted, VCPU_STATE),
    ioctl(READ_CLOCK, "KVM_GET_CLOCK", Snapshotted, CHIP_STATE),
    ioctl(READ_IRQCHIP, "KVM_GET_IRQCHIP", Snapshotted, CHIP_STATE),
];

/// Calls that only builds with debug assertions make.
const DEBUG: &[SyscallRule] = if cfg!(debug_assertions) {
    &[syscall(
        libc::SYS_fcntl,
        "fcntl",
        OneOf(1, &[1]),
        All,
        "F_GETFD: debug builds check that a descriptor is open before they close it",
    )]
} else {
    &[]
};

/// Returns the system calls of a thread except ioctl. A call with several conditions is allowed if
/// one of them holds.
pub fn syscall_rules(role: ThreadRole) -> impl Iterator<Item = &'static SyscallRule> {
    let own: &[SyscallRule] = match role {
        ThreadRole::Vcpu => &VCPU,
        ThreadRole::Vmm => &VMM,
    };
    own.iter().chain(&THREADS).chain(&MEMORY).chain(DEBUG)
}

/// Returns the ioctl requests of a thread.
pub fn ioctl_rules(role: ThreadRole) -> &'static [IoctlRule] {
    match role {
        ThreadRole::Vcpu => &VCPU_IOCTLS,
        ThreadRole::Vmm => &VMM_IOCTLS,
    }
}
