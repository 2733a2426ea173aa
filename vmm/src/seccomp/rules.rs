//! What each thread may still ask of the kernel once the guest runs, and why.
//!
//! Found by running every test of ours with a filter that names what it refuses, and by reading what the C library and the
//! standard library may do beside that. There is no call here that opens, creates, connects, starts or changes the rights of
//! anything.

use kvm_bindings as kvm;
use libc::c_long;

use self::Check::{Any, OneOf, Without};
use self::When::{Always, Console, Prepared, Restored, Saved};

/// One of the two kinds of threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thread {
    /// Runs the guest: the one that a hostile guest talks to directly.
    Vcpu,
    /// Serves its devices.
    Vmm,
}

/// When a rule holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// For every guest.
    Always,
    /// For one with a console.
    Console,
    /// For one that goes on from a template.
    Restored,
    /// For one that waits for its channel.
    Prepared,
    /// For one that is made into a template, or recorded.
    Saved,
}

/// What arguments must be. They are compared in their lower halves, which is all that the kernel looks at where they are
/// numbers; pointers are never checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// Anything.
    Any,
    /// The argument with this number (from 0) has none of these bits.
    Without(u8, u32),
    /// The argument with this number is one of these.
    OneOf(u8, &'static [u32]),
}

/// A system call that is allowed.
#[derive(Debug)]
pub struct Rule {
    /// Its number.
    pub call: c_long,
    /// Its name.
    pub name: &'static str,
    /// What it must look like.
    pub check: Check,
    /// For which guests.
    pub when: When,
    /// Why.
    pub why: &'static str,
}

/// A request of ioctl that is allowed; with others ioctl is not.
#[derive(Debug)]
pub struct Ioctl {
    /// Its number.
    pub number: u32,
    /// Its name.
    pub name: &'static str,
    /// For which guests.
    pub when: When,
    /// Why.
    pub why: &'static str,
}

const fn rule(
    call: c_long,
    name: &'static str,
    check: Check,
    when: When,
    why: &'static str,
) -> Rule {
    Rule { call, name, check, when, why }
}

const fn ioctl(number: u32, name: &'static str, when: When, why: &'static str) -> Ioctl {
    Ioctl { number, name, when, why }
}

/// Memory that can be executed: never. What a guest might write into this process stays data.
const NO_EXEC: Check = Without(2, PROT_EXEC);
const PROT_EXEC: u32 = 4;

/// What each thread needs to have memory: the allocator of the C library, with one arena.
const MEMORY: [Rule; 4] = [
    rule(libc::SYS_brk, "brk", Any, Always, "the allocator's heap grows and shrinks"),
    rule(libc::SYS_mmap, "mmap", NO_EXEC, Always, "large allocations, when the heap cannot grow"),
    rule(libc::SYS_munmap, "munmap", Any, Always, "the same, given back"),
    rule(
        libc::SYS_madvise,
        "madvise",
        Any,
        Always,
        "the stack of a thread that ends is given back",
    ),
];

/// What each thread needs to wait for another.
const WAITING: [Rule; 5] = [
    rule(libc::SYS_futex, "futex", Any, Always, "locks and channels between threads"),
    rule(
        libc::SYS_sched_yield,
        "sched_yield",
        Any,
        Always,
        "a channel's end that is about to be ready",
    ),
    rule(
        libc::SYS_clock_gettime,
        "clock_gettime",
        Any,
        Always,
        "time, on hosts whose clock cannot be read without the kernel",
    ),
    rule(libc::SYS_rt_sigreturn, "rt_sigreturn", Any, Always, "the end of a signal's handler"),
    rule(
        libc::SYS_rt_sigprocmask,
        "rt_sigprocmask",
        Any,
        Always,
        "a thread that ends, or sends a signal, holds others back",
    ),
];

/// The vCPU's own.
const VCPU: [Rule; 4] = [
    rule(
        libc::SYS_write,
        "write",
        Any,
        Always,
        "eventfds: interrupts, and what the VMM thread is to do; the console; last words",
    ),
    rule(
        libc::SYS_close,
        "close",
        Any,
        Always,
        "a device that the driver resets has had descriptors",
    ),
    rule(libc::SYS_exit, "exit", Any, Always, "the thread ends when the guest does"),
    rule(
        libc::SYS_poll,
        "poll",
        Any,
        Console,
        "whether standard error takes more: a guest does not wait for a terminal",
    ),
];

/// The VMM thread's own.
const VMM: [Rule; 21] = [
    rule(libc::SYS_epoll_wait, "epoll_wait", Any, Always, "the loop"),
    rule(libc::SYS_epoll_ctl, "epoll_ctl", Any, Always, "a device that is started or reset"),
    rule(libc::SYS_read, "read", Any, Always, "the channel; the key of a template"),
    rule(libc::SYS_readv, "readv", Any, Always, "the channel, into guest memory"),
    rule(
        libc::SYS_write,
        "write",
        Any,
        Always,
        "the channel, eventfds, a standalone monitor's events, last words",
    ),
    rule(libc::SYS_writev, "writev", Any, Always, "the channel, from guest memory"),
    rule(
        libc::SYS_shutdown,
        "shutdown",
        Any,
        Always,
        "a guest ends one direction of its connection",
    ),
    rule(libc::SYS_recvfrom, "recvfrom", Any, Always, "the control socket: how long a request is"),
    rule(
        libc::SYS_recvmsg,
        "recvmsg",
        Any,
        Always,
        "the control socket: a request and its descriptors",
    ),
    rule(
        libc::SYS_sendto,
        "sendto",
        Without(5, u32::MAX),
        Always,
        "the control socket: events, to nobody by name",
    ),
    rule(
        libc::SYS_getsockopt,
        "getsockopt",
        OneOf(2, &[SO_DOMAIN, SO_TYPE]),
        Prepared,
        "whether what came as the channel is one",
    ),
    rule(libc::SYS_close, "close", Any, Always, "the end of everything that is open"),
    rule(libc::SYS_getpid, "getpid", Any, Always, "to send a signal to a thread of ours"),
    rule(libc::SYS_gettid, "gettid", Any, Always, "to end by a signal, after a panic"),
    rule(
        libc::SYS_tgkill,
        "tgkill",
        OneOf(2, &[KICK, SIGABRT]),
        Always,
        "to get a vCPU out of the guest; to end after a panic",
    ),
    rule(libc::SYS_clock_nanosleep, "clock_nanosleep", Any, Always, "between two kicks of a vCPU"),
    rule(
        libc::SYS_restart_syscall,
        "restart_syscall",
        Any,
        Always,
        "a wait goes on after the process was stopped for a while",
    ),
    rule(libc::SYS_mremap, "mremap", Any, Always, "a large buffer grows: the log, a state"),
    rule(libc::SYS_exit_group, "exit_group", Any, Always, "the end"),
    rule(libc::SYS_poll, "poll", Any, Console, "the last line of the console"),
    rule(libc::SYS_pread64, "pread64", Any, Saved, "which pages a recorded guest has used"),
];

/// The VMM thread's, while it writes a template.
const SAVING: [Rule; 2] = [
    rule(libc::SYS_ftruncate, "ftruncate", Any, Saved, "the memory file gets its length"),
    rule(libc::SYS_pwrite64, "pwrite64", Any, Saved, "the memory file gets its pages"),
];

/// `SIGRTMIN` of the C library, which has kept two for itself.
const KICK: u32 = 34;
const SIGABRT: u32 = 6;

const SO_TYPE: u32 = 3;
const SO_DOMAIN: u32 = 39;

const fn io(direction: u32, number: u32, bytes: usize) -> u32 {
    // `_IOC` of Linux. No structure of KVM's has more than the 14 bits there are.
    assert!(bytes < 1 << 14);
    #[expect(clippy::cast_possible_truncation, reason = "checked above")]
    let bytes = bytes as u32;
    direction << 30 | bytes << 16 | kvm::KVMIO << 8 | number
}

const NONE: u32 = 0;
const WRITE: u32 = 1;
const READ: u32 = 2;
const BOTH: u32 = READ | WRITE;

/// The vCPU's requests.
const VCPU_IOCTLS: [Ioctl; 3] = [
    ioctl(io(NONE, 0x80, 0), "KVM_RUN", Always, "into the guest"),
    ioctl(
        SET_MSRS,
        "KVM_SET_MSRS",
        Restored,
        "the time stamp counter goes on, just before the guest does",
    ),
    ioctl(io(NONE, 0xad, 0), "KVM_KVMCLOCK_CTRL", Restored, "the guest is told that it was paused"),
];

const SET_MSRS: u32 = io(WRITE, 0x89, size_of::<kvm::kvm_msrs>());

const STATE: &str = "the state of a vCPU is read, and tried out on a spare one";
const CHIPS: &str = "the state of clock and interrupt controllers is read";
const SPARE: &str = "a spare VM, to find out which registers are worth saving";

/// The VMM thread's requests. None, unless the guest waits for its channel, or is saved.
const VMM_IOCTLS: [Ioctl; 25] = [
    ioctl(0x5421, "FIONBIO", Prepared, "the channel does not block"),
    ioctl(
        io(WRITE, 0x7b, size_of::<kvm::kvm_clock_data>()),
        "KVM_SET_CLOCK",
        Prepared,
        "the guest's clock goes on when the guest does",
    ),
    ioctl(io(NONE, 0x01, 0), "KVM_CREATE_VM", Saved, SPARE),
    ioctl(io(BOTH, 0x02, size_of::<kvm::kvm_msr_list>()), "KVM_GET_MSR_INDEX_LIST", Saved, SPARE),
    ioctl(io(NONE, 0x03, 0), "KVM_CHECK_EXTENSION", Saved, SPARE),
    ioctl(io(NONE, 0x04, 0), "KVM_GET_VCPU_MMAP_SIZE", Saved, SPARE),
    ioctl(io(BOTH, 0x05, size_of::<kvm::kvm_cpuid2>()), "KVM_GET_SUPPORTED_CPUID", Saved, SPARE),
    ioctl(io(NONE, 0x41, 0), "KVM_CREATE_VCPU", Saved, SPARE),
    ioctl(io(NONE, 0x47, 0), "KVM_SET_TSS_ADDR", Saved, SPARE),
    ioctl(io(NONE, 0x60, 0), "KVM_CREATE_IRQCHIP", Saved, SPARE),
    ioctl(io(WRITE, 0x90, size_of::<kvm::kvm_cpuid2>()), "KVM_SET_CPUID2", Saved, SPARE),
    ioctl(SET_MSRS, "KVM_SET_MSRS", Saved, STATE),
    ioctl(io(BOTH, 0x88, size_of::<kvm::kvm_msrs>()), "KVM_GET_MSRS", Saved, STATE),
    ioctl(io(READ, 0x98, size_of::<kvm::kvm_mp_state>()), "KVM_GET_MP_STATE", Saved, STATE),
    ioctl(io(READ, 0x81, size_of::<kvm::kvm_regs>()), "KVM_GET_REGS", Saved, STATE),
    ioctl(io(READ, 0x83, size_of::<kvm::kvm_sregs>()), "KVM_GET_SREGS", Saved, STATE),
    ioctl(io(READ, 0xa4, size_of::<kvm::kvm_xsave>()), "KVM_GET_XSAVE", Saved, STATE),
    ioctl(io(READ, 0xa6, size_of::<kvm::kvm_xcrs>()), "KVM_GET_XCRS", Saved, STATE),
    ioctl(io(READ, 0x8c, size_of::<kvm::kvm_fpu>()), "KVM_GET_FPU", Saved, STATE),
    ioctl(io(READ, 0xa1, size_of::<kvm::kvm_debugregs>()), "KVM_GET_DEBUGREGS", Saved, STATE),
    ioctl(io(READ, 0x8e, size_of::<kvm::kvm_lapic_state>()), "KVM_GET_LAPIC", Saved, STATE),
    ioctl(io(NONE, 0xa3, 0), "KVM_GET_TSC_KHZ", Saved, STATE),
    ioctl(io(READ, 0x9f, size_of::<kvm::kvm_vcpu_events>()), "KVM_GET_VCPU_EVENTS", Saved, STATE),
    ioctl(io(READ, 0x7c, size_of::<kvm::kvm_clock_data>()), "KVM_GET_CLOCK", Saved, CHIPS),
    ioctl(io(BOTH, 0x62, size_of::<kvm::kvm_irqchip>()), "KVM_GET_IRQCHIP", Saved, CHIPS),
];

/// What only builds for debugging ask: whether a descriptor is open, before it is closed.
const DEBUG: &[Rule] = if cfg!(debug_assertions) {
    &[rule(
        libc::SYS_fcntl,
        "fcntl",
        OneOf(1, &[1]),
        Always,
        "F_GETFD: builds for debugging check what they close",
    )]
} else {
    &[]
};

/// The system calls of a thread, but for ioctl.
pub fn calls(thread: Thread) -> impl Iterator<Item = &'static Rule> {
    let (own, saving): (&[Rule], &[Rule]) = match thread {
        Thread::Vcpu => (&VCPU, &[]),
        Thread::Vmm => (&VMM, &SAVING),
    };
    own.iter().chain(saving).chain(&WAITING).chain(&MEMORY).chain(DEBUG)
}

/// The requests of a thread, the most frequent first.
pub fn ioctls(thread: Thread) -> &'static [Ioctl] {
    match thread {
        Thread::Vcpu => &VCPU_IOCTLS,
        Thread::Vmm => &VMM_IOCTLS,
    }
}
