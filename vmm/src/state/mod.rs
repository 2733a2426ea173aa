//! The saved state of a microVM, as a file.
//!
//! ```text
//!   0  "CHITINVM"      what it is
//!   8  version, u32    of this layout; another is refused, whatever it says
//!  12  length, u32     of all of it
//!  16  processor       vendor (12 bytes), signature (u32), what the guest is told of it (u64 × 2)
//!  48  memory, u32     in MiB
//!  52  vcpus, u8       then three zero bytes
//!  56  payload         [`MachineState`]
//!  −32 HMAC-SHA256     of everything before it
//! ```
//!
//! A file can be replaced by whoever can write where it lies, and what it says becomes registers and descriptors: nothing
//! but length and version is looked at before the MAC has been verified. What is read after that is bounded and checked
//! all the same, because the guest that was saved chose half of it.

pub mod machine;
pub mod wire;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;

use hmac::{Hmac, Mac};
use sha2::Sha256;
use zeroize::Zeroize;

use crate::arch::x86_64::cpuid::Processor;
pub use machine::MachineState;
use wire::{Reader, Writer};

const MAGIC: &[u8; 8] = b"CHITINVM";

/// Goes up with every change of what is saved, also where KVM's structures or our devices change.
pub const VERSION: u32 = 1;

const HEADER_BYTES: usize = 56;
const MAC_BYTES: usize = 32;

/// Eight vCPUs with all of their extended state take 50 KiB, the list of memory a few more.
const MAX_STATE_BYTES: usize = 256 * 1024;

/// Something in a state that its layout does not allow. With a MAC that is right this is a fault of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(pub &'static str);

/// A state that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Reading or writing failed.
    #[error("{operation} the state of a template")]
    File {
        /// What was tried.
        operation: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The key did not come whole.
    #[error("read the key of a template: 32 bytes are due")]
    Key(#[source] io::Error),
    /// Another kind of file.
    #[error("this is no state of a template")]
    Magic,
    /// Made by another version of this program.
    #[error(
        "the template has version {found}, this monitor makes and takes version {VERSION}: build it again"
    )]
    Version {
        /// The version of the file.
        found: u32,
    },
    /// Shorter or longer than it says.
    #[error(
        "the state of the template has {found} bytes where {due} are due: it was cut off: build it again"
    )]
    Length {
        /// The length of the file.
        found: usize,
        /// What it says itself, or the least there is.
        due: usize,
    },
    /// Larger than any state.
    #[error("a state of more than {MAX_STATE_BYTES} bytes")]
    TooLong,
    /// The MAC is wrong.
    #[error("the template was changed, or made with another key: build it again")]
    Mac,
    /// Another processor.
    #[error(
        "the template was made on another processor or kernel ({made}), this is {here}: build it again"
    )]
    Processor {
        /// Where it was made.
        made: Processor,
        /// This machine.
        here: Processor,
    },
    /// Another size was asked for.
    #[error("the template has {made} {what}, and {asked} were asked for")]
    Size {
        /// MiB of memory, or vCPUs.
        what: &'static str,
        /// The template's.
        made: u32,
        /// The specification's.
        asked: u32,
    },
    /// What the host bound it to is something else now.
    #[error(
        "the template belongs to other files (it is bound to `{made}`, not to `{asked}`): build it again"
    )]
    Binding {
        /// What was given when it was made.
        made: String,
        /// What was given now.
        asked: String,
    },
    /// The payload is malformed.
    #[error("the state of the template is malformed")]
    Malformed(#[from] Malformed),
    /// The memory file cannot be used.
    #[error("the memory of the template {0}: build it again")]
    Memory(&'static str),
}

/// What templates are authenticated with. Wiped when dropped, and never printed.
pub struct Key([u8; 32]);

impl Key {
    /// Reads the key from a pipe or file.
    ///
    /// # Errors
    /// There are fewer than 32 bytes.
    pub fn read(file: &mut File) -> Result<Self, StateError> {
        let mut key = Self([0; 32]);
        file.read_exact(&mut key.0).map_err(StateError::Key)?;
        Ok(key)
    }

    fn mac(&self) -> Result<Hmac<Sha256>, StateError> {
        // Any length of key is taken.
        Hmac::new_from_slice(&self.0).map_err(|_| StateError::Mac)
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(…)")
    }
}

/// What a state says about itself, before its payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The processor, as far as the guest can tell.
    pub processor: Processor,
    /// Guest memory.
    pub memory_mib: u32,
    /// Virtual CPUs.
    pub vcpus: u8,
}

/// Puts a header before a payload and a MAC behind it.
///
/// # Errors
/// The payload is larger than any.
pub fn seal(header: &Header, payload: &[u8], key: &Key) -> Result<Vec<u8>, StateError> {
    let length = HEADER_BYTES + payload.len() + MAC_BYTES;
    let length = u32::try_from(length)
        .ok()
        .filter(|_| length <= MAX_STATE_BYTES)
        .ok_or(StateError::TooLong)?;
    let mut writer = Writer::default();
    MAGIC.iter().for_each(|byte| writer.plain(byte));
    writer.plain(&VERSION);
    writer.plain(&length);
    header.processor.encode(&mut writer);
    writer.plain(&header.memory_mib);
    writer.plain(&u32::from(header.vcpus));
    let mut bytes = writer.into_bytes();
    debug_assert_eq!(bytes.len(), HEADER_BYTES);
    bytes.extend_from_slice(payload);
    let mac = key.mac()?.chain_update(&bytes).finalize().into_bytes();
    bytes.extend_from_slice(&mac);
    Ok(bytes)
}

/// Verifies a state. Returns what it says about itself, and its payload.
///
/// # Errors
/// It is none, of another version, of another length than it says, or its MAC is wrong; in this order.
pub fn open<'a>(bytes: &'a [u8], key: &Key) -> Result<(Header, &'a [u8]), StateError> {
    let mut reader = Reader::new(bytes);
    let least = HEADER_BYTES + MAC_BYTES;
    let short = |_| StateError::Length { found: bytes.len(), due: least };
    if reader.bytes(MAGIC.len()).map_err(short)? != MAGIC {
        return Err(StateError::Magic);
    }
    let version: u32 = reader.plain().map_err(short)?;
    if version != VERSION {
        return Err(StateError::Version { found: version });
    }
    let length: u32 = reader.plain().map_err(short)?;
    let due = usize::try_from(length).unwrap_or(usize::MAX).max(least);
    if bytes.len() != due {
        return Err(StateError::Length { found: bytes.len(), due });
    }
    let (signed, mac) = bytes.split_at(bytes.len() - MAC_BYTES);
    // Takes the same time wherever the first difference is.
    key.mac()?.chain_update(signed).verify_slice(mac).map_err(|_| StateError::Mac)?;

    let processor = Processor::decode(&mut reader)?;
    let memory_mib = reader.plain()?;
    let vcpus =
        u8::try_from(reader.plain::<u32>()?).map_err(|_| Malformed("it has too many vCPUs"))?;
    Ok((Header { processor, memory_mib, vcpus }, &signed[HEADER_BYTES..]))
}

/// Reads a state file whole.
///
/// # Errors
/// It is larger than any state, or reading fails.
pub fn read(file: &File) -> Result<Vec<u8>, StateError> {
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
pub fn write(file: &mut File, bytes: &[u8]) -> Result<(), StateError> {
    file.write_all(bytes).map_err(|source| StateError::File { operation: "write", source })
}

#[cfg(test)]
#[path = "state_test.rs"]
mod tests;
