//! The key of a template.

use std::fmt;
use std::fs::File;
use std::io::Read;

use hmac::{Hmac, Mac};
use sha2::Sha256;
use zeroize::Zeroize;

use super::error::StateError;

const KEY_BYTES: usize = 32;

/// The key that templates are authenticated with. Wiped when dropped, and never printed.
pub struct Key([u8; KEY_BYTES]);

impl Key {
    /// Reads the key from a pipe or file.
    ///
    /// # Errors
    /// There are fewer than 32 bytes.
    pub fn read(file: &mut File) -> Result<Self, StateError> {
        let mut key = Self([0; KEY_BYTES]);
        file.read_exact(&mut key.0).map_err(StateError::Key)?;
        Ok(key)
    }

    #[cfg(test)]
    pub(super) fn from_byte(byte: u8) -> Self {
        Self([byte; KEY_BYTES])
    }

    /// Starts an HMAC-SHA256.
    pub(super) fn start_mac(&self) -> Result<Hmac<Sha256>, StateError> {
        // HMAC takes a key of any length.
        Hmac::new_from_slice(&self.0).map_err(|_| StateError::Mac)
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(…)")
    }
}
