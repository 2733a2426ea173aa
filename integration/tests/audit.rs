//! What is promised holds under attack.

use chitin_integration::chitin;

#[test]
fn every_promise_of_a_microvm_holds() {
    let outcome = chitin("audit --verbose --memory 128").outcome();
    let text = outcome.ok();
    let held = text.lines().filter(|line| line.contains(" held ")).count();
    assert_eq!(held, 18, "{text}");
    // The attacks were made: these two say what they saw.
    assert!(text.contains("CapEff 0000000000000400") && text.contains("processes, then EAGAIN"), "{text}");
}
