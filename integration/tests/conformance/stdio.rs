//! Standard input, output and error.

use std::io::{Read, Write};
use std::thread;

use chitin_integration::On;
use sha2::{Digest, Sha256};

on_every_tier!(
    sixteen_mebibytes_go_in_unharmed,
    binary_data_comes_back_as_it_went,
    output_and_errors_are_told_apart,
    both_outputs_flow_at_once,
    errors_are_as_binary_as_output,
    nothing_is_added_to_what_is_said,
    an_empty_input_is_an_end_of_file,
    input_is_streamed_not_collected,
    input_that_nobody_reads_holds_nothing_up,
    a_reader_that_leaves_stops_the_workload,
    a_reader_that_is_slow_misses_nothing,
    a_background_process_does_not_hold_the_run,
    the_standard_streams_are_no_terminal,
);

fn noise(length: u32) -> Vec<u8> {
    (0..length).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

fn sixteen_mebibytes_go_in_unharmed(on: On) {
    let data = noise(16 << 20);
    let expected = format!("{:x}  -", Sha256::digest(&data));
    assert_eq!(on.run("sha256sum").stdin(data).outcome().ok(), expected);
}

fn binary_data_comes_back_as_it_went(on: On) {
    let data: Vec<u8> = (0..=255u8).cycle().take(1 << 20).collect();
    let outcome = on.run("cat").stdin(data.clone()).outcome();
    assert!(outcome.code == 0 && outcome.stdout == data, "{} bytes", outcome.stdout.len());
}

fn output_and_errors_are_told_apart(on: On) {
    let outcome = on.sh("echo out; echo err >&2").outcome();
    assert_eq!((outcome.ok(), outcome.stderr.as_str()), ("out", "err\n"));
}

fn both_outputs_flow_at_once(on: On) {
    let script = "yes out | head -c 3000000 & yes err | head -c 3000000 >&2; wait";
    let outcome = on.sh(script).outcome();
    assert_eq!(
        (outcome.code, outcome.stdout.len(), outcome.stderr.len()),
        (0, 3_000_000, 3_000_000)
    );
    assert!(outcome.stdout.chunks(4).all(|line| line == b"out\n"));
    assert!(outcome.stderr.as_bytes().chunks(4).all(|line| line == b"err\n"));
}

fn errors_are_as_binary_as_output(on: On) {
    let mut running = on.sh("exec cat >&2").spawn();
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

fn nothing_is_added_to_what_is_said(on: On) {
    assert_eq!(on.run("printf x").outcome().stdout, b"x");
    let silent = on.run("true").outcome();
    assert_eq!((silent.code, silent.stdout.len(), silent.stderr.as_str()), (0, 0, ""));
}

fn an_empty_input_is_an_end_of_file(on: On) {
    assert_eq!(on.run("wc -c").outcome().ok(), "0");
}

fn input_is_streamed_not_collected(on: On) {
    let mut running = on.run("cat").spawn();
    for word in ["one", "two"] {
        let stdin = running.child.stdin.as_mut().expect("stdin is piped");
        writeln!(stdin, "{word}").expect("write stdin");
        assert_eq!(running.line(), word);
    }
    drop(running.child.stdin.take());
    assert_eq!(running.wait(), 0);
    running.assert_nothing_left();
}

fn input_that_nobody_reads_holds_nothing_up(on: On) {
    let outcome = on.sh("head -c 3; exit 5").stdin(noise(8 << 20)).outcome();
    assert_eq!((outcome.code, outcome.stdout.len()), (5, 3));
}

fn a_reader_that_leaves_stops_the_workload(on: On) {
    let mut running = on.run("yes").spawn();
    assert_eq!(running.line(), "y");
    drop(running.child.stdout.take());
    assert_eq!(running.wait(), 141);
    running.assert_nothing_left();
}

fn a_reader_that_is_slow_misses_nothing(on: On) {
    let mut running = on.sh("head -c 2000000 /dev/zero; echo end").spawn();
    // More than any buffer on the way holds, long enough for the workload to have met the end of them.
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

fn a_background_process_does_not_hold_the_run(on: On) {
    assert_eq!(on.sh("sleep 600 & echo done").outcome().ok(), "done");
}

fn the_standard_streams_are_no_terminal(on: On) {
    assert_eq!(
        on.sh("for fd in 0 1 2; do test -t $fd && echo $fd; done; echo none").outcome().ok(),
        "none"
    );
}
