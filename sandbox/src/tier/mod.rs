//! How a sandbox is isolated. A tier is anything that returns a byte stream to an agent; all the rest is written
//! once, above it.

pub(crate) mod ironclaw;
