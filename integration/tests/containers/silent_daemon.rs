//! A daemon that stops answering, at every step of a run: the time limit and signals hold, and what
//! may be left is named.

use std::thread;
use std::time::{Duration, Instant};

use chitin::TierKind;
use chitin_integration::{Dockerd, Running, TierUnderTest, docker};
use rustix::process::Signal;

use crate::fake_daemon::{Failure, FakeDaemon, Step};

const TIER: TierUnderTest = TierUnderTest::new(TierKind::Nemoclaw);

/// The time limit of a run, and the time after which it must have ended.
const LIMIT: &str = "--timeout 2s -- sleep 60";
const LIMIT_END: Duration = Duration::from_secs(4);

/// Time within which a run ends after a signal.
const SIGNAL_END: Duration = Duration::from_secs(1);

/// Time for starting processes on a loaded machine.
const SLACK: Duration = Duration::from_secs(1);

fn start_run(host: &str, options: &str) -> Running {
    TIER.run_with(options).env("DOCKER_HOST", host).spawn()
}

/// Waits for the end of a run. Returns its code and the time since `begun`.
fn wait_for_run(mut run: Running, begun: Instant) -> (i32, Duration, String) {
    let code = run.wait();
    let elapsed = begun.elapsed();
    (code, elapsed, run.read_stderr())
}

mod nemoclaw {
    use super::*;

    #[test]
    fn time_limit_holds_at_every_silent_step() {
        for step in Step::ALL {
            let daemon = FakeDaemon::start(step, Failure::Silence);
            let begun = Instant::now();
            let (code, elapsed, stderr) = wait_for_run(start_run(&daemon.host(), LIMIT), begun);
            assert_eq!(code, 124, "{step:?}: {stderr}");
            assert!(elapsed < LIMIT_END + SLACK, "{step:?}: {elapsed:?}: {stderr}");
            let created =
                matches!(step, Step::CreateAgain | Step::Attach | Step::Start | Step::Agent);
            assert!(
                !created || stderr.contains("could not remove the container"),
                "{step:?}: {stderr}"
            );
        }
    }

    #[test]
    fn signals_end_run_at_every_silent_step() {
        for step in Step::ALL {
            for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
                let daemon = FakeDaemon::start(step, Failure::Silence);
                let run = start_run(&daemon.host(), "-- sleep 60");
                thread::sleep(Duration::from_millis(1500));
                let begun = Instant::now();
                run.send_signal(signal);
                let (found, elapsed, stderr) = wait_for_run(run, begun);
                assert_eq!(found, code, "{step:?}: {stderr}");
                assert!(elapsed < SIGNAL_END + SLACK, "{step:?}: {elapsed:?}: {stderr}");
            }
        }
    }

    #[test]
    fn broken_response_ends_run_at_every_step() {
        for step in Step::ALL {
            let daemon = FakeDaemon::start(step, Failure::Reset);
            let begun = Instant::now();
            let run = start_run(&daemon.host(), "-- sleep 60");
            let (code, elapsed, stderr) = wait_for_run(run, begun);
            assert_eq!(code, 125, "{step:?}: {stderr}");
            assert!(elapsed < LIMIT_END + SLACK, "{step:?}: {elapsed:?}: {stderr}");
        }
    }

    #[test]
    fn stopped_dockerd_holds_up_neither_limit_nor_signal() {
        let dockerd = Dockerd::start().expect("start dockerd");
        TIER.run("true").env("DOCKER_HOST", dockerd.host()).outcome().assert_success();
        for (options, signal, code) in [
            ("--timeout 5s -- sh -c", None, 124),
            ("-- sh -c", Some(Signal::INT), 130),
            ("-- sh -c", Some(Signal::TERM), 143),
        ] {
            let mut run = TIER
                .run_with(options)
                .arg("echo up; exec sleep 60")
                .env("DOCKER_HOST", dockerd.host())
                .spawn();
            let mut begun = Instant::now();
            assert_eq!(run.read_line(), "up");
            dockerd.suspend();
            let mut limit = Duration::from_secs(7);
            if let Some(signal) = signal {
                (begun, limit) = (Instant::now(), SIGNAL_END);
                run.send_signal(signal);
            }
            let (found, elapsed, stderr) = wait_for_run(run, begun);
            dockerd.resume();
            assert_eq!(found, code, "{stderr}");
            assert!(elapsed < limit + SLACK, "{elapsed:?}: {stderr}");
            assert!(stderr.contains("could not remove the container"), "{stderr}");
        }
        // The daemon ends the containers by itself once it continues, or a later run does.
        TIER.chitin("prune --tier nemoclaw").env("DOCKER_HOST", dockerd.host()).outcome();
        let deadline = Instant::now() + Duration::from_secs(20);
        while !docker::list_containers(&dockerd.host()).expect("list").is_empty() {
            assert!(Instant::now() < deadline, "containers are left");
            thread::sleep(Duration::from_millis(100));
        }
    }
}
