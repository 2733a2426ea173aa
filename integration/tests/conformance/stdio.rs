//! Standard input, output and error.

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::thread;

use chitin_integration::{TierUnderTest, pseudo_random_bytes};
use sha2::{Digest, Sha256};

on_every_tier!(
    sixteen_mebibytes_of_stdin_arrive_intact,
    binary_data_round_trips_unchanged,
    stdout_and_stderr_are_separate,
    stdout_and_stderr_flow_concurrently,
    stderr_preserves_binary_data,
    output_is_passed_unmodified,
    empty_stdin_is_end_of_file,
    stdin_is_streamed_not_buffered,
    unread_stdin_does_not_delay_exit,
    closed_stdout_stops_workload,
    slow_reader_loses_no_output,
    background_process_does_not_delay_exit,
    standard_streams_are_not_terminals,
    loop_that_reads_runs_once_for_each_line,
    standard_streams_can_be_opened_by_path,
);

fn loop_that_reads_runs_once_for_each_line(tier: TierUnderTest) {
    let script = "printf '1\\n2\\n' | while read line; do \"$@\" $line; done";
    let loop_of_runs = ["sh", "-c", script, "sh"].map(OsStr::new);
    let run = tier.run_with("--no-stdin -- echo").run_through(&loop_of_runs);
    assert_eq!(run.outcome().assert_success(), "1\n2");
}

fn sixteen_mebibytes_of_stdin_arrive_intact(tier: TierUnderTest) {
    let data = pseudo_random_bytes(16 << 20);
    let expected = format!("{:x}  -", Sha256::digest(&data));
    assert_eq!(tier.run("sha256sum").stdin(data).outcome().assert_success(), expected);
}

fn binary_data_round_trips_unchanged(tier: TierUnderTest) {
    let data: Vec<u8> = (0..=255u8).cycle().take(1 << 20).collect();
    let outcome = tier.run("cat").stdin(data.clone()).outcome();
    assert!(outcome.code == 0 && outcome.stdout == data, "{} bytes", outcome.stdout.len());
}

fn stdout_and_stderr_are_separate(tier: TierUnderTest) {
    let outcome = tier.run_sh("echo out; echo err >&2").outcome();
    assert_eq!((outcome.assert_success(), outcome.stderr.as_str()), ("out", "err\n"));
}

fn stdout_and_stderr_flow_concurrently(tier: TierUnderTest) {
    let script = "yes out | head -c 3000000 & yes err | head -c 3000000 >&2; wait";
    let outcome = tier.run_sh(script).outcome();
    assert_eq!(
        (outcome.code, outcome.stdout.len(), outcome.stderr.len()),
        (0, 3_000_000, 3_000_000)
    );
    assert!(outcome.stdout.chunks(4).all(|line| line == b"out\n"));
    assert!(outcome.stderr.as_bytes().chunks(4).all(|line| line == b"err\n"));
}

fn stderr_preserves_binary_data(tier: TierUnderTest) {
    let mut running = tier.run_sh("exec cat >&2").spawn();
    let data: Vec<u8> = (0..=255u8).cycle().take(100_000).collect();
    let mut stdin = running.child.stdin.take().expect("stdin is piped");
    let written = data.clone();
    let writer = thread::spawn(move || stdin.write_all(&written));
    let mut seen = Vec::new();
    running
        .child
        .stderr
        .take()
        .expect("stderr is piped")
        .read_to_end(&mut seen)
        .expect("read stderr");
    writer.join().expect("write stdin").expect("write stdin");
    assert_eq!(running.wait(), 0);
    assert!(seen == data, "{} bytes", seen.len());
}

fn output_is_passed_unmodified(tier: TierUnderTest) {
    assert_eq!(tier.run("printf x").outcome().stdout, b"x");
    let silent = tier.run("true").outcome();
    assert_eq!((silent.code, silent.stdout.len(), silent.stderr.as_str()), (0, 0, ""));
}

fn empty_stdin_is_end_of_file(tier: TierUnderTest) {
    assert_eq!(tier.run("wc -c").outcome().assert_success(), "0");
}

fn stdin_is_streamed_not_buffered(tier: TierUnderTest) {
    let mut running = tier.run("cat").spawn();
    for word in ["one", "two"] {
        let stdin = running.child.stdin.as_mut().expect("stdin is piped");
        writeln!(stdin, "{word}").expect("write stdin");
        assert_eq!(running.read_line(), word);
    }
    drop(running.child.stdin.take());
    assert_eq!(running.wait(), 0);
    running.assert_no_process_left();
}

fn unread_stdin_does_not_delay_exit(tier: TierUnderTest) {
    let outcome = tier.run_sh("head -c 3; exit 5").stdin(pseudo_random_bytes(8 << 20)).outcome();
    assert_eq!((outcome.code, outcome.stdout.len()), (5, 3));
}

fn closed_stdout_stops_workload(tier: TierUnderTest) {
    let mut running = tier.run("yes").spawn();
    assert_eq!(running.read_line(), "y");
    drop(running.child.stdout.take());
    assert_eq!(running.wait(), 141);
    running.assert_no_process_left();
}

fn slow_reader_loses_no_output(tier: TierUnderTest) {
    let mut running = tier.run_sh("head -c 2000000 /dev/zero; echo end").spawn();
    // The output exceeds all buffers on its way, and the pause lets the workload fill them.
    thread::sleep(std::time::Duration::from_secs(2));
    let mut seen = Vec::new();
    running
        .child
        .stdout
        .take()
        .expect("stdout is piped")
        .read_to_end(&mut seen)
        .expect("read stdout");
    assert_eq!(running.wait(), 0);
    assert!(seen.len() == 2_000_004 && seen.ends_with(b"\0end\n"), "{} bytes", seen.len());
}

fn background_process_does_not_delay_exit(tier: TierUnderTest) {
    assert_eq!(tier.run_sh("sleep 600 & echo done").outcome().assert_success(), "done");
}

fn standard_streams_are_not_terminals(tier: TierUnderTest) {
    assert_eq!(
        tier.run_sh("for fd in 0 1 2; do test -t $fd && echo $fd; done; echo none")
            .outcome()
            .assert_success(),
        "none"
    );
}

fn standard_streams_can_be_opened_by_path(tier: TierUnderTest) {
    let outcome = tier.run_sh("echo hi > /dev/stderr; echo ho > /dev/stdout").outcome();
    assert_eq!((outcome.assert_success(), outcome.stderr.as_str()), ("ho", "hi\n"));
    let outcome = tier.run("python3 /dev/stdin").stdin("print(1)\n").outcome();
    assert_eq!(outcome.assert_success(), "1");
    let outcome = tier.run_sh("tee /dev/stderr").stdin("both").outcome();
    assert_eq!((outcome.assert_success(), outcome.stderr.as_str()), ("both", "both"));
}
