//! Templates: guests that were booted, warmed up and saved, to be copied in a fraction of the time
//! that a boot takes.
//!
//! ```text
//!   TEMPLATES/           $CHITIN_TEMPLATES, else $XDG_DATA_HOME/chitin/templates
//!     NAME/
//!       template.json    the manifest, and the identities of `memory` and `state`
//!       seal             a MAC over the bytes of `template.json`
//!       state            registers and devices, with a MAC (see `vmm/src/state/`)
//!       memory           guest memory, sparse; mapped copy-on-write by every copy
//!   KEYS/                $XDG_STATE_HOME/chitin/keys; /var/lib/chitin/keys for root
//!     templates.key      32 random bytes, mode 0600: the MAC key of all templates of a user
//! ```
//!
//! Everything that decides about protection is below one MAC: the seal is verified before a byte of
//! the manifest is parsed, and the manifest names the state by its MAC and the memory by its
//! identity, because it is too large to be hashed at every start: device, inode, size, and the
//! times of its last change. The last of these (`ctime`) cannot be set by any process.
//!
//! Every directory and file must belong to this user or to root and be writable for no other user,
//! and no link is followed ([`trusted_dir`]). The key is apart from the templates, so that a
//! process that can write to the one cannot read or replace the other.

// Above the other modules: it launches guests. Therefore nothing of it is re-exported here.
pub(crate) mod build;
mod draft;
mod error;
mod key;
mod manifest;
pub(crate) mod restore;
mod seal;
mod store;
mod trusted_dir;

pub use error::{Distrust, TemplateError};
pub(crate) use key::KEY_BYTES;
pub use manifest::Manifest;
pub(crate) use store::{OpenTemplate, unix_seconds};
pub use store::{TemplateList, Templates};
pub(crate) use trusted_dir::TrustedDir;
