//! What is being given back and cleared away in the background, so that a process can wait for it before it ends.

use std::sync::LazyLock;

use tokio::sync::watch;

static COUNT: LazyLock<watch::Sender<usize>> = LazyLock::new(|| watch::Sender::new(0));

/// One giving back, as long as this lives.
#[derive(Debug)]
pub(crate) struct Returning(());

impl Returning {
    pub fn begin() -> Returning {
        COUNT.send_modify(|count| *count += 1);
        Returning(())
    }
}

impl Drop for Returning {
    fn drop(&mut self) {
        COUNT.send_modify(|count| *count -= 1);
    }
}

/// Waits until what was issued and made for sandboxes that were dropped, also before they were up, is given back and cleared away,
/// or cannot be. To be awaited before a process ends that has dropped one; [`Sandbox::end`](crate::Sandbox::end) does it for its own.
pub async fn given_back() {
    // The sender is never dropped.
    let _ = COUNT.subscribe().wait_for(|count| *count == 0).await;
}
