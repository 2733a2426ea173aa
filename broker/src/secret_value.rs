//! The value of a credential in the memory of this process.

use std::fmt;
use std::io;

use chitin_protocol::{MAX_SECRET, SecretBytes};
use chitin_text::explain_memory_lock;
use memmap2::{Advice, MmapMut};
use zeroize::{Zeroize, Zeroizing};

/// The value of a credential in dedicated memory: locked against swapping, left out of core dumps,
/// and wiped when dropped.
pub struct SecretValue {
    pages: MmapMut,
    len: usize,
}

/// The reason why bytes cannot become a [`SecretValue`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SecretValueError {
    /// There are no bytes.
    #[error("the value is empty")]
    Empty,
    /// The value is longer than the protocol allows.
    #[error("the value is over the limit of {} KiB", MAX_SECRET / 1024)]
    TooLong,
    /// There is no memory.
    #[error("allocate memory")]
    Allocate(#[source] io::Error),
    /// The kernel refuses to lock the memory.
    #[error("lock memory against swapping{}", explain_memory_lock())]
    Lock(#[source] io::Error),
    /// The kernel refuses to leave the memory out of core dumps.
    #[error("leave memory out of core dumps")]
    LeaveOutOfDumps(#[source] io::Error),
}

impl SecretValue {
    /// Moves a value to locked memory. `strip_newline` removes one newline at its end.
    ///
    /// # Errors
    /// The value is empty or too long, or the memory cannot be locked.
    pub fn new(
        bytes: Zeroizing<Vec<u8>>,
        strip_newline: bool,
    ) -> Result<SecretValue, SecretValueError> {
        let value = match bytes.as_slice() {
            [rest @ .., b'\n'] if strip_newline => rest,
            all => all,
        };
        if value.is_empty() {
            return Err(SecretValueError::Empty);
        }
        if value.len() > MAX_SECRET {
            return Err(SecretValueError::TooLong);
        }
        let mut pages = MmapMut::map_anon(value.len()).map_err(SecretValueError::Allocate)?;
        pages.lock().map_err(SecretValueError::Lock)?;
        // A lock does not imply it: the kernel dumps locked pages.
        pages.advise(Advice::DontDump).map_err(SecretValueError::LeaveOutOfDumps)?;
        pages[..value.len()].copy_from_slice(value);
        Ok(SecretValue { len: value.len(), pages })
    }

    /// Returns a copy for a message. It is wiped when dropped.
    pub fn to_bytes(&self) -> SecretBytes {
        SecretBytes::new(self.pages[..self.len].to_vec())
    }
}

impl Drop for SecretValue {
    fn drop(&mut self) {
        self.pages.zeroize();
    }
}

impl fmt::Debug for SecretValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretValue({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the flags of the mapping that contains an address (`proc_pid_smaps(5)`).
    fn mapping_flags(address: usize) -> Vec<String> {
        let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut inside = false;
        for line in text.lines() {
            let range = line.split(' ').next().and_then(|range| range.split_once('-'));
            let bounds = range.map(|(start, end)| {
                (usize::from_str_radix(start, 16), usize::from_str_radix(end, 16))
            });
            if let Some((Ok(start), Ok(end))) = bounds {
                inside = (start..end).contains(&address);
            }
            if let Some(flags) = line.strip_prefix("VmFlags:")
                && inside
            {
                return flags.split_whitespace().map(str::to_owned).collect();
            }
        }
        panic!("{address:#x} is not mapped");
    }

    #[test]
    fn secret_pages_are_locked_and_not_dumped() {
        let value = SecretValue::new(Zeroizing::new(b"canary".to_vec()), false).unwrap();
        let flags = mapping_flags(value.pages.as_ptr() as usize);
        for flag in ["lo", "dd"] {
            assert!(flags.iter().any(|found| found == flag), "no {flag} in {flags:?}");
        }
    }
}
