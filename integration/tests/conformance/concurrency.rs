//! Many at once.

use std::io::Write;

use chitin_integration::{On, Running};
use rustix::process::Signal;

on_every_tier!(twenty_at_once_are_twenty);

/// Each is small, so that they fit into one emulated host. The even ones end by themselves, the others are ended.
fn twenty_at_once_are_twenty(on: On) {
    let script = "read own; echo $own > f; echo up; read again; test $again = $(cat f) && echo $own; exit $own";
    let mut all: Vec<_> =
        (0..20).map(|_| on.with("--memory 64 -- sh -c").arg(script).spawn()).collect();
    for (number, running) in all.iter_mut().enumerate() {
        say(running, number);
    }
    for running in &mut all {
        assert_eq!(running.line(), "up");
    }
    for (number, running) in all.iter_mut().enumerate() {
        if number % 2 == 0 {
            say(running, number);
        } else {
            running.signal(Signal::TERM);
        }
    }
    for (number, mut running) in all.into_iter().enumerate() {
        let number = i32::try_from(number).expect("a small number");
        let even = number % 2 == 0;
        assert_eq!(running.line(), if even { number.to_string() } else { String::new() });
        assert_eq!(running.wait(), if even { number } else { 143 });
        running.assert_nothing_left();
    }
}

fn say(running: &mut Running, number: usize) {
    let stdin = running.child.stdin.as_mut().expect("stdin is piped");
    writeln!(stdin, "{number}").expect("write stdin");
}
