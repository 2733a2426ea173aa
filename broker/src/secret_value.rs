//! The value of a credential in the memory of this process.

use std::fmt;
use std::io;

use chitin_protocol::{MAX_SECRET, SecretBytes};
use memmap2::MmapMut;
use zeroize::{Zeroize, Zeroizing};

/// The value of a credential in dedicated memory: locked against swapping (and so left out of core
/// dumps where the kernel leaves out locked pages), and wiped when dropped.
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
    #[error("lock memory against swapping (raise the limit of `ulimit -l`)")]
    Lock(#[source] io::Error),
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
