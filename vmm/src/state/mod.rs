//! The saved state of a microVM: everything but its memory.
//!
//! ```text
//!   0  "CHITINVM"      magic
//!   8  version, u32    of this layout; any other is refused
//!  12  length, u32     of the whole file
//!  16  processor       vendor (12 bytes), signature (u32), hash of its CPUID (u64 × 2)
//!  48  memory, u32     in MiB
//!  52  vcpus, u32
//!  56  payload         [`MachineState`]
//!  −32 HMAC-SHA256     of everything before it
//! ```
//!
//! A process that can write to the directory of a file can replace the file, and its contents
//! become registers and descriptors: only magic, version and length are looked at before the MAC
//! has been verified. The payload is bounded and checked all the same, because the saved guest
//! chose half of it.

mod error;
mod file;
mod key;
mod layout;
pub mod machine;
pub mod malformed;
pub mod processor;
pub mod vcpu;
pub mod wire;

pub use error::StateError;
pub use file::{Header, read_state_file, sign_state, verify_state, write_state_file};
pub use key::Key;
pub use layout::VERSION;
pub use machine::MachineState;
pub use malformed::Malformed;

#[cfg(test)]
#[path = "state_test.rs"]
mod tests;
