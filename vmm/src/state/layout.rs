//! The layout of a state file, drawn in [`state`](super).

/// The first bytes of a state file.
pub(super) const MAGIC: &[u8; 8] = b"CHITINVM";

/// The version of the layout. It goes up with every change of the contents, also where KVM's
/// structures or the devices change.
pub const VERSION: u32 = 1;

pub(super) const HEADER_BYTES: usize = 56;
pub(super) const MAC_BYTES: usize = 32;

/// The largest state: eight vCPUs with all of their extended state take 50 KiB, the list of memory
/// a few more.
pub(super) const MAX_STATE_BYTES: usize = 256 * 1024;
