//! Templates: sandboxes that were booted, warmed up and saved, to be copied in a fraction of the time a boot takes.
//!
//! ```text
//!   TEMPLATES/           $CHITIN_TEMPLATES, else $XDG_DATA_HOME/chitin/templates
//!     key                32 random bytes, mode 0600: what every template here is authenticated with
//!     NAME/
//!       template.json    what it is, for people
//!       state            registers and devices, with a MAC (see `vmm/src/state/`)
//!       memory           guest memory, sparse; mapped copy-on-write by every copy
//!       seal             a MAC that ties `memory` to `state`
//! ```
//!
//! The MAC of the state is verified before anything in it is read. Memory is too large to be hashed at every start, so
//! the seal covers its identity instead: device, inode, size, and the times of its last change, of which the last
//! (`ctime`) cannot be set by anybody. A memory file that was written to, replaced or moved is refused.
mod error;
mod manifest;
mod store;

pub use error::TemplateError;
pub use manifest::Manifest;
pub use store::Templates;
pub(crate) use store::{KEY_BYTES, binding, now};
