//! The microVM tier: one `chitin-vmm` process per sandbox.

mod host_checks;
mod monitor;

use chitin_spec::TierKind;

pub use host_checks::{Check, check_host, find_kvm_fault};
pub use monitor::{Monitor, MonitorEnd, Reported, launch_monitor, prepare_monitor};

use crate::{
    Artifacts, Capabilities, Error, Instance, LaunchSpec, LaunchedInstance, Pending, Tier,
    Unavailable,
};

/// The tier of microVMs made of these artifacts.
#[derive(Debug, Clone)]
pub struct MicrovmTier(pub Artifacts);

/// Returns the implementation of every microVM.
pub fn capabilities() -> Capabilities {
    let version = env!("CARGO_PKG_VERSION").into();
    Capabilities { implementation: "chitin-vmm".into(), version, short_of: Vec::new() }
}

/// Returns whether the tier is available, from the checks of the host.
///
/// # Errors
/// The reasons of all checks that failed.
pub fn judge_checks(checks: &[Check]) -> Result<Capabilities, Unavailable> {
    let failed: Vec<_> = checks.iter().filter(|check| !check.ok).collect();
    if failed.is_empty() {
        return Ok(capabilities());
    }
    let reasons: Vec<_> =
        failed.iter().map(|check| format!("{}: {}", check.name, check.detail)).collect();
    let remedy = "see `chitin doctor`".into();
    Err(Unavailable { reason: reasons.join("; "), remedy })
}

impl Tier for MicrovmTier {
    fn kind(&self) -> TierKind {
        TierKind::Ironclaw
    }

    fn probe(&self) -> Pending<'_, Result<Capabilities, Unavailable>> {
        Box::pin(async {
            let (checks, _) = check_host(&self.0).await;
            judge_checks(&checks)
        })
    }

    fn launch<'a>(&'a self, spec: &'a LaunchSpec) -> Pending<'a, Result<LaunchedInstance, Error>> {
        Box::pin(async {
            let (monitor, stream) = launch_monitor(&self.0, &spec.vm, spec.guest_files.as_ref())?;
            Ok(LaunchedInstance { spawned: monitor.spawned, instance: Box::new(monitor), stream })
        })
    }
}

impl Instance for Monitor {
    fn wait_for_end(&mut self) -> Pending<'_, Error> {
        Box::pin(async {
            match Monitor::wait_for_end(self).await {
                MonitorEnd::Failed { code, message } => Error::Monitor { code, message },
                MonitorEnd::Saved => Error::Stopped,
                MonitorEnd::Guest(end) => Error::GuestEnded(end),
            }
        })
    }

    fn stop(&mut self) -> Pending<'_, Result<(), Error>> {
        Box::pin(async {
            Monitor::stop(self).await;
            Ok(())
        })
    }

    fn monitor(&mut self) -> Option<&mut Monitor> {
        Some(self)
    }
}
