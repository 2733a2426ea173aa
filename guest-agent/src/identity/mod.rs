//! The identity of a restored sandbox.

pub mod reseed;
