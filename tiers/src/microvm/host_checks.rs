//! Checks by trying, not by looking, whether this host can run a microVM.

use std::process::Stdio;
use std::time::Duration;

use chitin_vmm::jail::{Jail, JailSupport, JailUser, Protection};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::{ArtifactKind, Artifacts};

/// Time limit of a probe. It takes microseconds on hardware and 15 ms on an emulation; a probe that
/// hangs is a finding.
const PROBE_LIMIT: Duration = Duration::from_secs(10);

/// The result of one check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// Name of the check.
    pub name: String,
    /// The check passed.
    pub ok: bool,
    /// Finding, with a remedy if the check failed.
    pub detail: String,
}

/// The part of `chitin-vmm --probe`'s output that is used here.
#[derive(Debug, Deserialize)]
struct Probe {
    usable: bool,
    reason: Option<String>,
    elapsed_ns: Option<u64>,
}

/// Checks everything that a microVM needs. Also returns the jail of a monitor on this host, or
/// `None` if the jail cannot be set up.
pub async fn check_host(artifacts: &Artifacts) -> (Vec<Check>, Option<Jail>) {
    let files = [
        ("monitor", ArtifactKind::Monitor),
        ("guest kernel", ArtifactKind::Kernel),
        ("root image", ArtifactKind::RootImage),
    ];
    // Side by side: a KVM that hangs does not delay the rest.
    let (kvm, (jail_check, jail)) = tokio::join!(check_kvm(artifacts), check_jail(artifacts));
    let files = files.map(|(name, kind)| check_artifact_file(artifacts, name, kind));
    let checks = files.into_iter().chain([kvm, jail_check]).collect();
    (checks, jail)
}

fn check_artifact_file(artifacts: &Artifacts, name: &str, kind: ArtifactKind) -> Check {
    let checked = artifacts.check_file(kind);
    let detail = match &checked {
        Ok(()) => artifacts.path(kind).display().to_string(),
        Err(error) => error.to_string(),
    };
    Check { name: name.into(), ok: checked.is_ok(), detail }
}

/// Sets up an empty jail.
async fn check_jail(artifacts: &Artifacts) -> (Check, Option<Jail>) {
    let (ok, detail, jail) = match query_monitor::<JailSupport>(artifacts, "--jail").await {
        Ok(JailSupport { usable: true, jail: Some(jail), .. }) => {
            let user = match jail.user {
                JailUser::Dedicated => "a dedicated user",
                JailUser::Caller => "the calling user",
                JailUser::Root => "root",
            };
            let mut detail =
                format!("works: {user}, private namespaces, empty root, no capabilities, limits");
            if jail.cgroup.is_some() {
                detail.push_str(", a control group");
            }
            for without in &jail.without {
                detail.push_str("; without ");
                detail.push_str(without);
            }
            for (name, protection) in jail.speculation.list() {
                if protection == Protection::Unavailable {
                    detail.push_str("; without ");
                    detail.push_str(name);
                }
            }
            (true, detail, Some(jail))
        }
        Ok(support) => (false, support.reason.unwrap_or_default(), None),
        Err(reason) => (false, format!("the check could not run: {reason}"), None),
    };
    (Check { name: "jail".into(), ok, detail }, jail)
}

/// Runs a small guest, and returns the reason if KVM cannot run microVMs. A probe that cannot be
/// run finds nothing.
pub async fn find_kvm_fault(artifacts: &Artifacts) -> Option<String> {
    let probe = query_monitor::<Probe>(artifacts, "--probe").await.ok()?;
    if probe.usable { None } else { Some(probe.reason.unwrap_or_default()) }
}

/// Runs a small guest.
async fn check_kvm(artifacts: &Artifacts) -> Check {
    let (ok, detail) = match query_monitor::<Probe>(artifacts, "--probe").await {
        Ok(probe) => {
            let took = probe.elapsed_ns.map(|ns| format!("a probe guest ran in {} µs", ns / 1000));
            (probe.usable, probe.reason.or(took).unwrap_or_default())
        }
        Err(reason) => (false, format!("the probe guest could not be run: {reason}")),
    };
    Check { name: "KVM".into(), ok, detail }
}

/// Runs the monitor with an option and returns its answer.
async fn query_monitor<T: DeserializeOwned>(
    artifacts: &Artifacts,
    option: &str,
) -> Result<T, String> {
    // A monitor that another user can replace is not run, not even to ask it something.
    artifacts.check_file(ArtifactKind::Monitor).map_err(|error| error.to_string())?;
    let output = tokio::process::Command::new(&artifacts.monitor)
        .arg(option)
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(PROBE_LIMIT, output)
        .await
        .map_err(|_| format!("no answer within {} s", PROBE_LIMIT.as_secs()))?
        .map_err(|error| error.to_string())?;
    serde_json::from_slice(&output.stdout).map_err(|error| {
        format!("{}, {error}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim())
    })
}
