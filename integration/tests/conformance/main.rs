//! The promises of `chitin run`, tested on all tiers.
//!
//! A case is a function of the tier, and `on_every_tier!` makes a test of it for each. Features of
//! one tier (a separate kernel, templates, a console) are tested in the other files of `tests/`.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[macro_use(on_every_tier)]
extern crate chitin_integration;

mod aws_credentials;
mod canary;
mod concurrency;
mod environment;
mod exit;
mod files;
mod isolation;
mod limits;
mod policy;
mod secrets;
mod stdio;
