//! The system calls that the filter `default_deny` allows, each group with the reason why a
//! workload needs it. Every other call fails.

/// System calls that are allowed for one reason.
pub struct Group {
    /// The reason, for the documentation, which a test keeps in step.
    #[cfg(test)]
    pub why: &'static str,
    pub calls: &'static [Call],
}

/// A system call.
pub struct Call {
    pub number: u32,
    #[cfg(test)]
    pub name: &'static str,
}

/// Groups, written as `reason: call call …`. The names are those of the kernel.
macro_rules! groups {
    ($($why:literal: $($call:ident)+;)+) => {
        &[$(Group {
            #[cfg(test)]
            why: $why,
            calls: &[$(Call {
                number: to_number(libc::$call),
                #[cfg(test)]
                name: stringify!($call),
            }),+],
        }),+]
    };
}

const fn to_number(call: libc::c_long) -> u32 {
    assert!(call >= 0 && call <= LAST as libc::c_long);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "asserted")]
    let number = call as u32;
    number
}

/// The last number that was considered when the list was made. A later one fails with ENOSYS, as on
/// an older kernel, which programs support as well.
pub const LAST: u32 = 462;

/// Calls that are allowed with any arguments.
pub const ALLOWED: &[Group] = groups! {
    "to read and write open descriptors":
        SYS_read SYS_write SYS_readv SYS_writev SYS_pread64 SYS_pwrite64 SYS_preadv SYS_pwritev
        SYS_preadv2 SYS_pwritev2 SYS_lseek SYS_close SYS_close_range SYS_dup SYS_dup2 SYS_dup3
        SYS_fcntl SYS_flock SYS_sendfile SYS_copy_file_range SYS_splice SYS_tee SYS_vmsplice
        SYS_pipe SYS_pipe2 SYS_fadvise64 SYS_readahead;
    "to wait for events on them":
        SYS_poll SYS_ppoll SYS_select SYS_pselect6 SYS_epoll_create SYS_epoll_create1 SYS_epoll_ctl
        SYS_epoll_wait SYS_epoll_pwait SYS_epoll_pwait2 SYS_eventfd SYS_eventfd2 SYS_signalfd
        SYS_signalfd4 SYS_timerfd_create SYS_timerfd_settime SYS_timerfd_gettime SYS_inotify_init
        SYS_inotify_init1 SYS_inotify_add_watch SYS_inotify_rm_watch;
    "to use files: file system rights and Landlock decide which ones":
        SYS_open SYS_openat SYS_openat2 SYS_creat SYS_stat SYS_lstat SYS_fstat SYS_newfstatat
        SYS_statx SYS_access SYS_faccessat SYS_faccessat2 SYS_readlink SYS_readlinkat SYS_getdents
        SYS_getdents64 SYS_getcwd SYS_chdir SYS_fchdir SYS_rename SYS_renameat SYS_renameat2
        SYS_mkdir SYS_mkdirat SYS_rmdir SYS_link SYS_linkat SYS_unlink SYS_unlinkat SYS_symlink
        SYS_symlinkat SYS_truncate SYS_ftruncate SYS_fallocate SYS_statfs SYS_fstatfs SYS_umask
        SYS_cachestat;
    "to set attributes of files, which only a file's owner may":
        SYS_chmod SYS_fchmod SYS_fchmodat SYS_fchmodat2 SYS_chown SYS_fchown SYS_lchown
        SYS_fchownat SYS_utime SYS_utimes SYS_futimesat SYS_utimensat SYS_getxattr SYS_lgetxattr
        SYS_fgetxattr SYS_listxattr SYS_llistxattr SYS_flistxattr SYS_setxattr SYS_lsetxattr
        SYS_fsetxattr SYS_removexattr SYS_lremovexattr SYS_fremovexattr;
    "to make a FIFO: a device would need a capability that is dropped":
        SYS_mknod SYS_mknodat;
    "to flush files: nothing outside the sandbox waits for its disk":
        SYS_sync SYS_syncfs SYS_fsync SYS_fdatasync SYS_sync_file_range SYS_msync;
    "to map memory, including executable memory, which run-time compilers such as Node's need":
        SYS_brk SYS_mmap SYS_munmap SYS_mremap SYS_mprotect SYS_madvise SYS_mincore SYS_mlock
        SYS_mlock2 SYS_munlock SYS_mlockall SYS_munlockall SYS_memfd_create SYS_pkey_alloc
        SYS_pkey_free SYS_pkey_mprotect SYS_membarrier SYS_mseal SYS_map_shadow_stack;
    "to start programs and threads; `clone` is below":
        SYS_execve SYS_execveat SYS_fork SYS_vfork SYS_exit SYS_exit_group SYS_wait4 SYS_waitid
        SYS_set_tid_address SYS_arch_prctl SYS_rseq SYS_set_robust_list SYS_get_robust_list
        SYS_futex SYS_futex_waitv SYS_futex_wake SYS_futex_wait SYS_futex_requeue SYS_prctl;
    "to identify and signal processes of the same user":
        SYS_getpid SYS_getppid SYS_gettid SYS_getpgid SYS_getpgrp SYS_setpgid SYS_getsid SYS_setsid
        SYS_kill SYS_tkill SYS_tgkill SYS_rt_sigqueueinfo SYS_rt_tgsigqueueinfo SYS_pidfd_open
        SYS_pidfd_send_signal;
    "to handle signals":
        SYS_rt_sigaction SYS_rt_sigprocmask SYS_rt_sigreturn SYS_rt_sigpending SYS_rt_sigsuspend
        SYS_rt_sigtimedwait SYS_sigaltstack SYS_pause SYS_restart_syscall;
    "to read clocks and use timers":
        SYS_clock_gettime SYS_clock_getres SYS_clock_nanosleep SYS_nanosleep SYS_gettimeofday
        SYS_time SYS_times SYS_alarm SYS_getitimer SYS_setitimer SYS_timer_create SYS_timer_settime
        SYS_timer_gettime SYS_timer_getoverrun SYS_timer_delete;
    "to read user and group ids; setting them changes nothing without privileges":
        SYS_getuid SYS_geteuid SYS_getgid SYS_getegid SYS_getresuid SYS_getresgid SYS_getgroups
        SYS_setuid SYS_setgid SYS_setreuid SYS_setregid SYS_setresuid SYS_setresgid SYS_setfsuid
        SYS_setfsgid SYS_capget SYS_capset;
    "to read and lower limits and priorities":
        SYS_getrlimit SYS_setrlimit SYS_prlimit64 SYS_getrusage SYS_getpriority SYS_setpriority
        SYS_ioprio_get SYS_ioprio_set SYS_sched_yield SYS_sched_getaffinity SYS_sched_setaffinity
        SYS_sched_getparam SYS_sched_setparam SYS_sched_getscheduler SYS_sched_setscheduler
        SYS_sched_getattr SYS_sched_setattr SYS_sched_get_priority_max SYS_sched_get_priority_min
        SYS_sched_rr_get_interval SYS_getcpu;
    "to identify the machine and read random bytes":
        SYS_uname SYS_sysinfo SYS_getrandom;
    "to use a socket that the rule for `socket` has allowed":
        SYS_socketpair SYS_bind SYS_connect SYS_listen SYS_accept SYS_accept4 SYS_getsockname
        SYS_getpeername SYS_getsockopt SYS_setsockopt SYS_sendto SYS_recvfrom SYS_sendmsg
        SYS_recvmsg SYS_sendmmsg SYS_recvmmsg SYS_shutdown;
    "to confine itself further, as browsers and package managers do":
        SYS_seccomp SYS_landlock_create_ruleset SYS_landlock_add_rule SYS_landlock_restrict_self;
};

#[expect(non_upper_case_globals, reason = "named as the libc crate names others")]
mod missing {
    //! Calls that the libc crate does not name for musl, with their numbers in the kernel's
    //! `syscall_64.tbl`.
    pub const SYS_cachestat: libc::c_long = 451;
    pub const SYS_map_shadow_stack: libc::c_long = 453;
    pub const SYS_futex_wake: libc::c_long = 454;
    pub const SYS_futex_wait: libc::c_long = 455;
    pub const SYS_futex_requeue: libc::c_long = 456;
}

mod libc {
    pub use super::missing::*;
    pub use ::libc::*;
}

/// Calls that are allowed with some arguments, which `default_deny.rs` checks, and the reasons.
#[cfg(test)]
pub const CHECKED: &[(&str, &str)] = &[
    (
        "socket",
        "for Unix, IPv4 and IPv6, and for netlink routes, with which programs list interfaces; \
         otherwise EAFNOSUPPORT",
    ),
    (
        "clone",
        "for processes and threads; EPERM with a new namespace, the usual way into rarely used \
         parts of a kernel",
    ),
    ("clone3", "ENOSYS: a filter cannot read its flags, and every C library falls back to clone"),
    (
        "ioctl",
        "for all requests but TIOCSTI and TIOCLINUX, which inject input into a terminal; those \
         fail with EPERM",
    ),
    (
        "personality",
        "to read it and to set the default one; otherwise EPERM, because others disable \
         protections",
    ),
];
