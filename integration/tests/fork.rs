//! Copies of a running sandbox: processes continue in each copy, and random values differ.

use std::collections::HashSet;
use std::time::Duration;

use chitin::{Error, Exit, MAX_FORKS, Sandbox, SecretSource};
use chitin_integration::{sandbox_builder, since_epoch};

/// Returns the tolerance of a copy's clock: the time that the message with the host's time takes.
/// That is a hundred times longer on an emulated host, and longer still under load, which the
/// deterministic clock does not count.
fn clock_tolerance() -> Duration {
    let emulated = std::env::var_os("CHITIN_NESTED").is_some_and(|kind| kind != "icount");
    if emulated { Duration::from_secs(3) } else { Duration::from_millis(50) }
}

/// Starts a Python that has loaded its modules and waits; it answers with a random identifier.
const WARM: &str = "mkfifo /tmp/go; python3 -c '
import uuid, time
uuid.uuid4()
open(\"/tmp/go\").read()
identity = str(uuid.uuid4())
open(\"/tmp/answer.part\", \"w\").write(identity)
import os
os.rename(\"/tmp/answer.part\", \"/tmp/answer\")
' >/dev/null 2>&1 & sleep 1; echo warm";

const ASK: &str = "head -c 16 /dev/urandom | od -An -tx1 | tr -d ' '
cat /proc/sys/kernel/random/boot_id; uname -n
echo > /tmp/go; while ! test -e /tmp/answer; do sleep 0.02; done; cat /tmp/answer; echo";

async fn run_script(sandbox: &Sandbox, script: &str) -> String {
    let output = sandbox.command("sh").args(["-c", script]).output().await.expect("run a script");
    assert_eq!(output.exit, Exit::Code(0), "{output:?}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

#[tokio::test]
async fn fifty_forks_have_distinct_identities() {
    let mut sandbox = sandbox_builder().memory_mib(128).forkable(true).start().await.unwrap();
    assert_eq!(run_script(&sandbox, WARM).await, "warm\n");
    let copies = sandbox.fork(49).await.unwrap();
    let mut seen = HashSet::new();
    for copy in copies.iter().chain([&sandbox]) {
        let answer = run_script(copy, ASK).await;
        let lines: Vec<&str> = answer.lines().collect();
        assert_eq!(lines.len(), 4, "{answer}");
        for value in lines {
            assert!(seen.insert(value.to_owned()), "{value} twice");
        }
    }
    assert_eq!(seen.len(), 200);
    for copy in copies {
        copy.stop().await.unwrap();
    }
    // The original continues, and cannot be forked again.
    assert!(matches!(sandbox.fork(1).await, Err(Error::NotForkable)));
    assert_eq!(run_script(&sandbox, "cat /tmp/answer | wc -c").await, "36\n");
}

#[tokio::test]
async fn forked_clock_matches_host_clock() {
    let mut sandbox = sandbox_builder().memory_mib(128).forkable(true).start().await.unwrap();
    let copies = sandbox.fork(3).await.unwrap();
    for copy in copies.iter().chain([&sandbox]) {
        let before = since_epoch();
        let text = run_script(copy, "date +%s.%N").await;
        let after = since_epoch();
        let seen = Duration::from_secs_f64(text.trim().parse().unwrap());
        let tolerance = clock_tolerance();
        assert!(
            before <= seen + tolerance && seen <= after + tolerance,
            "{seen:?} is not between {before:?} and {after:?}"
        );
    }
}

#[tokio::test]
async fn refused_fork_leaves_sandbox_running() {
    let mut sandbox = sandbox_builder().start().await.unwrap();
    assert!(matches!(sandbox.fork(1).await, Err(Error::NotForkable)));
    assert_eq!(run_script(&sandbox, "echo on").await, "on\n");
    sandbox.stop().await.unwrap();

    let secret = SecretSource::Exec("echo t0ken".into());
    let mut sandbox =
        sandbox_builder().forkable(true).secret("TOKEN", secret).start().await.unwrap();
    let error = sandbox.fork(1).await.unwrap_err();
    assert!(matches!(error, Error::Guest(_)), "{error:?}");
    assert_eq!(run_script(&sandbox, "cat $TOKEN_FILE").await, "t0ken");
    assert!(matches!(sandbox.fork(MAX_FORKS + 1).await, Err(Error::ForkCount { .. })));
    sandbox.stop().await.unwrap();
}
