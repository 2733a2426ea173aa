//! The end of a run: exit codes, signals, time limits, and no process left behind.

use std::ffi::OsStr;
use std::io::Write;
use std::time::{Duration, Instant};

use chitin::TierKind;
use chitin_integration::{LIMIT, TierUnderTest};
use rustix::process::Signal;
use serde_json::Value;

on_every_tier!(
    exit_code_is_passed_through,
    fatal_signal_exits_with_128_plus_number,
    unstartable_command_exits_with_126_or_127,
    workload_receives_signal_before_shutdown,
    termination_signals_end_run,
    workload_ignoring_signals_is_killed,
    ignored_signals_stay_ignored,
    reader_of_notices_may_be_gone,
    no_process_survives_killed_cli,
    run_killed_during_start_leaves_nothing,
    timeout_ends_endless_workload,
    timeout_ends_stopped_workload,
    stalled_reader_counts_against_timeout,
    report_describes_the_run,
    report_contains_failure_reason,
    exit_causes_without_a_limit_are_reported,
);

fn exit_code_is_passed_through(tier: TierUnderTest) {
    for code in [0, 1, 7, 255] {
        assert_eq!(tier.run_sh(&format!("exit {code}")).outcome().code, code);
    }
}

fn fatal_signal_exits_with_128_plus_number(tier: TierUnderTest) {
    for number in [6, 9, 15] {
        let outcome = tier.run_sh(&format!("kill -{number} $$")).outcome();
        assert_eq!((outcome.code, outcome.stderr.as_str()), (128 + number, ""));
    }
}

fn unstartable_command_exits_with_126_or_127(tier: TierUnderTest) {
    for (command, code) in
        [("nosuch", 127), ("/nosuch/program", 127), ("/etc/passwd", 126), ("/usr/bin", 126)]
    {
        let outcome = tier.run(command).outcome();
        assert_eq!(outcome.code, code, "{outcome:?}");
        assert!(
            outcome.stderr.starts_with(&format!("chitin: start {command} in the sandbox: ")),
            "{outcome:?}"
        );
        assert_eq!(outcome.stderr.lines().count(), 1, "{outcome:?}");
    }
}

fn workload_receives_signal_before_shutdown(tier: TierUnderTest) {
    let mut running =
        tier.run_sh("trap 'echo bye; exit 9' TERM; echo up; while :; do sleep 0.1; done").spawn();
    assert_eq!(running.read_line(), "up");
    running.send_signal(Signal::TERM);
    assert_eq!(running.read_line(), "bye");
    assert_eq!(running.wait(), 9);
    running.assert_no_process_left();
}

fn termination_signals_end_run(tier: TierUnderTest) {
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        let mut running = tier.run_sh("echo up; exec sleep 600").spawn();
        assert_eq!(running.read_line(), "up");
        running.send_signal(signal);
        assert_eq!(running.wait(), 128 + signal.as_raw());
        running.assert_no_process_left();
    }
}

fn workload_ignoring_signals_is_killed(tier: TierUnderTest) {
    let mut running = tier.run_sh("trap '' INT TERM; echo up; while :; do sleep 1; done").spawn();
    assert_eq!(running.read_line(), "up");
    running.send_signal(Signal::INT);
    assert_eq!(running.wait(), 130);
    running.assert_no_process_left();
}

fn ignored_signals_stay_ignored(tier: TierUnderTest) {
    // As nohup, and the background of a shell without job control.
    let ignore = ["sh", "-c", "trap '' HUP INT; exec \"$@\"", "sh"].map(OsStr::new);
    let workload = "echo up; read line; echo \"$line\"; exit 7";
    let mut running = tier.run_sh(workload).run_through(&ignore).spawn();
    assert_eq!(running.read_line(), "up");
    for signal in [Signal::HUP, Signal::INT] {
        running.send_signal(signal);
    }
    std::thread::sleep(Duration::from_millis(500));
    let mut stdin = running.child.stdin.take().unwrap();
    stdin.write_all(b"still here\n").unwrap();
    assert_eq!(running.read_line(), "still here");
    assert_eq!(running.wait(), 7);
}

fn reader_of_notices_may_be_gone(tier: TierUnderTest) {
    let script = "exec \"$@\" 2>&1 | head -n 1";
    let closing = ["bash", "-o", "pipefail", "-c", script, "bash"].map(OsStr::new);
    let started = Instant::now();
    let mut run = tier.run_with("--timeout 15s -- sh -c").arg("echo ready; sleep 60");
    run = run.run_through(&closing);
    let outcome = run.outcome();
    assert_eq!((outcome.code, outcome.stdout_text()), (124, "ready"), "{outcome:?}");
    assert!(started.elapsed() < Duration::from_secs(60));
}

fn no_process_survives_killed_cli(tier: TierUnderTest) {
    let mut running = tier.run_sh("echo up; sleep 600").spawn();
    assert_eq!(running.read_line(), "up");
    if tier.kind == TierKind::Ironclaw {
        assert_eq!(running.list_processes().len(), 3, "chitin, the supervisor and the monitor");
    }
    running.send_signal(Signal::KILL);
    assert_eq!(running.wait(), 137);
    running.assert_no_process_left();
}

fn run_killed_during_start_leaves_nothing(tier: TierUnderTest) {
    for ms in [5, 40, 160, 320] {
        let mut running = tier.run("sleep 600").spawn();
        std::thread::sleep(Duration::from_millis(ms));
        running.send_signal(Signal::KILL);
        running.wait();
        running.assert_no_process_left();
        // The next run cleans up after the killed one.
        tier.run("true").outcome().assert_success();
    }
}

fn timeout_ends_endless_workload(tier: TierUnderTest) {
    let outcome = tier.run_with("--timeout 1s -- sleep 600").outcome();
    assert_eq!(outcome.code, 124);
    assert_eq!(outcome.stderr, "chitin: the time limit of 1 s was reached\n");
    // A workload that ignores signals and never sleeps.
    let outcome = tier
        .run_with("--timeout 20s -- sh -c")
        .arg("trap '' TERM INT HUP; while :; do :; done")
        .outcome();
    assert_eq!(outcome.code, 124);
}

fn timeout_ends_stopped_workload(tier: TierUnderTest) {
    let outcome =
        tier.run_with("--timeout 15s -- sh -c").arg("echo up; kill -STOP $$; echo never").outcome();
    assert_eq!((outcome.code, outcome.stdout_text()), (124, "up"));
}

fn stalled_reader_counts_against_timeout(tier: TierUnderTest) {
    // An endless writer, and a workload that has ended with its output in transit.
    let scripts = ["yes", "head -c 200000 /dev/zero"];
    let started = Instant::now();
    let running = scripts.map(|script| tier.run_with("--timeout 30s -- sh -c").arg(script).spawn());
    for mut running in running {
        assert_eq!(running.wait(), 124);
        running.assert_no_process_left();
    }
    assert!(started.elapsed() < LIMIT, "{:?}", started.elapsed());
}

fn report_describes_the_run(tier: TierUnderTest) {
    let command = ["--", "python3", "-c", "x = b'x' * (8 << 20); raise SystemExit(3)"];
    let (outcome, report) = tier.run_with("").outcome_with_json("--report", &command);
    assert_eq!(outcome.code, 3);
    let name = report["tier"].as_str().expect("a tier");
    assert_eq!(name.split('/').next(), Some(tier.kind.to_string().as_str()));
    let isolation = &report["isolation"];
    assert_eq!(isolation["why"], "it is the first choice");
    for key in ["implementation", "version"] {
        assert!(isolation[key].as_str().is_some_and(|text| !text.is_empty()), "{report}");
    }
    // The name includes the engine only for a tier without a separate kernel.
    let engine = isolation["implementation"].as_str().and_then(|text| text.split('/').next());
    assert_eq!(name.contains('/'), matches!(engine, Some("crun" | "runc")), "{report}");
    assert_eq!((&report["exit_code"], &report["exit"]["code"]), (&3.into(), &3.into()));
    assert_eq!((&report["cause"], &report["error"]), (&"exit".into(), &Value::Null));
    assert!(report["usage"]["max_rss_kib"].as_u64().is_some_and(|kib| kib > 4 << 10), "{report}");
    let phases = &report["phases"];
    let phase =
        |name: &str| phases[name].as_u64().unwrap_or_else(|| panic!("no {name} in {phases}"));
    assert!(phase("agent_ns") < phase("exit_ns"));
}

fn report_contains_failure_reason(tier: TierUnderTest) {
    let run = tier.run_with("--timeout 1s");
    let (outcome, report) = run.outcome_with_json("--report", &["--", "sleep", "600"]);
    assert_eq!((outcome.code, &report["exit_code"]), (124, &124.into()));
    assert_eq!(report["cause"], "time_limit");
    assert_eq!(report["error"], "the time limit of 1 s was reached");
    assert_eq!(report["exit"], Value::Null);
}

fn exit_causes_without_a_limit_are_reported(tier: TierUnderTest) {
    for (command, code, cause) in [
        (["sh", "-c", "kill -SEGV $$"], 139, "signal"),
        (["sh", "-c", "kill -KILL $$"], 137, "signal"),
        (["/nosuch", "", ""], 127, "not_started"),
    ] {
        let command = [&["--"], command.as_slice()].concat();
        let (outcome, report) = tier.run_with("").outcome_with_json("--report", &command);
        assert_eq!((outcome.code, &report["cause"]), (code, &cause.into()), "{outcome:?}");
        assert!(!outcome.stderr.contains("out of"), "{outcome:?}");
    }
}
