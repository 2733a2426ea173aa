//! Restricts the files that a workload may open, with the kernel's Landlock
//! (`Documentation/userspace-api/landlock.rst`): everything that is not below a path given here is
//! denied. The rules are made once, and each child applies them to itself before its exec.
//!
//! File system permissions stay as they are and decide first: these rules only remove rights.

use std::ffi::CString;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use chitin_protocol::{Failure, FileRule};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::error::make_failure;
use crate::syscall::check_result;

const EXECUTE: u64 = 1;
const WRITE_FILE: u64 = 1 << 1;
const READ_FILE: u64 = 1 << 2;
const READ_DIR: u64 = 1 << 3;
const TRUNCATE: u64 = 1 << 14;
const IOCTL_DEV: u64 = 1 << 15;

/// The rights that apply to files. All others apply to directories, and are refused for a file.
const FILE_RIGHTS: u64 = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV;

const READ: u64 = EXECUTE | READ_FILE | READ_DIR;
/// Allows writing to existing files, and creating none.
const USE: u64 = READ | WRITE_FILE | TRUNCATE | IOCTL_DEV;
const ALL: u64 = u64::MAX;

/// All rights that an ABI version knows, by the version less one. Each right that is handled is
/// denied unless a rule allows it.
const KNOWN: [u64; 5] = [(1 << 13) - 1, (1 << 14) - 1, (1 << 15) - 1, (1 << 15) - 1, (1 << 16) - 1];

/// Paths that every program needs: programs, libraries and their settings; the kernel's own file
/// systems, whose files have separate rules; and the scratch directories. Missing ones are skipped.
const SYSTEM: [(&str, u64); 16] = [
    ("/usr", READ),
    ("/bin", READ),
    ("/sbin", READ),
    ("/lib", READ),
    ("/lib32", READ),
    ("/lib64", READ),
    ("/etc", READ),
    ("/opt", READ),
    ("/sys", READ),
    // Credentials in memory.
    ("/run/credentials", READ_FILE),
    // A process sets its own name, or its OOM score, there.
    ("/proc", USE),
    ("/dev", USE),
    ("/dev/shm", ALL),
    ("/work", ALL),
    ("/tmp", ALL),
    ("/var/tmp", ALL),
];

/// A ruleset of the kernel, ready to be applied.
pub struct Ruleset(OwnedFd);

impl Ruleset {
    /// Makes rules that allow the system, the scratch directories and the paths in `files`.
    pub fn new(files: &[FileRule]) -> Result<Ruleset, Failure> {
        let unsupported =
            |errno| make_failure("confine files: this kernel has no Landlock", b"", errno);
        let version = read_abi_version().map_err(unsupported)?;
        let known = KNOWN.get(version.saturating_sub(1)).or(KNOWN.last()).copied().unwrap_or(0);
        let ruleset = create_ruleset(known).map_err(unsupported)?;
        for (path, rights) in SYSTEM {
            match add_rule(&ruleset, path.as_bytes(), rights & known) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => {
                    return Err(make_failure("allow files in", path.as_bytes(), errno));
                }
            }
        }
        for FileRule { path, writable } in files {
            let rights = if *writable { ALL } else { READ };
            add_rule(&ruleset, path, rights & known)
                .map_err(|errno| make_failure("allow files in", path, errno))?;
        }
        Ok(Ruleset(ruleset))
    }

    /// Applies the rules to this thread and its descendants. Needs `no_new_privs`.
    ///
    /// Makes one system call.
    pub fn restrict_self(&self) -> Result<(), Errno> {
        // SAFETY: landlock_restrict_self(2) takes a descriptor and flags, and accesses no memory.
        check_result(unsafe {
            libc::syscall(libc::SYS_landlock_restrict_self, self.0.as_raw_fd(), 0)
        })
    }
}

/// `LANDLOCK_CREATE_RULESET_VERSION`.
const CREATE_RULESET_VERSION: u32 = 1;

/// Returns the kernel's Landlock ABI version, which begins at 1.
fn read_abi_version() -> Result<usize, Errno> {
    // SAFETY: with this flag, a null pointer and size 0, the kernel accesses no memory.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<u64>(),
            0_usize,
            CREATE_RULESET_VERSION,
        )
    };
    check_result(version)?;
    usize::try_from(version).map_err(|_| Errno::NOSYS)
}

fn create_ruleset(handled: u64) -> Result<OwnedFd, Errno> {
    // `handled` is the first field of `struct landlock_ruleset_attr`, and the size of 8 says that
    // the others are absent.
    // SAFETY: the kernel reads 8 bytes at the pointer, which outlives the call.
    let fd = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, &raw const handled, size_of::<u64>(), 0)
    };
    check_result(fd)?;
    let fd = i32::try_from(fd).map_err(|_| Errno::BADF)?;
    // SAFETY: the kernel has just opened the descriptor, and nothing else owns it. It is
    // close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `struct landlock_path_beneath_attr`, which is packed.
#[repr(C, packed)]
struct PathBeneath {
    allowed_access: u64,
    parent_fd: i32,
}

/// `LANDLOCK_RULE_PATH_BENEATH`.
const PATH_BENEATH: u32 = 1;

fn add_rule(ruleset: &OwnedFd, path: &[u8], rights: u64) -> Result<(), Errno> {
    let path = CString::new(path).map_err(|_| Errno::INVAL)?;
    let file = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let kind = FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode);
    let allowed_access = if kind == FileType::Directory { rights } else { rights & FILE_RIGHTS };
    let rule = PathBeneath { allowed_access, parent_fd: file.as_raw_fd() };
    // SAFETY: the kernel reads one `landlock_path_beneath_attr` at the pointer, which outlives the
    // call, and looks up `parent_fd`, which `file` keeps open.
    check_result(unsafe {
        libc::syscall(
            libc::SYS_landlock_add_rule,
            ruleset.as_raw_fd(),
            PATH_BENEATH,
            &raw const rule,
            0,
        )
    })
}
