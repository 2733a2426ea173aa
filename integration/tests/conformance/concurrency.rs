//! Many concurrent runs.

use std::io::Write;

use chitin_integration::{Running, TierUnderTest};
use rustix::process::Signal;

on_every_tier!(twenty_concurrent_runs_are_independent);

/// The sandboxes are small, so that twenty fit into one emulated host. Even ones exit, odd ones get
/// a signal.
fn twenty_concurrent_runs_are_independent(tier: TierUnderTest) {
    let script = "read own; echo $own > f; echo up; \
                  read again; test $again = $(cat f) && echo $own; exit $own";
    let mut all: Vec<_> =
        (0..20).map(|_| tier.run_with("--memory 64 -- sh -c").arg(script).spawn()).collect();
    for (number, running) in all.iter_mut().enumerate() {
        write_number(running, number);
    }
    for running in &mut all {
        assert_eq!(running.read_line(), "up");
    }
    for (number, running) in all.iter_mut().enumerate() {
        if number % 2 == 0 {
            write_number(running, number);
        } else {
            running.send_signal(Signal::TERM);
        }
    }
    for (number, mut running) in all.into_iter().enumerate() {
        let number = i32::try_from(number).expect("a small number");
        let even = number % 2 == 0;
        assert_eq!(running.read_line(), if even { number.to_string() } else { String::new() });
        assert_eq!(running.wait(), if even { number } else { 143 });
        running.assert_no_process_left();
    }
}

fn write_number(running: &mut Running, number: usize) {
    let stdin = running.child.stdin.as_mut().expect("stdin is piped");
    writeln!(stdin, "{number}").expect("write stdin");
}
