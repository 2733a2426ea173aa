//! The limits of this process that explain an error of the system.

use std::error::Error;
use std::io;

use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

/// Returns the limit that an error or one of its causes names, with its present value and the
/// remedy. Only a limit that explains the error number and that is set is named.
pub fn explain_limit(error: &(dyn Error + 'static)) -> Option<String> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        let system = error.downcast_ref::<io::Error>();
        let code = system.and_then(io::Error::raw_os_error);
        let errno = code.map(Errno::from_raw_os_error).or(error.downcast_ref::<Errno>().copied());
        if let Some(text) = errno.and_then(explain_errno) {
            return Some(text);
        }
        // The source of an error that wraps another one is that one's source.
        let wrapped = system.and_then(io::Error::get_ref).map(|wrapped| wrapped as &dyn Error);
        cause = wrapped.or(error.source());
    }
    None
}

fn explain_errno(errno: Errno) -> Option<String> {
    let limit = |resource| getrlimit(resource).current;
    match errno {
        Errno::MFILE => {
            let files = limit(Resource::Nofile)?;
            Some(format!("the limit of open files is {files}: raise it with `ulimit -n`"))
        }
        Errno::NFILE => {
            Some("the host has too many open files: raise the sysctl `fs.file-max`".into())
        }
        Errno::NOMEM => {
            let kib = limit(Resource::As)? >> 10;
            Some(format!("the limit of address space is {kib} KiB: raise it with `ulimit -v`"))
        }
        Errno::FBIG => {
            let kib = limit(Resource::Fsize)? >> 10;
            Some(format!("the limit of file sizes is {kib} KiB: raise it with `ulimit -f`"))
        }
        Errno::DQUOT => Some("the quota of this user on this file system is used up".into()),
        _ => None,
    }
}

/// Returns the limit that explains a process or thread which could not be created (EAGAIN): the
/// control group's, if it is reached, or else the user's, if it is set.
pub fn explain_refused_process() -> String {
    if let Some((group, limit)) = find_full_group() {
        return format!(
            "the control group {group} has reached its {limit} tasks: raise its `pids.max`, or \
             end other processes"
        );
    }
    match getrlimit(Resource::Nproc).current {
        Some(processes) => format!(
            "the limit of processes of this user is {processes}: raise it with `ulimit -u`, or \
             end other processes"
        ),
        None => "the host has too many processes or threads: end some, or raise the sysctls \
                 `kernel.threads-max` and `kernel.pid_max`"
            .into(),
    }
}

/// Returns the limit of locked memory as the end of a sentence; nothing if there is none.
pub fn explain_memory_lock() -> String {
    match getrlimit(Resource::Memlock).current {
        Some(bytes) => format!(
            ": the limit of locked memory is {} KiB: raise it with `ulimit -l`",
            bytes >> 10
        ),
        None => String::new(),
    }
}

/// Finds a control group of this process that has as many tasks as it may.
fn find_full_group() -> Option<(String, u64)> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    groups.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        let hierarchy = match controllers {
            "" => "/sys/fs/cgroup",
            names if names.split(',').any(|name| name == "pids") => "/sys/fs/cgroup/pids",
            _ => return None,
        };
        let read = |file: &str| {
            let text = std::fs::read_to_string(format!("{hierarchy}{path}/{file}")).ok()?;
            text.trim().parse::<u64>().ok()
        };
        let (current, max) = (read("pids.current")?, read("pids.max")?);
        (current >= max).then(|| (path.to_owned(), max))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn explain(errno: Errno) -> Option<String> {
        explain_limit(&io::Error::from(errno))
    }

    #[test]
    fn limit_is_named_with_its_value() {
        let files = getrlimit(Resource::Nofile).current.unwrap();
        assert!(explain(Errno::MFILE).unwrap().contains(&files.to_string()));
        assert!(explain_limit(&Errno::MFILE).is_some());
    }

    #[test]
    fn limit_that_is_not_set_is_not_blamed() {
        assert_eq!(getrlimit(Resource::As).current, None, "run the tests without `ulimit -v`");
        assert_eq!(explain(Errno::NOMEM), None);
        for errno in [Errno::PERM, Errno::ACCESS, Errno::NOENT, Errno::AGAIN, Errno::NOSPC] {
            assert_eq!(explain(errno), None, "{errno:?}");
        }
    }

    #[test]
    fn limit_behind_other_errors_is_found() {
        let inner = io::Error::from(Errno::NFILE);
        let outer = io::Error::other(inner);
        assert!(explain_limit(&outer).is_some_and(|text| text.contains("fs.file-max")));
    }
}
