//! Hundreds of runs that end in every possible way leak no resource of the host.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::time::{Duration, Instant};

use chitin::{Builder, Error, Exit, Templates, TierKind, WarmUpSpec};
use chitin_hostile::attacks::{self, Expected};
use chitin_integration::{
    Chitin, HostResources, TierUnderTest, binary_path, sandbox_builder, workspace_dir,
};
use chitin_vmm::spec::MIN_MEMORY_MIB;

/// The time limit of an endless workload, counted from the start of its sandbox. Most workloads
/// run by then, some do not yet.
const SHORT: Duration = Duration::from_secs(2);

/// Runs of one batch: one or a few for each way to end.
const MICROVMS: usize = 10;
const CONTAINERS: usize = 6;

/// A workload that ends only with its sandbox.
const ENDLESS: &str = "while :; do sleep 1; done";

async fn run_to_exit(builder: Builder, code: u8) {
    let sandbox = builder.start().await.unwrap();
    let output =
        sandbox.command("sh").args(["-c", &format!("echo x; exit {code}")]).output().await.unwrap();
    assert_eq!((output.exit, output.stdout.as_slice()), (Exit::Code(code), &b"x\n"[..]));
    sandbox.stop().await.unwrap();
}

/// Lets the time limit expire during the start or during the command.
async fn run_to_timeout(builder: Builder) {
    let error = match builder.timeout(SHORT).start().await {
        Ok(sandbox) => sandbox.command("sh").args(["-c", ENDLESS]).output().await.unwrap_err(),
        Err(error) => error,
    };
    assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
}

/// Drops a sandbox with a running command.
async fn drop_running(builder: Builder) {
    let sandbox = builder.start().await.unwrap();
    let _process = sandbox.command("sh").args(["-c", ENDLESS]).spawn().unwrap();
}

/// Cancels a start.
async fn cancel_start(builder: Builder, after: Duration) {
    let _ = tokio::time::timeout(after, builder.start()).await;
}

/// Kills the command line, which cannot clean up then.
async fn kill_cli(run: Chitin, after: Duration) {
    tokio::task::spawn_blocking(move || {
        let mut running = run.spawn();
        std::thread::sleep(after);
        running.child.kill().unwrap();
        assert_eq!(running.wait(), 128 + 9);
        running.assert_no_process_left();
    })
    .await
    .unwrap();
}

/// Starts a guest that violates VIRTIO, and then the channel protocol if the device tolerates it.
async fn start_hostile_guest(builder: Builder) {
    let error = builder.start().await.unwrap_err();
    assert!(matches!(error, Error::GuestEnded(_) | Error::Protocol(_)), "{error:?}");
}

/// Runs batches of `each`, and asserts that they leak nothing and end within the limit. `last`
/// starts one more sandbox: a start cleans up after killed runs.
async fn assert_no_leak<F: Future<Output = ()>>(
    tier: TierUnderTest,
    (runs, each): (usize, usize),
    limit: Duration,
    batch: impl Fn(usize) -> F,
    last: Builder,
) {
    // The first batch opens the descriptors that a process has for all its sandboxes.
    batch(0).await;
    chitin::wait_for_cleanup().await;
    let before = HostResources::list(tier);
    let start = Instant::now();
    for number in 0..runs / each {
        batch(number).await;
    }
    run_to_exit(last, 0).await;
    chitin::wait_for_cleanup().await;
    let elapsed = start.elapsed();
    println!("{runs} runs took {elapsed:?}");
    // Tasks of the runtime clean up dropped sandboxes, so that this thread must not block.
    tokio::task::spawn_blocking(move || before.assert_no_leak()).await.unwrap();
    assert!(elapsed < limit, "{runs} runs took {elapsed:?}");
}

/// Returns a delay that grows with each batch, so that every step of a start is interrupted.
fn delay_of_batch(batch: usize, step: u64, last: u64) -> Duration {
    Duration::from_millis((batch as u64 * step) % last)
}

#[tokio::test]
async fn five_hundred_microvms_leak_nothing() {
    const RUNS: usize = 500;
    /// A run takes a quarter of a second on the emulated host. The limit is five times as much, for
    /// a host under load.
    const LIMIT: Duration = Duration::from_secs(600);

    let tier = TierUnderTest::new(TierKind::Ironclaw);
    tier.run("true").outcome().assert_success();
    let dir = tempfile::tempdir().unwrap();
    let copy = sandbox_builder().memory_mib(64).templates(Templates::at(dir.path()));
    copy.clone().build_template("t", &WarmUpSpec::default()).await.unwrap();
    let copy = copy.template("t");
    let guests: Vec<_> = attacks::all()
        .into_iter()
        .filter(|attack| matches!(attack.expected, Expected::Ended(_) | Expected::CarriedOn(_)))
        // One attack of each kind: the names of repeated ones start with a number.
        .filter(|attack| !attack.name.starts_with(|first: char| first.is_ascii_digit()))
        .enumerate()
        .map(|(at, attack)| {
            let path = dir.path().join(format!("guest-{at}"));
            attack.program().write_elf(&File::create(&path).unwrap()).unwrap();
            path
        })
        .collect();
    let guest = |number: usize| {
        let built = workspace_dir().join("target/artifacts");
        sandbox_builder()
            .memory_mib(MIN_MEMORY_MIB.into())
            .timeout(Duration::from_secs(60))
            .artifacts(chitin::Artifacts {
                kernel: guests[number % guests.len()].clone(),
                root_image: built.join("root.img"),
                monitor: binary_path("chitin-vmm"),
            })
    };
    let command_line =
        || tier.run_with("--template t -- sh -c").arg(ENDLESS).env("CHITIN_TEMPLATES", dir.path());
    let batch = |number: usize| {
        let (copy, guest) = (&copy, &guest);
        async move {
            tokio::join!(
                run_to_exit(copy.clone(), 0),
                run_to_exit(copy.clone(), 0),
                run_to_exit(copy.clone(), 7),
                run_to_timeout(copy.clone()),
                drop_running(copy.clone()),
                cancel_start(copy.clone(), delay_of_batch(number, 7, 300)),
                kill_cli(command_line(), delay_of_batch(number, 13, 600)),
                start_hostile_guest(guest(3 * number)),
                start_hostile_guest(guest(3 * number + 1)),
                start_hostile_guest(guest(3 * number + 2)),
            );
        }
    };
    assert_no_leak(tier, (RUNS, MICROVMS), LIMIT, batch, copy.clone()).await;
}

/// Runs as many containers as fit into two minutes, and asserts that they leak nothing.
async fn assert_containers_leak_nothing(kind: TierKind, runs: usize) {
    let tier = TierUnderTest::new(kind);
    let builder = || sandbox_builder().tier(kind);
    let batch = |number: usize| {
        let builder = &builder;
        async move {
            tokio::join!(
                run_to_exit(builder(), 0),
                run_to_exit(builder(), 7),
                run_to_timeout(builder()),
                drop_running(builder()),
                cancel_start(builder(), delay_of_batch(number, 37, 1000)),
            );
            kill_cli(tier.run_sh(ENDLESS), delay_of_batch(number, 83, 2000)).await;
        }
    };
    assert_no_leak(tier, (runs, CONTAINERS), Duration::from_secs(600), batch, builder()).await;
}

mod nanoclaw {
    use super::*;

    #[tokio::test]
    async fn many_containers_leak_nothing() {
        assert_containers_leak_nothing(TierKind::Nanoclaw, 120).await;
    }
}

mod nemoclaw {
    use super::*;

    #[tokio::test]
    async fn many_containers_leak_nothing() {
        assert_containers_leak_nothing(TierKind::Nemoclaw, 60).await;
    }
}
