//! A server of AWS credentials: SDKs in the sandbox request them as they do in a cloud.
//!
//! | file | contents |
//! |---|---|
//! | `server` | HTTP, and the container credentials of ECS |
//! | `imds` | the instance metadata service, version 2 |
//! | `cache` | the keys, read again from their source |
//! | `keys` | the document that SDKs read |

mod cache;
mod imds;
mod keys;
mod server;

pub(crate) use keys::AwsKeys;
pub use keys::AwsKeysError;
pub(crate) use server::Outcome;
pub use server::{AwsCredentialServer, PORT};
