//! Reaps children that have ended.

use chitin_protocol::{Exit, ReachedLimits, Usage};

/// A child that has ended and has been reaped.
pub struct ReapedChild {
    pub pid: i32,
    pub exit: Exit,
    pub usage: Usage,
}

/// Reaps one child that has ended, if there is one. rustix has no call that returns resource usage.
pub fn reap_child() -> Option<ReapedChild> {
    let mut status = 0;
    // SAFETY: all-zero is a valid `rusage`.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes one `int` and one `rusage`, which both outlive the call.
    let pid = unsafe { libc::wait4(-1, &raw mut status, libc::WNOHANG, &raw mut usage) };
    if pid <= 0 {
        return None;
    }
    let exit = if libc::WIFSIGNALED(status) {
        Exit::Signal(low_byte(libc::WTERMSIG(status)))
    } else {
        Exit::Code(low_byte(libc::WEXITSTATUS(status)))
    };
    Some(ReapedChild { pid, exit, usage: convert_usage(&usage) })
}

fn low_byte(value: i32) -> u8 {
    value.to_le_bytes()[0]
}

fn convert_usage(usage: &libc::rusage) -> Usage {
    let micros = |time: libc::timeval| {
        u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000
            + u64::try_from(time.tv_usec).unwrap_or(0)
    };
    Usage {
        user_us: micros(usage.ru_utime),
        system_us: micros(usage.ru_stime),
        max_rss_kib: u64::try_from(usage.ru_maxrss).unwrap_or(0),
        reached: ReachedLimits::default(),
    }
}
