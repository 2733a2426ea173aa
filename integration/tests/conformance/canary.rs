//! The search for values that must not be somewhere finds them where they are.

use std::fs;

use chitin_integration::{On, canary};

on_every_tier!(a_value_is_found_in_memory_in_a_file_and_on_a_command_line);

const CANARY: &str = "canary-b9e1c0a4d2";

/// What the workload makes of the secret is in its memory, and nowhere else.
const PROGRAM: &str = "
import os, sys
value = open(os.environ['TOKEN_FILE']).read()
control = 'control-' + value[::-1]
print(control, flush=True)
sys.stdin.read()
";

fn a_value_is_found_in_memory_in_a_file_and_on_a_command_line(on: On) {
    let run = |more: &str| {
        on.with("--secret TOKEN=env:TOKEN -- python3 -c")
            .args([PROGRAM, more])
            .env("TOKEN", CANARY)
            .spawn()
    };
    let mut running = run("");
    let control = running.line();
    let found = |search: &canary::Search, what: &str| {
        search.found.iter().any(|place| place.starts_with(what))
    };
    let search = canary::search(&running, CANARY, &control);
    assert!(search.control && found(&search, "memory of "), "{search:?}");
    assert!(!found(&search, "cmdline") && !found(&search, "environ"), "{search:?}");
    // It is in no file until it is put into one.
    canary::assert_unwritten(&running, CANARY);
    let planted = running.dir().join("planted");
    fs::write(&planted, format!("x{CANARY}")).unwrap();
    let search = canary::search(&running, CANARY, &control);
    assert!(found(&search, planted.to_str().unwrap()), "{search:?}");
    drop(running.child.stdin.take());
    assert_eq!(running.wait(), 0);
    running.assert_nothing_left();

    let mut running = run(CANARY);
    running.line();
    assert!(found(&canary::search(&running, CANARY, "x"), "cmdline of "));
    drop(running.child.stdin.take());
    assert_eq!(running.wait(), 0);
    running.assert_nothing_left();
}
