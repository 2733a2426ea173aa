use chitin_vmm::HostError;
use chitin_vmm::jail::forbid_dumps;

use crate::error::Error;

/// Keeps the memory of this process, which holds the values of credentials, from core dumps and
/// from other processes of the same user: `PR_SET_DUMPABLE` 0 and `RLIMIT_CORE` 0.
///
/// A program that embeds this library calls it before it reads the first secret; the command line
/// does. It is not done implicitly, because it affects the whole process: debuggers can no longer
/// attach, files under `/proc/PID` belong to root, and child processes make no core dumps. Only the
/// pages of a credential itself are always locked and left out of dumps.
///
/// # Errors
/// The kernel refuses, which no supported kernel does.
pub fn harden_process() -> Result<(), Error> {
    Ok(forbid_dumps().map_err(HostError::during("forbid core dumps of this process"))?)
}
