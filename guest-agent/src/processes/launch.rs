//! Launches a process. Everything that allocates, or that can fail because of the request, happens
//! before the fork: see [`child`](super::child) for the rest.

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr;

use chitin_protocol::{Failure, Start, StartError};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use rustix::process::Pid;
use zeroize::Zeroizing;

use super::child::{ChildStep, ExecArgs};
use super::spawn::spawn_child;
use crate::cgroup::pids_v1::PidsCgroup;
use crate::cgroup::{Cgroups, WorkloadCgroup};
use crate::error::make_failure;
use crate::limit_watch::LimitWatch;
use crate::lockdown::Lockdown;
use crate::secrets::Secrets;

/// The reason why a process did not start.
pub type LaunchError = (StartError, Failure);

/// A forked child, which has executed its program unless a step failed.
pub struct Child {
    pub pid: Pid,
    status: OwnedFd,
    program: Vec<u8>,
    user: u32,
    directory: Vec<u8>,
}

impl Child {
    /// Returns the step that failed, if the child has ended without executing its program.
    pub fn read_launch_error(&self) -> Option<LaunchError> {
        let mut record = [0; 8];
        match rustix::io::read(&self.status, &mut record) {
            Ok(8) => {}
            _ => return None,
        }
        let [step, _, _, _, errno @ ..] = record;
        let errno = Errno::from_raw_os_error(i32::from_le_bytes(errno));
        let user = self.user.to_string();
        let (class, operation, object): (_, _, &[u8]) = match ChildStep::decode(step)? {
            ChildStep::Session => (StartError::Other, "create a session", b""),
            ChildStep::Streams => (StartError::Other, "connect standard streams", b""),
            ChildStep::Limits => (StartError::Other, "set resource limits", b""),
            ChildStep::User => (StartError::Other, "switch to user", user.as_bytes()),
            ChildStep::Directory => (StartError::Other, "change the directory to", &self.directory),
            ChildStep::Confinement => (StartError::Other, "confine the process", b""),
            ChildStep::Execute => (classify_exec_error(errno), "execute", &self.program),
            ChildStep::Interpreter => {
                (StartError::NotExecutable, "find the interpreter of", &self.program)
            }
        };
        Some((class, make_failure(operation, object, errno)))
    }
}

/// Classifies an error of execve(2) as shells do.
fn classify_exec_error(errno: Errno) -> StartError {
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
pub struct StandardStreams {
    pub stdin: OwnedFd,
    pub stdout: OwnedFd,
    pub stderr: OwnedFd,
}

/// The parts of the agent that a process is launched with.
pub struct LaunchContext<'a> {
    pub secrets: &'a Secrets,
    pub lockdown: &'a Lockdown,
    pub cgroups: &'a Cgroups,
    pub limit_watch: &'a LimitWatch,
}

/// Launches the process that `start` describes.
pub fn launch_process(
    start: &Start,
    streams: &StandardStreams,
    context: &LaunchContext<'_>,
) -> Result<Child, LaunchError> {
    let LaunchContext { secrets, lockdown, cgroups, .. } = context;
    let Some(program) = start.argv.first() else {
        return Err(refuse("start a process without arguments", b"", Errno::INVAL));
    };
    let argv = start
        .argv
        .iter()
        .map(|argument| to_c_string("pass an argument with a NUL:", argument))
        .collect::<Result<Vec<_>, _>>()?;
    let environment = build_environment(&start.env, secrets)?;
    let programs = list_program_paths(program, &start.env)?;
    let (status, status_child) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)
        .map_err(|errno| refuse("create a pipe", b"", errno))?;
    let args = ExecArgs {
        streams: [streams.stdin.as_fd(), streams.stdout.as_fd(), streams.stderr.as_fd()],
        status: status_child.as_fd(),
        uid: start.uid,
        gid: start.gid,
        directory: to_c_string("change the directory to", &start.cwd)?,
        programs,
        arguments: argv.iter().map(|argument| argument.as_ptr()).chain([ptr::null()]).collect(),
        environment: environment
            .iter()
            .map(|entry| entry.as_ptr().cast())
            .chain([ptr::null()])
            .collect(),
        lockdown,
        pids_v1: cgroups.pids_v1.as_ref().map(PidsCgroup::directory),
    };
    let cgroup = cgroups.v2.as_ref().map(WorkloadCgroup::directory);
    // SAFETY: the child calls nothing but `ExecArgs::run`, which makes system calls only.
    let pid = unsafe { spawn_child(&args, cgroup) }.map_err(|errno| refuse("fork", b"", errno))?;
    Ok(Child {
        pid,
        status,
        program: program.clone(),
        user: start.uid,
        directory: start.cwd.clone(),
    })
}

fn refuse(operation: &str, object: &[u8], errno: Errno) -> LaunchError {
    (StartError::Other, make_failure(operation, object, errno))
}

fn to_c_string(operation: &str, bytes: &[u8]) -> Result<CString, LaunchError> {
    CString::new(bytes).map_err(|_| refuse(operation, bytes, Errno::INVAL))
}

/// Builds the entries of the environment, each with a NUL at its end. They may hold credentials, so
/// they are zeroed when they are dropped.
fn build_environment(
    variables: &[(Vec<u8>, Vec<u8>)],
    secrets: &Secrets,
) -> Result<Vec<Zeroizing<Vec<u8>>>, LaunchError> {
    let mut environment = Vec::with_capacity(variables.len());
    for (name, value) in variables {
        if name.is_empty() || name.contains(&b'=') || name.contains(&0) || value.contains(&0) {
            return Err(refuse("set environment variable", name, Errno::INVAL));
        }
        if !secrets.sets_variable(name) {
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
    Ok(environment)
}

/// Lists the paths at which the program may be: its name if that has a slash, otherwise one in each
/// directory of `PATH`.
fn list_program_paths(
    program: &[u8],
    env: &[(Vec<u8>, Vec<u8>)],
) -> Result<Vec<CString>, LaunchError> {
    let not_found =
        |operation| (StartError::NotFound, make_failure(operation, program, Errno::NOENT));
    if program.is_empty() {
        return Err(not_found("execute a program with an empty name"));
    }
    let to_path = |path: Vec<u8>| CString::new(path).map_err(|_| not_found("execute"));
    if program.contains(&b'/') {
        return Ok(vec![to_path(program.to_vec())?]);
    }
    let Some((_, path)) = env.iter().find(|(name, _)| name == b"PATH") else {
        return Err(not_found("find a program without PATH in the environment:"));
    };
    path.split(|&byte| byte == b':')
        .map(|directory| match directory {
            // POSIX: an empty entry is the working directory.
            [] => to_path([b"./", program].concat()),
            _ => to_path([directory, b"/", program].concat()),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(program: &str, path: Option<&str>) -> Option<Vec<String>> {
        let env: Vec<_> =
            path.iter().map(|path| (b"PATH".to_vec(), path.as_bytes().to_vec())).collect();
        let found = list_program_paths(program.as_bytes(), &env).ok()?;
        Some(found.into_iter().map(|path| path.into_string().unwrap()).collect())
    }

    #[test]
    fn program_is_looked_up_in_the_given_path() {
        assert_eq!(paths("a/b", None), Some(vec!["a/b".into()]));
        assert_eq!(
            paths("sh", Some("/bin::/x")),
            Some(vec!["/bin/sh".into(), "./sh".into(), "/x/sh".into()])
        );
        assert_eq!(paths("sh", None), None);
        assert_eq!(paths("", Some("/bin")), None);
    }
}
