//! Sandboxes that are all but started.
//!
//! ```text
//!             one is missing                  ready                    start
//!   (nothing) ──────────────▶ being prepared ──────▶ waiting ──────────────────▶ a sandbox
//!                                   │                   │
//!                                   └── fails ──────────┴── dies ──▶ gone, replaced
//! ```
//!
//! A monitor that waits has opened its files, made its VM, filled its memory and restored its vCPUs. What is left is to give
//! it a channel. It has seen no secret, and its guest has not run.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chitin_tiers::microvm::{self, End, Monitor};
use chitin_tiers::{BOOT_LIMIT, LaunchSpec};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::{Builder, Error, Sandbox};

/// The most monitors that wait in one pool. Each is a process with some ten descriptors and a few MiB; a service that needs
/// more of them at the same moment is short of CPUs first.
pub const MAX_POOL: usize = 256;

/// How long after a monitor was taken the next one is prepared, while others still wait: what the new sandbox does first is
/// worth more than a pool that is full again sooner.
const BREATHER: Duration = Duration::from_millis(100);

/// What cannot be prepared now is not tried again at once.
const PAUSE: Duration = Duration::from_millis(500);

/// A number of monitors that wait for a sandbox to become. Dropping it ends those that still wait, and none that was started.
#[derive(Debug)]
pub struct Pool {
    shared: Arc<Shared>,
    filler: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    builder: Builder,
    size: usize,
    waiting: Mutex<VecDeque<Waiting>>,
    /// How many wait.
    count: watch::Sender<usize>,
}

/// A monitor that has done all it can do without a channel, and what it was given.
#[derive(Debug)]
struct Waiting {
    monitor: Monitor,
    plan: LaunchSpec,
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, VecDeque<Waiting>> {
        // A list of processes is whole at every moment.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The one that has waited longest and still lives.
    fn take(&self) -> Option<Waiting> {
        let mut waiting = self.waiting();
        loop {
            let first = waiting.pop_front()?;
            let lives = first.monitor.reported.borrow().end.is_none();
            if lives {
                return Some(first);
            }
        }
    }

    fn publish_count(&self) {
        let count = self.waiting().len();
        self.count.send_replace(count);
    }
}

impl Pool {
    /// Prepares the first one, and the others in the background.
    pub(crate) async fn new(builder: Builder, size: usize) -> Result<Pool, Error> {
        if !(1..=MAX_POOL).contains(&size) {
            return Err(Error::PoolSize { size });
        }
        let first = prepare(&builder).await?;
        let shared = Arc::new(Shared {
            builder,
            size,
            waiting: Mutex::new(VecDeque::from([first])),
            count: watch::Sender::new(1),
        });
        let filler = tokio::spawn(fill(shared.clone()));
        Ok(Pool { shared, filler })
    }

    /// Starts a sandbox: from a monitor that waits, or as [`Builder::start`] does where none is ready.
    ///
    /// # Errors
    /// As for [`Builder::start`].
    pub async fn start(&self) -> Result<Sandbox, Error> {
        let started = Instant::now();
        let builder = &self.shared.builder;
        let fetched = builder.fetch().await?;
        let sandbox = match self.shared.take() {
            Some(Waiting { mut monitor, plan }) => {
                let channel = match monitor.go() {
                    Ok(channel) => channel,
                    Err(error) => {
                        fetched.revoke().await;
                        return Err(error.into());
                    }
                };
                let sandbox = builder.watch(monitor, channel, &plan.spec, started);
                builder.finish(sandbox, &plan, fetched).await
            }
            None => builder.begin_microvm(fetched, started).await,
        };
        self.shared.publish_count();
        sandbox
    }

    /// How many wait.
    pub fn ready(&self) -> usize {
        self.shared.waiting().len()
    }

    /// Waits until the pool is full.
    ///
    /// # Errors
    /// [`Error::BootTimeout`] if that takes so long that something must be wrong.
    pub async fn filled(&self) -> Result<(), Error> {
        let mut count = self.shared.count.subscribe();
        let full = count.wait_for(|count| *count >= self.shared.size);
        match tokio::time::timeout(BOOT_LIMIT, full).await {
            Ok(_) => Ok(()),
            Err(_) => Err(Error::BootTimeout { limit: BOOT_LIMIT }),
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.filler.abort();
        self.shared.waiting().clear();
    }
}

/// Keeps the pool full.
async fn fill(shared: Arc<Shared>) {
    let mut count = shared.count.subscribe();
    loop {
        if count.wait_for(|count| *count < shared.size).await.is_err() {
            return;
        }
        if *shared.count.borrow() > 0 {
            tokio::time::sleep(BREATHER).await;
        }
        match prepare(&shared.builder).await {
            Ok(waiting) => {
                shared.waiting().push_back(waiting);
                shared.publish_count();
            }
            // Whoever starts a sandbox meanwhile is told why it cannot be done.
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}

/// Starts a monitor and waits until it waits.
async fn prepare(builder: &Builder) -> Result<Waiting, Error> {
    let mut plan = builder.plan()?;
    // It has them now; ours are not needed while it waits.
    let files = plan.files.take();
    let mut monitor = microvm::prepare(&builder.artifacts, &plan.spec, files.as_ref())?;
    match tokio::time::timeout(BOOT_LIMIT, monitor.prepared()).await {
        Ok(true) => Ok(Waiting { monitor, plan }),
        Ok(false) => Err(match monitor.ended().await {
            End::Failed(code, reason) => chitin_tiers::Error::Monitor { code, reason }.into(),
            End::Guest(end) => Error::GuestEnded(end),
            End::Saved => Error::Stopped,
        }),
        Err(_) => Err(Error::BootTimeout { limit: BOOT_LIMIT }),
    }
}
