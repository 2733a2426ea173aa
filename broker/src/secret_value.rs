//! A credential's value in the memory of this process.

use std::fmt;

use chitin_protocol::{MAX_SECRET, SecretBytes};
use memmap2::MmapMut;
use zeroize::{Zeroize, Zeroizing};

/// A credential's value in memory of its own: locked against swapping, left out of core dumps by the kernel's rules
/// for locked pages where those apply, wiped when dropped.
pub struct SecretValue {
    pages: MmapMut,
    len: usize,
}

impl SecretValue {
    /// Takes a value over; `strip_newline`: without one newline at its end.
    ///
    /// # Errors
    /// In words: it is empty or too long, or its memory cannot be locked.
    pub fn new(bytes: Zeroizing<Vec<u8>>, strip_newline: bool) -> Result<SecretValue, String> {
        let value = match bytes.as_slice() {
            [rest @ .., b'\n'] if strip_newline => rest,
            all => all,
        };
        if value.is_empty() {
            return Err("the value is empty".into());
        }
        if value.len() > MAX_SECRET {
            return Err(format!("the value is over the limit of {} KiB", MAX_SECRET / 1024));
        }
        let mut pages =
            MmapMut::map_anon(value.len()).map_err(|error| format!("allocate memory: {error}"))?;
        pages.lock().map_err(|error| {
            format!("lock memory against swapping: {error}; raise the limit (`ulimit -l`)")
        })?;
        pages[..value.len()].copy_from_slice(value);
        Ok(SecretValue { len: value.len(), pages })
    }

    /// A copy to be sent. It is wiped as well.
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
