//! Which tier a sandbox gets. The first that was asked for, unless another one was named as acceptable.

use serde::Serialize;

use super::{Capabilities, Tier, Unavailable};
use crate::Error;
use crate::policy::Runtime;

/// The tier of a sandbox, and why it is that one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Chosen {
    /// The tier.
    pub tier: Runtime,
    /// What it is made of here.
    #[serde(flatten)]
    pub capabilities: Capabilities,
    /// Those that were asked for before it, and what each lacks.
    pub passed_over: Vec<PassedOver>,
}

/// A tier that would have been better.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PassedOver {
    /// The tier.
    pub tier: Runtime,
    /// Why it cannot be had.
    #[serde(flatten)]
    pub unavailable: Unavailable,
}

impl Chosen {
    /// The tier's name, with what it falls short of by: `nanoclaw/runc` has no kernel of its own.
    pub fn name(&self) -> String {
        match self.is_weakened() {
            true => format!("{}/{}", self.tier, self.capabilities.implementation),
            false => self.tier.to_string(),
        }
    }

    /// Whether its wall is weaker than its tier's, as gVisor's tier is without gVisor.
    pub fn is_weakened(&self) -> bool {
        self.tier == Runtime::Nanoclaw && !self.capabilities.implementation.starts_with("runsc")
    }

    /// Whether it is less than what was asked for, which is never to go unsaid.
    pub fn is_less(&self) -> bool {
        !self.passed_over.is_empty() || self.is_weakened()
    }

    /// Why it is this one, in a sentence.
    pub fn why(&self) -> String {
        if !self.is_less() {
            return "it is what was asked for".into();
        }
        let others = self.passed_over.iter();
        let mut reasons: Vec<_> = others
            .map(|other| format!("no {}: {}", other.tier, other.unavailable.reason))
            .collect();
        if self.is_weakened() {
            reasons.extend(self.capabilities.short_of.iter().cloned());
        }
        reasons.join("; ")
    }
}

/// The first of these that can be had.
pub(crate) async fn select(tiers: Vec<Box<dyn Tier>>) -> Result<(Box<dyn Tier>, Chosen), Error> {
    let mut passed_over = Vec::new();
    for tier in tiers {
        let kind = tier.kind();
        match tier.probe().await {
            Ok(capabilities) => {
                return Ok((tier, Chosen { tier: kind, capabilities, passed_over }));
            }
            Err(unavailable) => passed_over.push(PassedOver { tier: kind, unavailable }),
        }
    }
    let each: Vec<_> =
        passed_over.iter().map(|other| format!("{}: {}", other.tier, other.unavailable)).collect();
    Err(Error::NoTier { missing: each.join("; ") })
}
