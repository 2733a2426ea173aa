//! The canary search finds values in memory, in files and on command lines.

use std::fs;

use chitin_integration::{TierUnderTest, canary};

on_every_tier!(canary_search_finds_planted_values);

const CANARY: &str = "canary-b9e1c0a4d2";

/// Derives a control text from the secret, which is in the workload's memory only.
const PROGRAM: &str = "
import os, sys
value = open(os.environ['TOKEN_FILE']).read()
control = 'control-' + value[::-1]
print(control, flush=True)
sys.stdin.read()
";

fn canary_search_finds_planted_values(tier: TierUnderTest) {
    let run = |more: &str| {
        tier.run_with("--secret TOKEN=env:TOKEN -- python3 -c")
            .args([PROGRAM, more])
            .env("TOKEN", CANARY)
            .spawn()
    };
    let mut running = run("");
    let control = running.read_line();
    let found = |search: &canary::Search, place: &str| {
        search.found.iter().any(|found| found.starts_with(place))
    };
    let search = canary::search_run(&running, CANARY, &control);
    assert!(search.control && found(&search, "memory of "), "{search:?}");
    assert!(!found(&search, "cmdline") && !found(&search, "environ"), "{search:?}");
    // The value is in no file until the test writes one.
    canary::assert_unwritten(&running, CANARY);
    let planted = running.dir().join("planted");
    fs::write(&planted, format!("x{CANARY}")).unwrap();
    let search = canary::search_run(&running, CANARY, &control);
    assert!(found(&search, planted.to_str().unwrap()), "{search:?}");
    drop(running.child.stdin.take());
    assert_eq!(running.wait(), 0);
    running.assert_no_process_left();

    let mut running = run(CANARY);
    running.read_line();
    assert!(found(&canary::search_run(&running, CANARY, "x"), "cmdline of "));
    drop(running.child.stdin.take());
    assert_eq!(running.wait(), 0);
    running.assert_no_process_left();
}
