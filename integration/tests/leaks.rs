//! Hundreds of runs that end in every way there is, and nothing of them is left.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::time::{Duration, Instant};

use chitin::{Builder, Error, Exit, Templates, TierKind, WarmUpSpec};
use chitin_hostile::attacks::{self, Expected};
use chitin_integration::{Belongings, Chitin, On, builder, workspace};
use chitin_vmm::spec::MIN_MEMORY_MIB;

/// What a workload that does not end by itself is given, from the start of its sandbox. Most are up by then, and some are not.
const SHORT: Duration = Duration::from_secs(2);

/// Runs of one batch: one of each end, or a few.
const MICROVMS: usize = 10;
const CONTAINERS: usize = 6;

/// Everything there is in a sandbox that is killed together with whoever asked for it.
const FOREVER: &str = "while :; do sleep 1; done";

async fn exits(builder: Builder, code: u8) {
    let sandbox = builder.start().await.unwrap();
    let output =
        sandbox.command("sh").args(["-c", &format!("echo x; exit {code}")]).output().await.unwrap();
    assert_eq!((output.exit, output.stdout.as_slice()), (Exit::Code(code), &b"x\n"[..]));
    sandbox.stop().await.unwrap();
}

/// The time is up while it starts, or while its command runs.
async fn times_out(builder: Builder) {
    let error = match builder.timeout(SHORT).start().await {
        Ok(sandbox) => sandbox.command("sh").args(["-c", FOREVER]).output().await.unwrap_err(),
        Err(error) => error,
    };
    assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
}

/// Whoever holds it forgets it, with a command that runs.
async fn is_dropped(builder: Builder) {
    let sandbox = builder.start().await.unwrap();
    let _process = sandbox.command("sh").args(["-c", FOREVER]).spawn().unwrap();
}

/// A start that nobody waits for any more.
async fn is_given_up(builder: Builder, after: Duration) {
    let _ = tokio::time::timeout(after, builder.start()).await;
}

/// The command line, killed as whoever would see to the rest.
async fn is_killed(run: Chitin, after: Duration) {
    tokio::task::spawn_blocking(move || {
        let mut running = run.spawn();
        std::thread::sleep(after);
        running.child.kill().unwrap();
        assert_eq!(running.wait(), 128 + 9);
        running.assert_nothing_left();
    })
    .await
    .unwrap();
}

/// A guest that breaks a rule of a device, and if it may go on then those of the channel, where it speaks a language of its own.
async fn attacks(builder: Builder) {
    let error = builder.start().await.unwrap_err();
    assert!(matches!(error, Error::GuestEnded(_) | Error::Protocol(_)), "{error:?}");
}

/// Runs batches of `each`, and asserts that nothing is left of them, and that it has not taken too long. `last` makes one sandbox
/// more: what somebody has left who was killed is found by the next start.
async fn leave_nothing<F: Future<Output = ()>>(
    on: On,
    (runs, each): (usize, usize),
    limit: Duration,
    batch: impl Fn(usize) -> F,
    last: Builder,
) {
    // What a process opens once for all its sandboxes.
    batch(0).await;
    chitin::wait_for_cleanup().await;
    let before = Belongings::now(on);
    let start = Instant::now();
    for number in 0..runs / each {
        batch(number).await;
    }
    exits(last, 0).await;
    chitin::wait_for_cleanup().await;
    let elapsed = start.elapsed();
    println!("{runs} runs took {elapsed:?}");
    // What was dropped is waited for by the runtime, which has to go on.
    tokio::task::spawn_blocking(move || before.assert_nothing_more()).await.unwrap();
    assert!(elapsed < limit, "{runs} runs took {elapsed:?}");
}

/// Later each time, so that every step of a start is met.
fn moment(batch: usize, step: u64, last: u64) -> Duration {
    Duration::from_millis((batch as u64 * step) % last)
}

#[tokio::test]
async fn nothing_is_left_of_five_hundred_microvms() {
    const RUNS: usize = 500;
    /// Each costs a quarter of a second on the emulated host; five times that is a host with much other work.
    const LIMIT: Duration = Duration::from_secs(600);

    let on = On { tier: TierKind::Ironclaw };
    on.run("true").outcome().ok();
    let dir = tempfile::tempdir().unwrap();
    let copy = builder().memory_mib(64).templates(Templates::at(dir.path()));
    copy.clone().build_template("t", &WarmUpSpec::default()).await.unwrap();
    let copy = copy.template("t");
    let guests: Vec<_> = attacks::all()
        .into_iter()
        .filter(|attack| matches!(attack.expected, Expected::Ended(_) | Expected::CarriedOn(_)))
        // One of each kind: those that do it many times say so first.
        .filter(|attack| !attack.name.starts_with(|first: char| first.is_ascii_digit()))
        .enumerate()
        .map(|(at, attack)| {
            let path = dir.path().join(format!("guest-{at}"));
            attack.program().write_elf(&File::create(&path).unwrap()).unwrap();
            path
        })
        .collect();
    let guest = |number: usize| {
        let built = workspace().join("target/artifacts");
        builder().memory_mib(MIN_MEMORY_MIB.into()).timeout(Duration::from_secs(60)).artifacts(
            chitin::Artifacts {
                kernel: guests[number % guests.len()].clone(),
                root_image: built.join("root.img"),
                monitor: chitin_integration::binary("chitin-vmm"),
            },
        )
    };
    let command_line =
        || on.with("--template t -- sh -c").arg(FOREVER).env("CHITIN_TEMPLATES", dir.path());
    let batch = |number: usize| {
        let (copy, guest) = (&copy, &guest);
        async move {
            tokio::join!(
                exits(copy.clone(), 0),
                exits(copy.clone(), 0),
                exits(copy.clone(), 7),
                times_out(copy.clone()),
                is_dropped(copy.clone()),
                is_given_up(copy.clone(), moment(number, 7, 300)),
                is_killed(command_line(), moment(number, 13, 600)),
                attacks(guest(3 * number)),
                attacks(guest(3 * number + 1)),
                attacks(guest(3 * number + 2)),
            );
        }
    };
    leave_nothing(on, (RUNS, MICROVMS), LIMIT, batch, copy.clone()).await;
}

/// The same with containers, as many as fit into two minutes.
async fn nothing_is_left_of(tier: TierKind, runs: usize, limit: Duration) {
    let on = On { tier };
    let builder = || builder().tier(tier);
    let batch = |number: usize| {
        let builder = &builder;
        async move {
            tokio::join!(
                exits(builder(), 0),
                exits(builder(), 7),
                times_out(builder()),
                is_dropped(builder()),
                is_given_up(builder(), moment(number, 37, 1000)),
            );
            is_killed(on.sh(FOREVER), moment(number, 83, 2000)).await;
        }
    };
    leave_nothing(on, (runs, CONTAINERS), limit, batch, builder()).await;
}

mod nanoclaw {
    use super::*;

    #[tokio::test]
    async fn nothing_is_left_of_many_containers() {
        nothing_is_left_of(TierKind::Nanoclaw, 120, Duration::from_secs(600)).await;
    }
}

mod nemoclaw {
    use super::*;

    #[tokio::test]
    async fn nothing_is_left_of_many_containers() {
        nothing_is_left_of(TierKind::Nemoclaw, 60, Duration::from_secs(600)).await;
    }
}
