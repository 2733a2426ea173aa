//! The verdict that the KVM of this host cannot run microVMs: found early in a slow start, and
//! remembered until the next boot.
//!
//! A KVM that emulates instructions boots a guest for many seconds before it fails. A start that
//! takes long is therefore accompanied by the probe of `chitin doctor`, which knows within
//! milliseconds. A usable host pays nothing: its guests answer earlier than the probe begins.

use std::fs::{File, Metadata};
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use chitin_tiers::Artifacts;
use chitin_tiers::microvm::find_kvm_fault;
use chitin_vmm::FailureCode;
use rustix::fs::{AtFlags, Mode, renameat, unlinkat};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::Error;
use crate::template::TrustedDir;

/// A boot takes a fraction of a second on a processor with virtualization.
const SLOW_START: Duration = Duration::from_secs(1);

/// The pause before a second opinion: a host that is overloaded for a moment is not condemned.
const SECOND_OPINION: Duration = Duration::from_millis(300);

const FILE: &str = "kvm.json";

/// Longest file: five short strings.
const MAX_FILE: u64 = 4096;

/// A verdict, and everything that it depends on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Verdict {
    boot: String,
    kernel: String,
    /// SHA-256 of the monitor.
    monitor: String,
    /// Identity and permissions of `/dev/kvm`, which change when its module is loaded again.
    device: String,
    reason: String,
}

impl Verdict {
    /// Describes this host, this monitor and the reason. `None` if a part cannot be determined.
    fn new(artifacts: &Artifacts, reason: &str) -> Option<Verdict> {
        let read = |path: &str| std::fs::read_to_string(path).map(|text| text.trim().to_owned());
        let device = std::fs::metadata("/dev/kvm").ok()?;
        Some(Verdict {
            boot: read("/proc/sys/kernel/random/boot_id").ok()?,
            kernel: format!(
                "{} {}",
                read("/proc/sys/kernel/osrelease").ok()?,
                read("/proc/sys/kernel/version").ok()?
            ),
            monitor: hash_file(&artifacts.monitor)?,
            device: describe_device(&device),
            reason: reason.to_owned(),
        })
    }
}

fn describe_device(device: &Metadata) -> String {
    let owner = format!("{}:{} {:o}", device.uid(), device.gid(), device.mode());
    let changed = format!("{}.{}", device.ctime(), device.ctime_nsec());
    format!("{}:{}:{} {owner} {changed}", device.dev(), device.ino(), device.rdev())
}

fn hash_file(path: &Path) -> Option<String> {
    let mut hash = Sha256::new();
    std::io::copy(&mut File::open(path).ok()?, &mut hash).ok()?;
    Some(format!("{:x}", hash.finalize()))
}

/// Returns the directory of the verdict: one that is empty after a boot, or else the user's cache.
fn locate_dir() -> Option<PathBuf> {
    if rustix::process::geteuid().is_root() {
        return Some("/run/chitin".into());
    }
    for variable in ["XDG_RUNTIME_DIR", "XDG_CACHE_HOME"] {
        let dir = std::env::var_os(variable).map(PathBuf::from).filter(|dir| dir.is_absolute());
        if let Some(dir) = dir {
            return Some(dir.join("chitin"));
        }
    }
    Some(std::env::home_dir()?.join(".cache/chitin"))
}

/// Returns the error of an earlier start, if nothing that it depends on has changed since.
pub(crate) fn recall_verdict(artifacts: &Artifacts) -> Option<Error> {
    recall_from(&locate_dir()?, artifacts)
}

fn recall_from(dir: &Path, artifacts: &Artifacts) -> Option<Error> {
    let mut json = Vec::new();
    // A file or directory that another user could have written is not read.
    let file = TrustedDir::open(dir).ok()?.open_file(FILE).ok()?;
    file.take(MAX_FILE).read_to_end(&mut json).ok()?;
    let verdict: Verdict = serde_json::from_slice(&json).ok()?;
    let current = Verdict::new(artifacts, &verdict.reason)?;
    let reason = format!("{} (found earlier; `chitin doctor` checks it again)", verdict.reason);
    (verdict == current).then(|| unusable_error(reason))
}

/// Remembers the reason why KVM is unusable, or forgets it if there is none. A host on which that
/// fails only loses the time of another probe.
pub(crate) fn remember_verdict(artifacts: &Artifacts, reason: Option<&str>) {
    if let Some(dir) = locate_dir() {
        remember_in(&dir, artifacts, reason);
    }
}

fn remember_in(dir: &Path, artifacts: &Artifacts, reason: Option<&str>) {
    let Some(reason) = reason else {
        if let Ok(dir) = TrustedDir::open(dir) {
            let _ = unlinkat(dir.fd(), FILE, AtFlags::empty());
        }
        return;
    };
    let written = (|| {
        let json = serde_json::to_vec(&Verdict::new(artifacts, reason)?).ok()?;
        let dir = TrustedDir::create(dir).ok()?;
        let temporary = format!(".{FILE}.{}", std::process::id());
        // Left by a process of this id that was killed.
        let _ = unlinkat(dir.fd(), &temporary, AtFlags::empty());
        let mut file = dir.create_file(&temporary, Mode::RUSR | Mode::WUSR).ok()?;
        file.write_all(&json).ok()?;
        renameat(dir.fd(), &temporary, dir.fd(), FILE).ok()
    })();
    tracing::debug!(written = written.is_some(), "verdict about KVM");
}

/// Waits until a start is slow, then probes KVM. Returns only if KVM is unusable, by two opinions.
pub(crate) async fn watch_slow_start(artifacts: &Artifacts) -> Error {
    tokio::time::sleep(SLOW_START).await;
    if find_kvm_fault(artifacts).await.is_some() {
        tokio::time::sleep(SECOND_OPINION).await;
        if let Some(reason) = find_kvm_fault(artifacts).await {
            remember_verdict(artifacts, Some(&reason));
            return unusable_error(reason);
        }
    }
    std::future::pending().await
}

fn unusable_error(message: String) -> Error {
    Error::Tier(chitin_tiers::Error::Monitor { code: FailureCode::KvmUnusable, message })
}

#[cfg(test)]
#[path = "kvm_verdict_test.rs"]
mod tests;
