//! The seal of a template: a MAC over the bytes of its `template.json`.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use hmac::{Hmac, Mac};
use sha2::Sha256;

const MAC_BYTES: usize = 32;

/// Begins the file of a seal and tells its version. A seal of Chitin 0.1 has no such beginning.
pub(super) const SEAL_MAGIC: &[u8; 8] = b"CHSEAL2\n";

/// Begins the sealed bytes, so that no other use of the key has the same MAC.
const LABEL: &[u8] = b"chitin template manifest 2\n";

/// The result of a comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SealCheck {
    Valid,
    Invalid,
    /// The seal has the form of another version.
    OtherVersion,
}

/// Returns the content of the seal file for these bytes.
pub(super) fn seal_bytes(key: &[u8], bytes: &[u8]) -> io::Result<Vec<u8>> {
    let mac = start_mac(key)?.chain_update(bytes).finalize().into_bytes();
    Ok([SEAL_MAGIC.as_slice(), &mac].concat())
}

/// Compares bytes with the content of a seal file. The time does not depend on the first
/// difference of the MAC.
pub(super) fn check_seal(key: &[u8], bytes: &[u8], seal: &[u8]) -> io::Result<SealCheck> {
    let Some(mac) = seal.strip_prefix(SEAL_MAGIC) else { return Ok(SealCheck::OtherVersion) };
    match start_mac(key)?.chain_update(bytes).verify_slice(mac) {
        Ok(()) => Ok(SealCheck::Valid),
        Err(_) => Ok(SealCheck::Invalid),
    }
}

fn start_mac(key: &[u8]) -> io::Result<Hmac<Sha256>> {
    Ok(Hmac::<Sha256>::new_from_slice(key).map_err(io::Error::other)?.chain_update(LABEL))
}

/// Returns the MAC at the end of a state file, in hexadecimal digits.
pub(super) fn read_state_mac(state: &File) -> io::Result<String> {
    let mut mac = [0; MAC_BYTES];
    let length = state.metadata()?.len();
    let at = length.checked_sub(MAC_BYTES as u64).ok_or(io::ErrorKind::UnexpectedEof)?;
    state.read_exact_at(&mut mac, at)?;
    Ok(mac.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Reads a file of at most `limit` bytes.
pub(super) fn read_bounded(file: &File, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 <= limit {
        true => Ok(bytes),
        false => Err(io::ErrorKind::FileTooLarge.into()),
    }
}
