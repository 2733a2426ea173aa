//! Which files a workload may open, by the kernel's Landlock (`Documentation/userspace-api/landlock.rst`): everything that is not
//! below a path given here is denied. The rules are made once; each child takes them upon itself before it execs.
//!
//! File system rights stay as they are and decide first: these rules only take away.

use std::ffi::CString;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use chitin_protocol::{Failure, FileRule};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::failure;
use crate::syscall::check_result;

const EXECUTE: u64 = 1;
const WRITE_FILE: u64 = 1 << 1;
const READ_FILE: u64 = 1 << 2;
const READ_DIR: u64 = 1 << 3;
const TRUNCATE: u64 = 1 << 14;
const IOCTL_DEV: u64 = 1 << 15;

/// Of all rights, those that a file has; the others are a directory's, and refused for a file.
const OF_FILES: u64 = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV;

const READ: u64 = EXECUTE | READ_FILE | READ_DIR;
/// Existing nodes are written, and none are made.
const USE: u64 = READ | WRITE_FILE | TRUNCATE | IOCTL_DEV;
const ALL: u64 = u64::MAX;

/// All rights that an ABI version knows, by version less one. Whatever is handled is denied unless a rule says otherwise.
const KNOWN: [u64; 5] = [(1 << 13) - 1, (1 << 14) - 1, (1 << 15) - 1, (1 << 15) - 1, (1 << 16) - 1];

/// What no program runs without: programs, libraries and their settings; the kernel's own file systems, whose files have rules of
/// their own; and the scratch directories. What is not there is left out.
const SYSTEM: [(&str, u64); 15] = [
    ("/usr", READ),
    ("/bin", READ),
    ("/sbin", READ),
    ("/lib", READ),
    ("/lib32", READ),
    ("/lib64", READ),
    ("/etc", READ),
    ("/opt", READ),
    ("/sys", READ),
    // A process sets its own name, or its share of memory, there.
    ("/proc", USE),
    ("/dev", USE),
    ("/dev/shm", ALL),
    ("/work", ALL),
    ("/tmp", ALL),
    ("/var/tmp", ALL),
];

/// Rules, ready to be taken.
pub struct Ruleset(OwnedFd);

impl Ruleset {
    /// Makes rules that allow the system, the scratch directories and what `files` lists.
    pub fn new(files: &[FileRule]) -> Result<Ruleset, Failure> {
        let refused = |errno| failure("confine files: this kernel has no Landlock", b"", errno);
        let version = version().map_err(refused)?;
        let known = KNOWN.get(version.saturating_sub(1)).or(KNOWN.last()).copied().unwrap_or(0);
        let ruleset = create(known).map_err(refused)?;
        for (path, rights) in SYSTEM {
            match allow(&ruleset, path.as_bytes(), rights & known) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => return Err(failure("allow files in", path.as_bytes(), errno)),
            }
        }
        for FileRule { path, writable } in files {
            let rights = if *writable { ALL } else { READ };
            allow(&ruleset, path, rights & known)
                .map_err(|errno| failure("allow files in", path, errno))?;
        }
        Ok(Ruleset(ruleset))
    }

    /// In the child: takes the rules. A system call only. Needs `no_new_privs`.
    pub fn restrict(&self) -> Result<(), Errno> {
        // SAFETY: takes a descriptor and no memory.
        check_result(unsafe {
            libc::syscall(libc::SYS_landlock_restrict_self, self.0.as_raw_fd(), 0)
        })
    }
}

/// `LANDLOCK_CREATE_RULESET_VERSION`.
const VERSION: u32 = 1;

/// The kernel's Landlock ABI, from 1 on.
fn version() -> Result<usize, Errno> {
    // SAFETY: with this flag, the kernel reads no memory.
    let version = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u64>(), 0_usize, VERSION)
    };
    check_result(version)?;
    usize::try_from(version).map_err(|_| Errno::NOSYS)
}

fn create(handled: u64) -> Result<OwnedFd, Errno> {
    // The first field of `struct landlock_ruleset_attr`: a size of 8 says that there is no more.
    // SAFETY: the kernel reads 8 bytes at the pointer, which outlives the call.
    let fd = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, &raw const handled, size_of::<u64>(), 0)
    };
    check_result(fd)?;
    let fd = i32::try_from(fd).map_err(|_| Errno::BADF)?;
    // SAFETY: the descriptor is new and nobody else's. It closes on exec by itself.
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

fn allow(ruleset: &OwnedFd, path: &[u8], rights: u64) -> Result<(), Errno> {
    let path = CString::new(path).map_err(|_| Errno::INVAL)?;
    let file = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let kind = FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode);
    let allowed_access = if kind == FileType::Directory { rights } else { rights & OF_FILES };
    let rule = PathBeneath { allowed_access, parent_fd: file.as_raw_fd() };
    // SAFETY: the kernel reads a rule at the pointer, which outlives the call.
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
