//! Whether a microVM can run on this host, and why not: found out by trying, not by looking.

use std::process::Stdio;
use std::time::Duration;

use chitin_vmm::jail::{Jail, JailSupport};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::Artifacts;

/// A probe takes microseconds on hardware and some 15 ms on an emulation. One that hangs is a finding.
const PROBE_LIMIT: Duration = Duration::from_secs(10);

/// One thing that has to be well.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// What was looked at.
    pub name: String,
    /// Whether it is well.
    pub ok: bool,
    /// What was found, and what to do where it is not well.
    pub detail: String,
}

/// What `chitin-vmm --probe` prints, as far as it matters here.
#[derive(Debug, Deserialize)]
struct Probe {
    usable: bool,
    reason: Option<String>,
    elapsed_ns: Option<u64>,
}

/// Checks one by one what a microVM needs. What the jail of a monitor is like here; none if it cannot be closed.
pub async fn check_host(artifacts: &Artifacts) -> (Vec<Check>, Option<Jail>) {
    let file = |name: &str, path: &std::path::Path, remedy: &str| Check {
        name: name.into(),
        ok: path.is_file(),
        detail: if path.is_file() {
            path.display().to_string()
        } else {
            format!("not at {}: {remedy}", path.display())
        },
    };
    let mut checks = vec![
        file("monitor", &artifacts.monitor, "build it with `cargo xtask build`"),
        file("guest kernel", &artifacts.kernel, "build it with `cargo xtask kernel`"),
        file("root image", &artifacts.root_image, "build it with `cargo xtask rootfs`"),
        probe(artifacts).await,
    ];
    let (check, jail) = survey(artifacts).await;
    checks.push(check);
    (checks, jail)
}

/// Closes a jail around nothing.
async fn survey(artifacts: &Artifacts) -> (Check, Option<Jail>) {
    let (ok, detail, jail) = match ask::<JailSupport>(artifacts, "--jail").await {
        Ok(JailSupport { usable: true, jail: Some(jail), .. }) => {
            let user = match jail.uid {
                Some(_) => "a user of its own",
                None => "the user who starts it",
            };
            let mut detail =
                format!("closes: as {user}, own namespaces, empty root, no capabilities, limits");
            if jail.cgroup.is_some() {
                detail.push_str(", a control group");
            }
            for without in &jail.without {
                detail.push_str("; without ");
                detail.push_str(without);
            }
            (true, detail, Some(jail))
        }
        Ok(survey) => (false, survey.reason.unwrap_or_default(), None),
        Err(reason) => (false, format!("it could not be tried: {reason}"), None),
    };
    (Check { name: "jail".into(), ok, detail }, jail)
}

/// Runs a tiny guest.
async fn probe(artifacts: &Artifacts) -> Check {
    let (ok, detail) = match ask::<Probe>(artifacts, "--probe").await {
        Ok(probe) => {
            let took = probe.elapsed_ns.map(|ns| format!("a probe guest ran in {} µs", ns / 1000));
            (probe.usable, probe.reason.or(took).unwrap_or_default())
        }
        Err(reason) => (false, format!("the probe guest could not be run: {reason}")),
    };
    Check { name: "KVM".into(), ok, detail }
}

/// What the monitor's program answers to an option.
async fn ask<T: DeserializeOwned>(artifacts: &Artifacts, option: &str) -> Result<T, String> {
    let output = tokio::process::Command::new(&artifacts.monitor)
        .arg(option)
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(PROBE_LIMIT, output)
        .await
        .map_err(|_| format!("it has not ended within {} s", PROBE_LIMIT.as_secs()))?
        .map_err(|error| error.to_string())?;
    serde_json::from_slice(&output.stdout).map_err(|error| {
        format!("{}, {error}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim())
    })
}
