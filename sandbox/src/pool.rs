//! Monitors that are prepared before a sandbox is needed.
//!
//! ```text
//!              one is missing                  ready                     start
//!   (nothing) ──────────────▶ being prepared ──────▶ prepared ──────────────────▶ a sandbox
//!                                   │                   │
//!                                   └── fails ──────────┴── dies ──▶ gone, replaced
//! ```
//!
//! A prepared monitor has opened its files, created its VM, filled its memory and restored its
//! vCPUs. Only the channel is missing. It has seen no secret, and its guest has not run.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chitin_tiers::microvm::{self, Monitor, MonitorEnd};
use chitin_tiers::{BOOT_LIMIT, LaunchSpec};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::builder::Builder;
use crate::error::Error;
use crate::launch::{Launched, launch_microvm};
use crate::sandbox::Sandbox;
use crate::spec::SandboxSpec;

/// Most prepared monitors of one pool. Each is a process with some ten descriptors and a few MiB; a
/// service that needs more at the same moment runs out of CPUs first.
pub const MAX_POOL: usize = 256;

/// The delay between the use of a monitor and the preparation of the next, while others are ready:
/// the first work of the new sandbox matters more than a full pool.
const REFILL_DELAY: Duration = Duration::from_millis(100);

/// The delay after a failed preparation.
const RETRY_DELAY: Duration = Duration::from_millis(500);

/// A number of prepared monitors, each for one sandbox. Dropping the pool ends those that were not
/// used yet; sandboxes that were started continue.
#[derive(Debug)]
pub struct Pool {
    shared: Arc<Shared>,
    refill_task: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    spec: SandboxSpec,
    size: usize,
    prepared: Mutex<VecDeque<PreparedMonitor>>,
    count: watch::Sender<usize>,
}

/// A monitor that waits for its channel, and the specification that it was given.
#[derive(Debug)]
struct PreparedMonitor {
    monitor: Monitor,
    launch_spec: LaunchSpec,
}

impl Shared {
    fn lock_prepared(&self) -> MutexGuard<'_, VecDeque<PreparedMonitor>> {
        // A list of processes is consistent at every moment.
        self.prepared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes and returns the monitor that has waited longest and has not ended.
    fn take_oldest(&self) -> Option<PreparedMonitor> {
        let mut prepared = self.lock_prepared();
        loop {
            let oldest = prepared.pop_front()?;
            let runs = oldest.monitor.reported.borrow().end.is_none();
            if runs {
                return Some(oldest);
            }
        }
    }

    fn publish_count(&self) {
        let count = self.lock_prepared().len();
        self.count.send_replace(count);
    }
}

impl Builder {
    /// Prepares `size` monitors up to the point where only a channel is missing, each for one
    /// sandbox.
    ///
    /// # Errors
    /// As for [`start`](Builder::start), for the first of them; a size of 0 or over [`MAX_POOL`];
    /// [`Error::MicrovmRequired`] if no acceptable tier is a microVM.
    pub async fn pool(self, size: usize) -> Result<Pool, Error> {
        Pool::new(self.validate()?, size).await
    }
}

impl Pool {
    /// Prepares the first monitor, and the others in the background.
    async fn new(spec: SandboxSpec, size: usize) -> Result<Pool, Error> {
        if !(1..=MAX_POOL).contains(&size) {
            return Err(Error::PoolSize { size, max: MAX_POOL });
        }
        spec.require_microvm()?;
        let first = prepare_monitor(&spec).await?;
        let shared = Arc::new(Shared {
            spec,
            size,
            prepared: Mutex::new(VecDeque::from([first])),
            count: watch::Sender::new(1),
        });
        let refill_task = tokio::spawn(refill_pool(shared.clone()));
        Ok(Pool { shared, refill_task })
    }

    /// Starts a sandbox from a prepared monitor, or as [`Builder::start`] does if none is ready.
    ///
    /// # Errors
    /// As for [`Builder::start`].
    pub async fn start(&self) -> Result<Sandbox, Error> {
        let started = Instant::now();
        let spec = &self.shared.spec;
        let fetched = spec.limit_time(started, spec.fetch_credentials()).await?;
        let provisioned = match self.shared.take_oldest() {
            Some(PreparedMonitor { mut monitor, launch_spec }) => {
                let stream = match monitor.enter_guest() {
                    Ok(stream) => stream,
                    Err(error) => {
                        fetched.revoke().await;
                        return Err(error.into());
                    }
                };
                let vm = &launch_spec.vm;
                let launched = Launched::from_monitor(monitor, stream, spec, vm, started);
                launched.provision(spec, launch_spec.has_policy_files, fetched).await
            }
            None => launch_microvm(spec, fetched, started).await,
        };
        self.shared.publish_count();
        provisioned.map(Sandbox::from)
    }

    /// Returns the number of prepared monitors.
    pub fn ready(&self) -> usize {
        self.shared.lock_prepared().len()
    }

    /// Waits until the pool is full.
    ///
    /// # Errors
    /// [`Error::BootTimeout`] if it is not full within the time that a boot may take.
    pub async fn wait_until_full(&self) -> Result<(), Error> {
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
        self.refill_task.abort();
        self.shared.lock_prepared().clear();
    }
}

/// Prepares a monitor whenever one is missing.
async fn refill_pool(shared: Arc<Shared>) {
    let mut count = shared.count.subscribe();
    loop {
        if count.wait_for(|count| *count < shared.size).await.is_err() {
            return;
        }
        if *shared.count.borrow() > 0 {
            tokio::time::sleep(REFILL_DELAY).await;
        }
        match prepare_monitor(&shared.spec).await {
            Ok(monitor) => {
                shared.lock_prepared().push_back(monitor);
                shared.publish_count();
            }
            // A caller that starts a sandbox meanwhile gets the same error.
            Err(_) => tokio::time::sleep(RETRY_DELAY).await,
        }
    }
}

/// Starts a monitor and waits until only its channel is missing.
async fn prepare_monitor(spec: &SandboxSpec) -> Result<PreparedMonitor, Error> {
    let mut launch_spec = spec.microvm_launch_spec()?;
    // The monitor has its own descriptors: these would only stay open while it waits.
    let files = launch_spec.guest_files.take();
    let mut monitor = microvm::prepare_monitor(&spec.artifacts, &launch_spec.vm, files.as_ref())?;
    match tokio::time::timeout(BOOT_LIMIT, monitor.wait_until_prepared()).await {
        Ok(true) => Ok(PreparedMonitor { monitor, launch_spec }),
        Ok(false) => Err(match monitor.wait_for_end().await {
            MonitorEnd::Failed { code, message } => {
                chitin_tiers::Error::Monitor { code, message }.into()
            }
            MonitorEnd::Guest(end) => Error::GuestEnded(end),
            MonitorEnd::Saved => Error::Stopped,
        }),
        Err(_) => Err(Error::BootTimeout { limit: BOOT_LIMIT }),
    }
}
