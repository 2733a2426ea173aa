//! The state file: header, payload and MAC.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;

use hmac::Mac;

use super::error::StateError;
use super::key::Key;
use super::layout::{HEADER_BYTES, MAC_BYTES, MAGIC, MAX_STATE_BYTES, VERSION};
use super::malformed::Malformed;
use super::processor::Processor;
use super::wire::{Reader, Writer};

/// The header of a state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The processor, as far as the guest can tell.
    pub processor: Processor,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// The number of vCPUs.
    pub vcpus: u8,
}

/// Returns the contents of a state file: header, payload and MAC.
///
/// # Errors
/// The payload is too large.
pub fn sign_state(header: &Header, payload: &[u8], key: &Key) -> Result<Vec<u8>, StateError> {
    let length = HEADER_BYTES + payload.len() + MAC_BYTES;
    let length = u32::try_from(length)
        .ok()
        .filter(|_| length <= MAX_STATE_BYTES)
        .ok_or(StateError::TooLong)?;
    let mut writer = Writer::default();
    writer.write_value(MAGIC);
    writer.write_value(&VERSION);
    writer.write_value(&length);
    header.processor.encode(&mut writer);
    writer.write_value(&header.memory_mib);
    writer.write_value(&u32::from(header.vcpus));
    let mut bytes = writer.into_bytes();
    debug_assert_eq!(bytes.len(), HEADER_BYTES);
    bytes.extend_from_slice(payload);
    let mac = key.start_mac()?.chain_update(&bytes).finalize().into_bytes();
    bytes.extend_from_slice(&mac);
    Ok(bytes)
}

/// Verifies the contents of a state file. Returns its header and its payload.
///
/// # Errors
/// The file is of another kind, version or length, or its MAC is wrong; in this order.
pub fn verify_state<'a>(bytes: &'a [u8], key: &Key) -> Result<(Header, &'a [u8]), StateError> {
    let mut reader = Reader::new(bytes);
    let least = HEADER_BYTES + MAC_BYTES;
    let short = |_| StateError::Length { found: bytes.len(), expected: least };
    if reader.read_bytes(MAGIC.len()).map_err(short)? != MAGIC {
        return Err(StateError::Magic);
    }
    let version: u32 = reader.read_value().map_err(short)?;
    if version != VERSION {
        return Err(StateError::Version { found: version });
    }
    let length: u32 = reader.read_value().map_err(short)?;
    let expected = usize::try_from(length).unwrap_or(usize::MAX).max(least);
    if bytes.len() != expected {
        return Err(StateError::Length { found: bytes.len(), expected });
    }
    let (signed, mac) = bytes.split_at(bytes.len() - MAC_BYTES);
    // The time of the comparison does not depend on the position of the first difference.
    key.start_mac()?.chain_update(signed).verify_slice(mac).map_err(|_| StateError::Mac)?;

    let processor = Processor::decode(&mut reader)?;
    let memory_mib = reader.read_value()?;
    let vcpus = u8::try_from(reader.read_value::<u32>()?).map_err(|_| Malformed::Count)?;
    Ok((Header { processor, memory_mib, vcpus }, &signed[HEADER_BYTES..]))
}

/// Reads a whole state file.
///
/// # Errors
/// The file is larger than any state, or reading fails.
pub fn read_state_file(file: &File) -> Result<Vec<u8>, StateError> {
    let operation = |operation| move |source| StateError::File { operation, source };
    let length = file.metadata().map_err(operation("examine"))?.len();
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    if length > MAX_STATE_BYTES {
        return Err(StateError::TooLong);
    }
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, 0).map_err(operation("read"))?;
    Ok(bytes)
}

/// Writes a state file from its start.
///
/// # Errors
/// Writing fails.
pub fn write_state_file(file: &mut File, bytes: &[u8]) -> Result<(), StateError> {
    file.write_all(bytes).map_err(|source| StateError::File { operation: "write", source })
}
