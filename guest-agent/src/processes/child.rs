//! The code of a child between fork and exec: the steps of [`ChildStep`], in order.
//!
//! The child may share the agent's memory, and other threads of the agent may hold locks of the
//! allocator and the C library. So nothing here allocates: everything that the child needs is in
//! [`ExecArgs`], and the child makes system calls only.
//!
//! A failed step is reported through a pipe, which a successful exec closes.

use std::ffi::{CStr, CString, c_char};
use std::os::fd::BorrowedFd;

use rustix::io::Errno;

use crate::cgroup::pids_v1;
use crate::descriptors::{close_on_exec, replace_standard_fd};
use crate::lockdown::{Lockdown, limits};
use crate::signals;
use crate::syscall::check_result;

/// A step of the child. Its number goes through the status pipe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ChildStep {
    Session = 1,
    Streams,
    Limits,
    User,
    Directory,
    Confinement,
    Execute,
    /// The program exists, and the interpreter that its first line or its ELF header names does
    /// not.
    Interpreter,
}

impl ChildStep {
    const ALL: [ChildStep; 8] = [
        ChildStep::Session,
        ChildStep::Streams,
        ChildStep::Limits,
        ChildStep::User,
        ChildStep::Directory,
        ChildStep::Confinement,
        ChildStep::Execute,
        ChildStep::Interpreter,
    ];

    pub fn decode(byte: u8) -> Option<ChildStep> {
        ChildStep::ALL.into_iter().find(|step| *step as u8 == byte)
    }
}

/// The arguments of a child's exec and of all that precedes it, allocated before the fork.
pub struct ExecArgs<'a> {
    /// Standard input, output and error.
    pub streams: [BorrowedFd<'a>; 3],
    /// The pipe to which a failed step is written.
    pub status: BorrowedFd<'a>,
    pub uid: u32,
    pub gid: u32,
    pub directory: CString,
    /// The paths at which the program may be, in the order in which they are tried.
    pub programs: Vec<CString>,
    /// Pointers to NUL-terminated strings, with a null pointer at the end.
    pub arguments: Vec<*const c_char>,
    /// As `arguments`.
    pub environment: Vec<*const c_char>,
    pub lockdown: &'a Lockdown,
    /// The directory of the cgroup that the child joins, where it is not born into one.
    pub pids_v1: Option<BorrowedFd<'a>>,
}

impl ExecArgs<'_> {
    /// Runs the child until it executes its program, or reports the failed step and exits.
    pub fn run(&self) -> ! {
        let (step, errno) = match self.prepare() {
            Ok(()) => self.execute(),
            Err(failed) => failed,
        };
        let [e0, e1, e2, e3] = errno.raw_os_error().to_le_bytes();
        let _ = rustix::io::write(self.status, &[step as u8, 0, 0, 0, e0, e1, e2, e3]);
        // SAFETY: `_exit` ends the child without running handlers of the agent, whose memory it may
        // share.
        unsafe { libc::_exit(127) }
    }

    fn prepare(&self) -> Result<(), (ChildStep, Errno)> {
        let failed_at = |step| move |errno| (step, errno);
        if let Some(directory) = self.pids_v1 {
            pids_v1::join_cgroup(directory).map_err(failed_at(ChildStep::Limits))?;
        }
        rustix::process::setsid().map_err(failed_at(ChildStep::Session))?;
        for (number, stream) in (0..).zip(self.streams) {
            replace_standard_fd(stream, number).map_err(failed_at(ChildStep::Streams))?;
        }
        close_on_exec(3, i32::MAX).map_err(failed_at(ChildStep::Streams))?;
        // The OOM killer prefers the workload to the agent, which no cgroup protects in some
        // containers. This is set while the process has the right to, so that the workload cannot
        // lower it again.
        let _ = limits::set_oom_score(c"1000");
        limits::limit_resources().map_err(failed_at(ChildStep::Limits))?;
        self.lockdown.switch_user(self.uid, self.gid).map_err(failed_at(ChildStep::User))?;
        // As the user, because a directory that is closed to the user is an error here.
        rustix::process::chdir(self.directory.as_c_str())
            .map_err(failed_at(ChildStep::Directory))?;
        signals::reset_for_exec();
        self.lockdown.confine_child().map_err(failed_at(ChildStep::Confinement))
    }

    /// Tries one program path after the other, as execvp(3) does. Returns only on failure.
    fn execute(&self) -> (ChildStep, Errno) {
        let mut failed = (ChildStep::Execute, Errno::NOENT);
        for program in &self.programs {
            // SAFETY: the program and all entries point to NUL-terminated strings, both arrays end
            // with a null pointer, and all of them outlive the call.
            let result = unsafe {
                libc::execve(program.as_ptr(), self.arguments.as_ptr(), self.environment.as_ptr())
            };
            match check_result(result) {
                Err(Errno::NOENT) if exists(program) => {
                    return (ChildStep::Interpreter, Errno::NOENT);
                }
                Err(Errno::NOENT | Errno::NOTDIR) | Ok(()) => {}
                // The program may be in a later directory; if not, this is the error to report.
                Err(Errno::ACCESS) => failed = (ChildStep::Execute, Errno::ACCESS),
                Err(errno) => return (ChildStep::Execute, errno),
            }
        }
        failed
    }
}

fn exists(path: &CStr) -> bool {
    rustix::fs::access(path, rustix::fs::Access::EXISTS).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn child_step_survives_encoding() {
        for step in ChildStep::ALL {
            assert_eq!(ChildStep::decode(step as u8), Some(step));
        }
        assert_eq!(ChildStep::decode(0), None);
    }
}
