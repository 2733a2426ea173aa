//! One suite for all tiers: what `chitin run` promises, whatever it runs in.
//!
//! A case is a function of the tier, and `on_every_tier!` makes a test of it for each. What only one tier has (a kernel of its
//! own, templates, a console) is in the other files beside this one.
#![allow(clippy::unwrap_used, reason = "a test ends at the first thing that is not as it should be")]

/// Tests of these cases: `ironclaw::CASE`, `nanoclaw::CASE`, `nemoclaw::CASE`.
macro_rules! on_every_tier {
    ($($case:ident),+ $(,)?) => {
        on_every_tier!(@ironclaw, Ironclaw, $($case),+);
        on_every_tier!(@nanoclaw, Nanoclaw, $($case),+);
        on_every_tier!(@nemoclaw, Nemoclaw, $($case),+);
    };
    (@$name:ident, $tier:ident, $($case:ident),+) => {
        mod $name {
            $(
                #[test]
                fn $case() {
                    chitin_integration::On { tier: chitin::Runtime::$tier }.check(super::$case);
                }
            )+
        }
    };
}

mod egress;
mod environment;
mod exit;
mod files;
mod isolation;
mod limits;
mod many;
mod policy;
mod secrets;
mod stdio;
