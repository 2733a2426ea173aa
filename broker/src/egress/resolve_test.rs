use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::*;

/// Time of a lookup whose name server does not answer.
const SLOW: Duration = Duration::from_secs(5);

static SLOW_LOOKUPS: AtomicUsize = AtomicUsize::new(0);

/// Blocks for names that begin with `slow`.
fn look_up(host: &str) -> io::Result<Vec<IpAddr>> {
    if host.starts_with("slow") {
        SLOW_LOOKUPS.fetch_add(1, Ordering::Relaxed);
        thread::sleep(SLOW);
    }
    Ok(vec![Ipv4Addr::LOCALHOST.into()])
}

#[test]
fn slow_names_do_not_delay_other_sandboxes() {
    // Two threads of the runtime stand for the 512 that a process with many sandboxes has.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .max_blocking_threads(2)
        .enable_time()
        .build()
        .unwrap();
    runtime.block_on(async {
        let hostile = Arc::new(SystemResolver::new(look_up));
        for number in 0..4 * MAX_LOOKUPS {
            let hostile = hostile.clone();
            tokio::spawn(async move { hostile.resolve(&format!("slow{number}.test")).await });
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        let other = SystemResolver::new(look_up);
        let answer = tokio::time::timeout(SLOW / 2, other.resolve("quick.test")).await;
        assert!(answer.is_ok_and(|answer| answer.is_ok()), "delayed by another sandbox");
        assert_eq!(SLOW_LOOKUPS.load(Ordering::Relaxed), MAX_LOOKUPS, "bounded for each sandbox");
    });
    runtime.shutdown_background();
}
