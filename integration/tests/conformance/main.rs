//! One suite for all tiers: what `chitin run` promises, whatever it runs in.
//!
//! A case is a function of the tier, and `on_every_tier!` makes a test of it for each. What only one tier has (a kernel of its
//! own, templates, a console) is in the other files beside this one.
#![allow(
    clippy::unwrap_used,
    reason = "a test ends at the first thing that is not as it should be"
)]

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
