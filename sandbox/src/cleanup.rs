//! What is revoked and cleared away in the background, so that a process can wait for it before it ends.

use std::sync::LazyLock;

use tokio_util::task::TaskTracker;

/// Closed from the beginning: what is added is counted all the same, and waiting ends when there is nothing.
static TRACKER: LazyLock<TaskTracker> = LazyLock::new(|| {
    let tracker = TaskTracker::new();
    tracker.close();
    tracker
});

/// Counts the clean-ups of this process.
pub(crate) fn tracker() -> &'static TaskTracker {
    &TRACKER
}

/// Waits until what was issued and made for sandboxes that were dropped, also before they were up, is given back and cleared away,
/// or cannot be. To be awaited before a process ends that has dropped one; [`Sandbox::end`](crate::Sandbox::end) does it for its own.
pub async fn wait_for_cleanup() {
    TRACKER.wait().await;
}
