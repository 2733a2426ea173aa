//! A pool: its sandboxes are like all others, and start sooner.

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use chitin::{Builder, Error, Exit, MAX_POOL, TemplateError, Templates, WarmUpSpec};
use chitin_integration::{sandbox_builder, unix_time};

async fn build_template(dir: &Path) -> Builder {
    let builder = sandbox_builder().memory_mib(64).templates(Templates::at(dir));
    builder.clone().build_template("t", &WarmUpSpec::default()).await.expect("build a template");
    builder.template("t")
}

/// Lists the monitors, which are the child processes of this test.
fn list_monitors() -> Vec<u32> {
    let mut found = Vec::new();
    for task in fs::read_dir("/proc/self/task").expect("list threads") {
        let list = fs::read_to_string(task.expect("list threads").path().join("children"))
            .unwrap_or_default();
        found.extend(list.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
    }
    found
}

#[tokio::test]
async fn pooled_sandboxes_are_distinct_and_replenished() {
    let dir = tempfile::tempdir().unwrap();
    let pool =
        build_template(dir.path()).await.timeout(Duration::from_secs(100)).pool(2).await.unwrap();
    let script = "cat /proc/sys/kernel/random/boot_id; uname -n; date +%s; \
                  echo $((6 * 7)) > /work/mine; ls /work | wc -l";
    let mut seen = HashSet::new();
    for _ in 0..3 {
        // The pause would show in the clock of an idle guest that is not set on its start.
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
    assert_eq!((pool.ready(), list_monitors().len()), (2, 2));
    // Idle sandboxes do not need the template any more.
    Templates::at(dir.path()).remove("t").unwrap();
    let sandbox = pool.start().await.unwrap();
    assert_eq!(sandbox.command("echo").arg("alive").output().await.unwrap().stdout, b"alive\n");
    sandbox.stop().await.unwrap();
    drop(pool);
    wait_until_no_monitor_is_left().await;
}

async fn wait_until_no_monitor_is_left() {
    for _ in 0..200 {
        if list_monitors().is_empty() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("left behind: {:?}", list_monitors());
}

#[tokio::test]
async fn sandbox_that_died_idle_is_not_returned_by_pool() {
    let dir = tempfile::tempdir().unwrap();
    let pool = build_template(dir.path()).await.pool(1).await.unwrap();
    for pid in list_monitors() {
        let killed =
            std::process::Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap();
        assert!(killed.success());
    }
    // The pool detects the death when it reads the monitor's socket.
    tokio::time::sleep(Duration::from_millis(200)).await;
    let sandbox = pool.start().await.unwrap();
    assert_eq!(sandbox.command("echo").arg("alive").output().await.unwrap().stdout, b"alive\n");
    sandbox.stop().await.unwrap();
    drop(pool);
    wait_until_no_monitor_is_left().await;
}

#[tokio::test]
async fn pool_without_template_boots_within_size_limit() {
    let pool = sandbox_builder().pool(1).await.unwrap();
    let sandbox = pool.start().await.unwrap();
    assert_eq!(sandbox.command("echo").arg("alive").output().await.unwrap().stdout, b"alive\n");
    sandbox.stop().await.unwrap();
    for size in [0, MAX_POOL + 1] {
        let error = sandbox_builder().pool(size).await.unwrap_err();
        assert!(matches!(error, Error::PoolSize { .. }), "{error}");
    }
    let error = sandbox_builder()
        .template("t")
        .templates(Templates::at("/nonexistent"))
        .pool(1)
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Template(TemplateError::Missing { .. })), "{error}");
}
