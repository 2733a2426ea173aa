//! Copies of a sandbox that runs: what was going on goes on in each, and nothing that is to be secret is the same twice.

use std::collections::HashSet;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use chitin::{Error, Exit, MAX_FORKS, Sandbox, SecretSource};
use chitin_integration::builder;

/// How far a copy's clock may be off: by the time that the message with it takes. On an emulated host that is a hundred times
/// longer, and more where the machine below has other work; with the deterministic clock none of that counts.
fn clock() -> Duration {
    let emulated = std::env::var_os("CHITIN_NESTED").is_some_and(|kind| kind != "icount");
    if emulated { Duration::from_secs(3) } else { Duration::from_millis(50) }
}

fn since_epoch() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock after 1970")
}

/// A Python that has everything loaded and waits; it answers with a random identifier of its own.
const WARM: &str = "mkfifo /tmp/go; python3 -c '
import uuid, time
uuid.uuid4()
open(\"/tmp/go\").read()
identity = str(uuid.uuid4())
open(\"/tmp/answer.part\", \"w\").write(identity)
import os
os.rename(\"/tmp/answer.part\", \"/tmp/answer\")
' >/dev/null 2>&1 & sleep 1; echo warm";

const ASK: &str =
    "head -c 16 /dev/urandom | od -An -tx1 | tr -d ' '; cat /proc/sys/kernel/random/boot_id; uname -n
echo > /tmp/go; while ! test -e /tmp/answer; do sleep 0.02; done; cat /tmp/answer; echo";

async fn printed(sandbox: &Sandbox, script: &str) -> String {
    let output = sandbox.command("sh").args(["-c", script]).output().await.expect("run a script");
    assert_eq!(output.exit, Exit::Code(0), "{output:?}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

#[tokio::test]
async fn fifty_forks_are_fifty_others() {
    let mut sandbox = builder().memory_mib(128).forkable(true).start().await.unwrap();
    assert_eq!(printed(&sandbox, WARM).await, "warm\n");
    let copies = sandbox.fork(49).await.unwrap();
    let mut seen = HashSet::new();
    for copy in copies.iter().chain([&sandbox]) {
        let answer = printed(copy, ASK).await;
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
    // It goes on. Once is all.
    assert!(matches!(sandbox.fork(1).await, Err(Error::NotForkable)));
    assert_eq!(printed(&sandbox, "cat /tmp/answer | wc -c").await, "36\n");
}

#[tokio::test]
async fn copies_tell_the_time() {
    let mut sandbox = builder().memory_mib(128).forkable(true).start().await.unwrap();
    let copies = sandbox.fork(3).await.unwrap();
    for copy in copies.iter().chain([&sandbox]) {
        let before = since_epoch();
        let told = printed(copy, "date +%s.%N").await;
        let after = since_epoch();
        let told = Duration::from_secs_f64(told.trim().parse().unwrap());
        assert!(
            before <= told + clock() && told <= after + clock(),
            "{before:?} before {told:?} before {after:?}"
        );
    }
}

#[tokio::test]
async fn what_cannot_be_forked_says_so_and_goes_on() {
    let mut sandbox = builder().start().await.unwrap();
    assert!(matches!(sandbox.fork(1).await, Err(Error::NotForkable)));
    assert_eq!(printed(&sandbox, "echo on").await, "on\n");
    sandbox.stop().await.unwrap();

    let secret = SecretSource::Exec("echo t0ken".into());
    let mut sandbox = builder().forkable(true).secret("TOKEN", secret).start().await.unwrap();
    let error = sandbox.fork(1).await.unwrap_err();
    assert!(matches!(error, Error::Guest(_)), "{error:?}");
    assert_eq!(printed(&sandbox, "cat $TOKEN_FILE").await, "t0ken");
    assert!(matches!(sandbox.fork(MAX_FORKS + 1).await, Err(Error::ForkCount { .. })));
    sandbox.stop().await.unwrap();
}
