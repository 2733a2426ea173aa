//! Templates: guests that were booted, warmed up and saved, to be copied in a fraction of the time
//! that a boot takes.
//!
//! ```text
//!   TEMPLATES/           $CHITIN_TEMPLATES, else $XDG_DATA_HOME/chitin/templates
//!     key                32 random bytes, mode 0600: the MAC key of all templates here
//!     NAME/
//!       template.json    the manifest, for people
//!       state            registers and devices, with a MAC (see `vmm/src/state/`)
//!       memory           guest memory, sparse; mapped copy-on-write by every copy
//!       seal             a MAC that ties `memory` to `state`
//! ```
//!
//! The MAC of the state is verified before anything in it is read. Memory is too large to be hashed
//! at every start, so the seal covers its identity instead: device, inode, size, and the times of
//! its last change. The last of these (`ctime`) cannot be set by any process. A memory file that
//! was written to, replaced or moved is refused.

// Above the other modules: it launches guests. Therefore nothing of it is re-exported here.
pub(crate) mod build;
mod error;
mod manifest;
pub(crate) mod restore;
mod store;

pub use error::TemplateError;
pub use manifest::Manifest;
pub use store::Templates;
pub(crate) use store::{KEY_BYTES, unix_seconds};
