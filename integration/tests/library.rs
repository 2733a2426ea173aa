//! The library, where the command line has no equivalent.

use std::time::Duration;

use chitin::{Error, Exit, SecretSource};
use chitin_integration::sandbox_builder;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[tokio::test]
async fn concurrent_commands_share_sandbox() {
    let sandbox = sandbox_builder().start().await.unwrap();
    let outputs: Vec<_> = (0..10)
        .map(|i| sandbox.command("sh").args(["-c", &format!("echo {i}; exit {i}")]).output())
        .collect();
    for (i, output) in outputs.into_iter().enumerate() {
        let output = output.await.unwrap();
        assert_eq!(output.exit, Exit::Code(u8::try_from(i).unwrap()));
        assert_eq!(output.stdout, format!("{i}\n").as_bytes());
    }
    // A kernel counts in steps of 32 pages and omits mapped pages of the image, so that only values
    // of several MiB are meaningful.
    let output =
        sandbox.command("python3").args(["-c", "x = b'x' * (8 << 20)"]).output().await.unwrap();
    assert!((8 << 10..64 << 10).contains(&output.usage.max_rss_kib), "{:?}", output.usage);
    sandbox.stop().await.unwrap();
}

#[tokio::test]
async fn jail_is_enabled_by_default() {
    let jailed = sandbox_builder().start().await.unwrap();
    let jail = jailed.jail().expect("a jail");
    assert!(jail.uid.is_some_and(|uid| uid >= 0x7000_0000), "{jail:?}");
    jailed.stop().await.unwrap();
    let free = sandbox_builder().jail(false).start().await.unwrap();
    assert_eq!(free.jail().map(|jail| jail.uid), None);
    free.stop().await.unwrap();
}

#[tokio::test]
async fn command_accepts_stdin_and_signals() {
    let sandbox = sandbox_builder().start().await.unwrap();
    let mut process = sandbox.command("cat").piped_stdin().spawn().unwrap();
    let (mut stdin, mut stdout) = (process.stdin.take().unwrap(), process.stdout.take().unwrap());
    let mut answer = [0; 5];
    for _ in 0..3 {
        stdin.write_all(b"hello").await.unwrap();
        stdout.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"hello");
    }
    process.signal(15);
    assert_eq!(process.wait().await.unwrap().0, Exit::Signal(15));
    // A stalled reader stops its own command only.
    let mut flood = sandbox.command("yes").spawn().unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(sandbox.command("echo").arg("alive").output().await.unwrap().stdout, b"alive\n");
    flood.signal(9);
    assert_eq!(flood.wait().await.unwrap().0, Exit::Signal(9));
    sandbox.stop().await.unwrap();
}

#[tokio::test]
async fn secrets_and_files_reach_every_command() {
    let dir = tempfile::tempdir().unwrap();
    let token = dir.path().join("token");
    std::fs::write(&token, "t0ken").unwrap();
    let sandbox =
        sandbox_builder().secret("TOKEN", SecretSource::File(token.clone())).start().await.unwrap();
    sandbox.copy_in(&token, "/work/copied").await.unwrap();
    for _ in 0..2 {
        let output = sandbox
            .command("sh")
            .args(["-c", "cat $TOKEN_FILE /work/copied"])
            .output()
            .await
            .unwrap();
        assert_eq!(output.stdout, b"t0kent0ken");
    }
    let error = sandbox.copy_out("/proc/kmsg", dir.path().join("kmsg")).await.unwrap_err();
    assert!(matches!(error, Error::Guest(_) | Error::Copy { .. }), "{error:?}");
    sandbox.stop().await.unwrap();
}

#[tokio::test]
async fn timeout_ends_every_pending_call() {
    let sandbox = sandbox_builder().timeout(Duration::from_secs(30)).start().await.unwrap();
    let mut process = sandbox.command("sleep").arg("600").spawn().unwrap();
    let error = process.wait().await.unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
    let error = sandbox.command("true").output().await.unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
}

#[tokio::test]
async fn process_of_stopped_sandbox_returns_stopped() {
    let sandbox = sandbox_builder().start().await.unwrap();
    let mut process = sandbox.command("sleep").arg("600").spawn().unwrap();
    sandbox.stop().await.unwrap();
    let error = process.wait().await.unwrap_err();
    assert!(matches!(error, Error::Stopped), "{error:?}");
}
