//! A pool gives sandboxes that are like any other, sooner.

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use chitin::{Builder, Error, Exit, MAX_POOL, Templates, WarmUpSpec};
use chitin_integration::{builder, unix_time};

async fn template(dir: &Path) -> Builder {
    let builder = builder().memory_mib(64).templates(Templates::at(dir));
    builder.clone().build_template("t", &WarmUpSpec::default()).await.expect("build a template");
    builder.template("t")
}

/// Processes of ours that are monitors.
fn monitors() -> Vec<u32> {
    let mut found = Vec::new();
    for task in fs::read_dir("/proc/self/task").expect("list our threads") {
        let list = fs::read_to_string(task.expect("read our threads").path().join("children"))
            .unwrap_or_default();
        found.extend(list.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
    }
    found
}

#[tokio::test]
async fn sandboxes_of_a_pool_are_their_own_and_are_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let pool = template(dir.path()).await.timeout(Duration::from_secs(100)).pool(2).await.unwrap();
    let script = "cat /proc/sys/kernel/random/boot_id; uname -n; date +%s; echo $((6 * 7)) > /work/mine; ls /work | wc -l";
    let mut seen = HashSet::new();
    for _ in 0..3 {
        // The clock of a guest that waited is right all the same.
        pool.wait_until_full().await.unwrap();
        tokio::time::sleep(Duration::from_millis(1500)).await;
        let before = unix_time();
        let sandbox = pool.start().await.unwrap();
        let output = sandbox.command("sh").args(["-c", script]).output().await.unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!((output.exit, lines[3]), (Exit::Code(0), "1"), "{text}");
        assert!(seen.insert(lines[0].to_owned()) && seen.insert(lines[1].to_owned()), "{text}");
        assert!((before..=unix_time()).contains(&lines[2].parse().unwrap()), "{text}");
        sandbox.stop().await.unwrap();
    }
    pool.wait_until_full().await.unwrap();
    assert_eq!((pool.ready(), monitors().len()), (2, 2));
    // Those that wait have all they need.
    Templates::at(dir.path()).remove("t").unwrap();
    let sandbox = pool.start().await.unwrap();
    assert_eq!(sandbox.command("echo").arg("alive").output().await.unwrap().stdout, b"alive\n");
    sandbox.stop().await.unwrap();
    drop(pool);
    gone().await;
}

/// Waits until no monitor is left.
async fn gone() {
    for _ in 0..200 {
        if monitors().is_empty() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("left behind: {:?}", monitors());
}

#[tokio::test]
async fn one_that_dies_while_it_waits_is_not_given_out() {
    let dir = tempfile::tempdir().unwrap();
    let pool = template(dir.path()).await.pool(1).await.unwrap();
    for pid in monitors() {
        let killed =
            std::process::Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap();
        assert!(killed.success());
    }
    // It is noticed when its socket is read.
    tokio::time::sleep(Duration::from_millis(200)).await;
    let sandbox = pool.start().await.unwrap();
    assert_eq!(sandbox.command("echo").arg("alive").output().await.unwrap().stdout, b"alive\n");
    sandbox.stop().await.unwrap();
    drop(pool);
    gone().await;
}

#[tokio::test]
async fn a_pool_without_a_template_boots_and_sizes_are_bounded() {
    let pool = builder().pool(1).await.unwrap();
    let sandbox = pool.start().await.unwrap();
    assert_eq!(sandbox.command("echo").arg("alive").output().await.unwrap().stdout, b"alive\n");
    sandbox.stop().await.unwrap();
    for size in [0, MAX_POOL + 1] {
        let error = builder().pool(size).await.unwrap_err();
        assert!(matches!(error, Error::PoolSize { .. }), "{error}");
    }
    let error =
        builder().template("t").templates(Templates::at("/nonexistent")).pool(1).await.unwrap_err();
    assert!(error.to_string().contains("there is no template `t`"), "{error}");
}
