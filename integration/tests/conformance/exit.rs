//! How a run ends: exit codes, signals, time limits, and that nothing outlives it.

use std::time::{Duration, Instant};

use chitin::TierKind;
use chitin_integration::{LIMIT, On};
use rustix::process::Signal;
use serde_json::Value;

on_every_tier!(
    exit_codes_are_kept,
    a_signal_that_ends_the_workload_is_128_and_its_number,
    what_cannot_be_started_is_126_or_127,
    a_workload_hears_the_signal_first,
    each_signal_that_means_the_end_ends_it,
    a_workload_that_will_not_hear_is_ended,
    nothing_survives_a_killed_cli,
    a_run_that_is_killed_while_it_starts_leaves_nothing,
    the_time_limit_ends_what_does_not_end,
    the_time_limit_ends_what_has_stopped_itself,
    a_reader_that_stopped_counts_against_the_time_limit,
    the_report_says_what_happened,
    the_report_of_a_failure_says_which,
);

fn exit_codes_are_kept(on: On) {
    for code in [0, 1, 7, 255] {
        assert_eq!(on.sh(&format!("exit {code}")).outcome().code, code);
    }
}

fn a_signal_that_ends_the_workload_is_128_and_its_number(on: On) {
    for number in [6, 9, 15] {
        let outcome = on.sh(&format!("kill -{number} $$")).outcome();
        assert_eq!((outcome.code, outcome.stderr.as_str()), (128 + number, ""));
    }
}

fn what_cannot_be_started_is_126_or_127(on: On) {
    for (command, code) in
        [("nosuch", 127), ("/nosuch/program", 127), ("/etc/passwd", 126), ("/usr/bin", 126)]
    {
        let outcome = on.run(command).outcome();
        assert_eq!(outcome.code, code, "{outcome:?}");
        assert!(
            outcome.stderr.starts_with(&format!("chitin: start {command} in the sandbox: ")),
            "{outcome:?}"
        );
        assert_eq!(outcome.stderr.lines().count(), 1, "{outcome:?}");
    }
}

fn a_workload_hears_the_signal_first(on: On) {
    let mut running =
        on.sh("trap 'echo bye; exit 9' TERM; echo up; while :; do sleep 0.1; done").spawn();
    assert_eq!(running.line(), "up");
    running.signal(Signal::TERM);
    assert_eq!(running.line(), "bye");
    assert_eq!(running.wait(), 9);
    running.assert_nothing_left();
}

fn each_signal_that_means_the_end_ends_it(on: On) {
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        let mut running = on.sh("echo up; exec sleep 600").spawn();
        assert_eq!(running.line(), "up");
        running.signal(signal);
        assert_eq!(running.wait(), 128 + signal.as_raw());
        running.assert_nothing_left();
    }
}

fn a_workload_that_will_not_hear_is_ended(on: On) {
    let mut running = on.sh("trap '' INT TERM; echo up; while :; do sleep 1; done").spawn();
    assert_eq!(running.line(), "up");
    running.signal(Signal::INT);
    assert_eq!(running.wait(), 130);
    running.assert_nothing_left();
}

fn nothing_survives_a_killed_cli(on: On) {
    let mut running = on.sh("echo up; sleep 600").spawn();
    assert_eq!(running.line(), "up");
    if on.tier == TierKind::Ironclaw {
        assert_eq!(running.processes().len(), 3, "chitin, its monitor, and the keeper of that");
    }
    running.signal(Signal::KILL);
    assert_eq!(running.wait(), 137);
    running.assert_nothing_left();
}

fn a_run_that_is_killed_while_it_starts_leaves_nothing(on: On) {
    for ms in [5, 40, 160, 320] {
        let mut running = on.run("sleep 600").spawn();
        std::thread::sleep(Duration::from_millis(ms));
        running.signal(Signal::KILL);
        running.wait();
        running.assert_nothing_left();
        // What could not be cleared up by the one that was killed, the next one clears.
        on.run("true").outcome().ok();
    }
}

fn the_time_limit_ends_what_does_not_end(on: On) {
    let outcome = on.with("--timeout 1s -- sleep 600").outcome();
    assert_eq!(outcome.code, 124);
    assert_eq!(outcome.stderr, "chitin: the time limit of 1 s was reached\n");
    // Also one that ignores whatever it is told, and never sleeps.
    let outcome = on
        .with("--timeout 20s -- sh -c")
        .arg("trap '' TERM INT HUP; while :; do :; done")
        .outcome();
    assert_eq!(outcome.code, 124);
}

fn the_time_limit_ends_what_has_stopped_itself(on: On) {
    let outcome =
        on.with("--timeout 15s -- sh -c").arg("echo up; kill -STOP $$; echo never").outcome();
    assert_eq!((outcome.code, outcome.text()), (124, "up"));
}

fn a_reader_that_stopped_counts_against_the_time_limit(on: On) {
    // One that talks without end, and one that has ended with what it said on its way.
    let scripts = ["yes", "head -c 200000 /dev/zero"];
    let started = Instant::now();
    let running = scripts.map(|script| on.with("--timeout 30s -- sh -c").arg(script).spawn());
    for mut running in running {
        assert_eq!(running.wait(), 124);
        running.assert_nothing_left();
    }
    assert!(started.elapsed() < LIMIT, "{:?}", started.elapsed());
}

fn report(on: On, options: &str, command: &[&str]) -> (i32, Value) {
    let dir = tempfile::tempdir().expect("create a directory");
    let path = dir.path().join("report.json");
    let outcome = on.with(options).arg("--report").arg(&path).arg("--").args(command).outcome();
    let report =
        std::fs::read(&path).unwrap_or_else(|error| panic!("no report: {error}: {outcome:?}"));
    (outcome.code, serde_json::from_slice(&report).expect("JSON"))
}

fn the_report_says_what_happened(on: On) {
    let (code, report) =
        report(on, "", &["python3", "-c", "x = b'x' * (8 << 20); raise SystemExit(3)"]);
    assert_eq!(code, 3);
    let name = report["tier"].as_str().expect("a tier");
    assert_eq!(name.split('/').next(), Some(on.tier.to_string().as_str()));
    let isolation = &report["isolation"];
    assert_eq!(isolation["why"], "it is the first choice");
    for key in ["implementation", "version"] {
        assert!(isolation[key].as_str().is_some_and(|text| !text.is_empty()), "{report}");
    }
    // Only what has no kernel of its own goes by a longer name.
    let engine = isolation["implementation"].as_str().and_then(|text| text.split('/').next());
    assert_eq!(name.contains('/'), matches!(engine, Some("crun" | "runc")), "{report}");
    assert_eq!((&report["exit_code"], &report["exit"]["code"]), (&3.into(), &3.into()));
    assert_eq!(report["error"], Value::Null);
    assert!(report["usage"]["max_rss_kib"].as_u64().is_some_and(|kib| kib > 4 << 10), "{report}");
    let phases = &report["phases"];
    let phase =
        |name: &str| phases[name].as_u64().unwrap_or_else(|| panic!("no {name} in {phases}"));
    assert!(phase("agent_ns") < phase("exit_ns"));
}

fn the_report_of_a_failure_says_which(on: On) {
    let (code, report) = report(on, "--timeout 1s", &["sleep", "600"]);
    assert_eq!((code, &report["exit_code"]), (124, &124.into()));
    assert_eq!(report["error"], "the time limit of 1 s was reached");
    assert_eq!(report["exit"], Value::Null);
}
