//! The policy file, which a caller may take from a third party: YAML, specification, explanation.
#![no_main]

use chitin_policy::{Policy, PolicyError};
use chitin_spec::{Boundary, TierKind};
use chitin_text::is_invisible;
use libfuzzer_sys::fuzz_target;

/// The most bytes of an explanation: each byte of a policy can be escaped, and is repeated for some
/// tiers; the sentences around it take a few KiB.
fn max_explanation(text: &str) -> usize {
    32 * text.len() + (64 << 10)
}

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let policy = match Policy::parse(text, "policy.yaml") {
        Ok(policy) => policy,
        Err(error) => {
            let PolicyError::Invalid { location, message, .. } = &error else {
                panic!("an error of the text: {error:?}");
            };
            let lines = text.split(['\n', '\r']).count();
            assert!((1..=lines + 1).contains(&location.line), "{location} of {lines} lines");
            assert!(message.len() <= text.len() * 8 + 1024, "{} bytes", message.len());
            return;
        }
    };
    let explanation = policy.explain();
    assert!(explanation.len() <= max_explanation(text), "{} bytes", explanation.len());
    let is_unsafe = |c| c != '\n' && (char::is_control(c) || is_invisible(c));
    assert!(!explanation.contains(is_unsafe), "{explanation:?}");
    assert!(policy.tiers().count() <= TierKind::ALL.len());
    for tier in TierKind::ALL {
        let _ = policy.check_tier(tier);
    }
    for boundary in [Boundary::Kvm, Boundary::Gvisor, Boundary::Namespaces] {
        let _ = policy.confine(1, boundary);
    }
    // Nothing of the host is used without the caller's word.
    let uses = policy.host_uses();
    assert_eq!(policy.check_consent(&[], &[]).is_ok(), uses.is_empty());
    assert_eq!(Policy::parse(text, "policy.yaml").ok(), Some(policy));
});
