//! The clean-up tasks of this process: revocations and removals that run in the background.

use std::sync::LazyLock;

use tokio_util::task::TaskTracker;

/// Closed from the beginning, so that waiting ends whenever no task runs. Tasks added later are
/// counted all the same.
static TRACKER: LazyLock<TaskTracker> = LazyLock::new(|| {
    let tracker = TaskTracker::new();
    tracker.close();
    tracker
});

/// Returns the tracker that counts the clean-up tasks of this process.
pub(crate) fn tracker() -> &'static TaskTracker {
    &TRACKER
}

/// Waits until everything that was issued and created for dropped sandboxes is revoked and removed,
/// or cannot be. This includes sandboxes that were dropped before they were ready.
///
/// A process that has dropped a sandbox should await this before it ends.
/// [`Sandbox::stop`](crate::Sandbox::stop) waits for the clean-up of its own sandbox.
pub async fn wait_for_cleanup() {
    TRACKER.wait().await;
}
