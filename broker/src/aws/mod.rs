//! Keys of AWS, which its SDKs fetch from an address in the sandbox.

pub(crate) mod keys;
mod server;

pub(crate) use server::Outcome;
pub use server::{AwsCredentialServer, PORT};
