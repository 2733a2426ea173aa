//! The resolver of the sandbox.

pub mod message;
