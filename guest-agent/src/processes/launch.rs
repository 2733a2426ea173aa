//! Starts a process: everything that allocates or may fail for the host's fault before the fork, system calls only
//! after it, in the order of [`Step`].
//!
//! The first process shares the agent's memory until its exec, as vfork(2) has it, and the agent waits for that: to copy its memory
//! would take longer than all else between here and there. Where the workload has a process already, that one could stop
//! the child before its exec, and the agent with it, so there the child gets a copy, and the agent does not wait.
//!
//! The child reports a failed step through a pipe that a successful exec closes, and which the agent reads when the child
//! has ended.

use std::arch::asm;
use std::ffi::{CStr, CString, c_char};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;

use chitin_protocol::{Failure, Start, StartError};
use rustix::fs::{Mode, OFlags};
use rustix::io::{Errno, FdFlags};
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, WaitId, WaitIdOptions};
use zeroize::Zeroizing;

use crate::cgroup::pids_v1;
use crate::failure;
use crate::io::channel;
use crate::lockdown::{self, Lockdown};
use crate::secrets::Secrets;
use crate::syscall::check_result;

/// What the child does, in this order. The number goes through the status pipe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Step {
    Session = 1,
    Streams,
    Credentials,
    Limits,
    User,
    Directory,
    Confinement,
    Execute,
    /// The program is there, and what its first line or its ELF header names is not.
    Interpreter,
}

impl Step {
    const ALL: [Step; 9] = [
        Step::Session,
        Step::Streams,
        Step::Credentials,
        Step::Limits,
        Step::User,
        Step::Directory,
        Step::Confinement,
        Step::Execute,
        Step::Interpreter,
    ];

    fn decode(byte: u8) -> Option<Step> {
        Step::ALL.into_iter().find(|step| *step as u8 == byte)
    }
}

/// A started child, or at least a forked one.
pub struct Child {
    pub pid: Pid,
    status: OwnedFd,
    program: Vec<u8>,
    user: u32,
    directory: Vec<u8>,
}

impl Child {
    /// Whether the child, which has ended, never became what was asked for.
    pub fn failed_to_start(&self) -> Option<(StartError, Failure)> {
        let mut record = [0; 8];
        match rustix::io::read(&self.status, &mut record) {
            Ok(8) => {}
            _ => return None,
        }
        let errno = Errno::from_raw_os_error(i32::from_le_bytes([
            record[4], record[5], record[6], record[7],
        ]));
        let (error, failure) = match Step::decode(record[0])? {
            Step::Session => (StartError::Other, failure("open a session", b"", errno)),
            Step::Streams => (StartError::Other, failure("connect standard streams", b"", errno)),
            Step::Credentials => (StartError::Other, failure("hand over credentials", b"", errno)),
            Step::Limits => (StartError::Other, failure("set resource limits", b"", errno)),
            Step::User => {
                (StartError::Other, failure("become user", self.user.to_string().as_bytes(), errno))
            }
            Step::Directory => (StartError::Other, failure("enter", &self.directory, errno)),
            Step::Confinement => (StartError::Other, failure("confine the process", b"", errno)),
            Step::Execute => (class_of(errno), failure("execute", &self.program, errno)),
            Step::Interpreter => (
                StartError::NotExecutable,
                failure("find the interpreter of", &self.program, errno),
            ),
        };
        Some((error, failure))
    }
}

/// What `execve(2)` says, as shells understand it.
fn class_of(errno: Errno) -> StartError {
    match errno {
        Errno::NOENT | Errno::NOTDIR => StartError::NotFound,
        Errno::ACCESS
        | Errno::NOEXEC
        | Errno::PERM
        | Errno::ISDIR
        | Errno::LOOP
        | Errno::INVAL
        | Errno::LIBBAD
        | Errno::TXTBSY => StartError::NotExecutable,
        _ => StartError::Other,
    }
}

/// The child's ends of its standard streams.
pub struct Streams {
    pub stdin: OwnedFd,
    pub stdout: OwnedFd,
    pub stderr: OwnedFd,
}

/// Everything the child needs, allocated.
struct Plan<'a> {
    streams: [BorrowedFd<'a>; 3],
    status: BorrowedFd<'a>,
    /// Pairs of a path that opens a memfd anew and the memfd's number, ascending.
    memfds: Vec<(CString, i32)>,
    uid: u32,
    gid: u32,
    directory: CString,
    programs: Vec<CString>,
    arguments: Vec<*const c_char>,
    environment: Vec<*const c_char>,
    lockdown: &'a Lockdown,
    /// As [`Groups::joined`].
    joined: Option<BorrowedFd<'a>>,
}

/// Where a child is counted.
#[derive(Clone, Copy)]
pub struct Groups<'a> {
    /// The directory of the cgroup it is born into.
    pub born_into: Option<BorrowedFd<'a>>,
    /// The directory of the cgroup that it joins.
    pub joined: Option<BorrowedFd<'a>>,
}

/// Starts what `start` describes.
pub fn launch(
    start: &Start,
    secrets: &Secrets,
    streams: &Streams,
    lockdown: &Lockdown,
    groups: Groups<'_>,
) -> Result<Child, (StartError, Failure)> {
    let other =
        |operation, object: &[u8], errno| (StartError::Other, failure(operation, object, errno));
    let c_string = |operation: &'static str, bytes: &[u8]| {
        CString::new(bytes).map_err(|_| other(operation, bytes, Errno::INVAL))
    };

    let Some(program) = start.argv.first() else {
        return Err(other("start a process without a name", b"", Errno::INVAL));
    };
    let argv = start
        .argv
        .iter()
        .map(|argument| c_string("pass an argument with a NUL:", argument))
        .collect::<Result<Vec<_>, _>>()?;
    // Wiped: there may be a credential in it.
    let mut environment = Vec::with_capacity(start.env.len());
    for (name, value) in &start.env {
        if name.is_empty() || name.contains(&b'=') || name.contains(&0) || value.contains(&0) {
            return Err(other("set environment variable", name, Errno::INVAL));
        }
        if !secrets.sets(name) {
            let mut entry = Zeroizing::new(Vec::with_capacity(name.len() + value.len() + 2));
            entry.extend_from_slice(name);
            entry.push(b'=');
            entry.extend_from_slice(value);
            environment.push(entry);
        }
    }
    environment.extend(secrets.environment());
    for entry in &mut environment {
        entry.push(0);
    }

    let programs = candidates(program, &start.env)?;
    let mut memfds: Vec<(CString, i32)> = Vec::new();
    for memfd in secrets.memfds() {
        let number = memfd.as_raw_fd();
        memfds.push((c_string("name", format!("/proc/self/fd/{number}").as_bytes())?, number));
    }
    memfds.sort_by_key(|(_, number)| *number);

    let (status, status_child) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)
        .map_err(|errno| other("create a pipe", b"", errno))?;
    let plan = Plan {
        streams: [streams.stdin.as_fd(), streams.stdout.as_fd(), streams.stderr.as_fd()],
        status: status_child.as_fd(),
        memfds,
        uid: start.uid,
        gid: start.gid,
        directory: c_string("enter", &start.cwd)?,
        programs,
        arguments: argv.iter().map(|argument| argument.as_ptr()).chain([ptr::null()]).collect(),
        environment: environment
            .iter()
            .map(|entry| entry.as_ptr().cast())
            .chain([ptr::null()])
            .collect(),
        lockdown,
        joined: groups.joined,
    };
    // SAFETY: the child calls nothing but `Plan::run`, which keeps to system calls.
    let pid =
        unsafe { spawn(&plan, groups.born_into) }.map_err(|errno| other("fork", b"", errno))?;
    Ok(Child {
        pid,
        status,
        program: program.clone(),
        user: start.uid,
        directory: start.cwd.clone(),
    })
}

/// Where to look for the program: as it is, if it has a slash, else in `PATH`.
fn candidates(
    program: &[u8],
    env: &[(Vec<u8>, Vec<u8>)],
) -> Result<Vec<CString>, (StartError, Failure)> {
    let missing = |operation| (StartError::NotFound, failure(operation, program, Errno::NOENT));
    if program.is_empty() {
        return Err(missing("execute a program without a name"));
    }
    let c_string = |path: Vec<u8>| CString::new(path).map_err(|_| missing("execute"));
    if program.contains(&b'/') {
        return Ok(vec![c_string(program.to_vec())?]);
    }
    let Some((_, path)) = env.iter().find(|(name, _)| name == b"PATH") else {
        return Err(missing("look up without a PATH in the environment:"));
    };
    path.split(|&byte| byte == b':')
        .map(|directory| match directory {
            // POSIX: an empty entry is the working directory.
            [] => c_string([b"./", program].concat()),
            _ => c_string([directory, b"/", program].concat()),
        })
        .collect()
}

/// From the kernel's `linux/sched.h`; the libc crate has it in a type that is too narrow.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Starts a process that runs the plan, and gives its pid.
///
/// # Safety
/// Other threads may hold locks of the allocator and the C library. Until it execs, the child may make system calls
/// only.
unsafe fn spawn(plan: &Plan<'_>, cgroup: Option<BorrowedFd<'_>>) -> Result<Pid, Errno> {
    // SAFETY: all-zero is a valid `clone_args`.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    let shared = if is_alone() { libc::CLONE_VM | libc::CLONE_VFORK } else { 0 };
    let [shared, signal] = [shared, libc::SIGCHLD].map(|flags| u64::from(flags.cast_unsigned()));
    let (call, first, second) = match cgroup {
        Some(cgroup) => {
            // Born into its cgroup: moving it there would wait for an RCU grace period, milliseconds.
            arguments.flags = CLONE_INTO_CGROUP | shared;
            arguments.exit_signal = signal;
            arguments.cgroup = cgroup.as_raw_fd().cast_unsigned().into();
            (libc::SYS_clone3, &raw const arguments as u64, size_of::<libc::clone_args>() as u64)
        }
        None => (libc::SYS_clone, shared | signal, 0),
    };
    let result: i64;
    // SAFETY: without a stack of its own the child goes on below this one's, which nobody else does before it has execed: it has a
    // copy, or this thread waits. It never comes back from `run`. Not the C library's fork(), which runs handlers and takes locks.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "mov rdi, r12",
            "call {run}",
            "ud2",
            "2:",
            run = sym run,
            inlateout("rax") call => result,
            in("rdi") first,
            in("rsi") second,
            in("rdx") 0,
            in("r10") 0,
            in("r8") 0,
            in("r12") ptr::from_ref(plan),
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    match i32::try_from(result) {
        Ok(pid) if pid > 0 => Pid::from_raw(pid).ok_or(Errno::SRCH),
        Ok(errno) => Err(Errno::from_raw_os_error(-errno)),
        Err(_) => Err(Errno::OVERFLOW),
    }
}

/// Whether no process of the workload is there that could stop a child, which then can have the agent wait for its exec. All others
/// are children of PID 1, or theirs.
fn is_alone() -> bool {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    rustix::process::getpid().is_init()
        && matches!(rustix::process::waitid(WaitId::All, options), Err(Errno::CHILD))
}

/// Where a child begins.
extern "C" fn run(plan: &Plan<'_>) -> ! {
    plan.run()
}

impl Plan<'_> {
    /// The child's life. System calls only.
    fn run(&self) -> ! {
        let (step, errno) = match self.prepare() {
            Ok(()) => self.execute(),
            Err(failed) => failed,
        };
        let [e0, e1, e2, e3] = errno.raw_os_error().to_le_bytes();
        let _ = rustix::io::write(self.status, &[step as u8, 0, 0, 0, e0, e1, e2, e3]);
        // SAFETY: ends the child without running anything of the agent's.
        unsafe { libc::_exit(127) }
    }

    fn prepare(&self) -> Result<(), (Step, Errno)> {
        let at = |step| move |errno| (step, errno);
        if let Some(directory) = self.joined {
            pids_v1::join(directory).map_err(at(Step::Limits))?;
        }
        rustix::process::setsid().map_err(at(Step::Session))?;
        for (number, stream) in (0..).zip(self.streams) {
            channel::replace(stream, number).map_err(at(Step::Streams))?;
        }
        self.hand_over_memfds().map_err(at(Step::Credentials))?;
        // What runs out of memory is the workload's, and never the agent, which has no protection in every container. Set
        // while the process has the rights to, so that the workload cannot go below it again.
        let _ = write_score(c"1000");
        lockdown::limit_resources().map_err(at(Step::Limits))?;
        self.lockdown.become_user(self.uid, self.gid).map_err(at(Step::User))?;
        // As the user: a directory that is closed to it is an error here.
        rustix::process::chdir(self.directory.as_c_str()).map_err(at(Step::Directory))?;
        lockdown::reset_signals();
        self.lockdown.confine_self().map_err(at(Step::Confinement))
    }

    /// Opens each memfd anew, for reading and with a file position of its own, at the number it has. Everything
    /// else above 2 is closed by the exec.
    fn hand_over_memfds(&self) -> Result<(), Errno> {
        let mut first = 3;
        for (path, number) in &self.memfds {
            close_on_exec(first, number - 1)?;
            first = number + 1;
            let flags = OFlags::RDONLY | OFlags::CLOEXEC;
            let fresh = rustix::fs::open(path.as_c_str(), flags, Mode::empty())?;
            // SAFETY: the number is that of a memfd of the parent, open here as well, and nothing of this child
            // uses it otherwise.
            let mut memfd = std::mem::ManuallyDrop::new(unsafe {
                std::os::fd::FromRawFd::from_raw_fd(*number)
            });
            rustix::io::dup2(&fresh, &mut memfd)?;
            rustix::io::fcntl_setfd(&*memfd, FdFlags::empty())?;
        }
        close_on_exec(first, i32::MAX)
    }

    /// Tries one candidate after the other, as execvp(3) does. Comes back only with the error to report.
    fn execute(&self) -> (Step, Errno) {
        let mut worst = (Step::Execute, Errno::NOENT);
        for program in &self.programs {
            // SAFETY: all pointers are to NUL-terminated strings, the arrays end with null, and all of them
            // outlive the call.
            let result = unsafe {
                libc::execve(program.as_ptr(), self.arguments.as_ptr(), self.environment.as_ptr())
            };
            match check_result(result) {
                Err(Errno::NOENT) if exists(program) => return (Step::Interpreter, Errno::NOENT),
                Err(Errno::NOENT | Errno::NOTDIR) | Ok(()) => {}
                // It may be there in a later directory; if not, this is what the user should know.
                Err(Errno::ACCESS) => worst = (Step::Execute, Errno::ACCESS),
                Err(errno) => return (Step::Execute, errno),
            }
        }
        worst
    }
}

fn exists(path: &CStr) -> bool {
    rustix::fs::access(path, rustix::fs::Access::EXISTS).is_ok()
}

/// Marks the descriptors from `first` to `last`, both included. All that the agent opens is marked already: this is
/// for those that it does not know of.
fn close_on_exec(first: i32, last: i32) -> Result<(), Errno> {
    if first > last {
        return Ok(());
    }
    // SAFETY: only marks descriptors, of this process alone.
    let result = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first.cast_unsigned(),
            last.cast_unsigned(),
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    match check_result(result) {
        // Before Linux 5.11, and in gVisor.
        Err(Errno::NOSYS | Errno::INVAL) => Ok(()),
        other => other,
    }
}

/// Writes the OOM killer's preference for this process.
pub fn write_score(score: &CStr) -> Result<(), Errno> {
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let file = rustix::fs::open(c"/proc/self/oom_score_adj", flags, Mode::empty())?;
    rustix::io::write(&file, score.to_bytes()).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(program: &str, path: Option<&str>) -> Option<Vec<String>> {
        let env: Vec<_> =
            path.iter().map(|path| (b"PATH".to_vec(), path.as_bytes().to_vec())).collect();
        let found = candidates(program.as_bytes(), &env).ok()?;
        Some(found.into_iter().map(|path| path.into_string().unwrap()).collect())
    }

    #[test]
    fn a_program_is_looked_up_in_the_path_it_was_given() {
        assert_eq!(paths("a/b", None), Some(vec!["a/b".into()]));
        assert_eq!(
            paths("sh", Some("/bin::/x")),
            Some(vec!["/bin/sh".into(), "./sh".into(), "/x/sh".into()])
        );
        assert_eq!(paths("sh", None), None);
        assert_eq!(paths("", Some("/bin")), None);
    }

    #[test]
    fn steps_survive_the_pipe() {
        for step in Step::ALL {
            assert_eq!(Step::decode(step as u8), Some(step));
        }
        assert_eq!(Step::decode(0), None);
    }
}
