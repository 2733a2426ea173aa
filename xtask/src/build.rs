//! `cargo xtask build`: guest kernel, root image, `chitin`, its monitor and its benchmark tool,
//! side by side.
//!
//! ```text
//! kernel ────────────────────────────────────────────────────────▶ vmlinux
//! monitor ─▶ its probe ─▶ other binaries ─▶ programs of the image ─▶ root image
//!               └─ no usable KVM ─▶ QEMU, emulated KVM host
//! ```
//!
//! Each of the builds starts as many processes as there are processors, so that one fills the
//! processors while another unpacks, configures or links.

use std::fmt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::sync::mpsc;
use std::thread::{self, ScopedJoinHandle};

use anyhow::{Result, anyhow};

use crate::process::new_command;
use crate::progress::{Progress, print_note};
use crate::setup::{self, Purpose};
use crate::{kernel, microvm, rootfs, workspace};

/// Crates that Cargo compiles for the monitor, and for other binaries: only the length of the
/// progress bars.
const MONITOR_CRATES: u64 = 40;
const PACKAGE_CRATES: u64 = 200;

/// Build guest kernel, root image, `chitin`, its monitor and its benchmark tool
#[derive(Debug, Default, clap::Args)]
pub struct Args {}

/// The Cargo profile of `chitin` and its monitor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// Binaries as they are shipped.
    Release,
    /// Binaries that are built in a third of the time.
    Demo,
}

impl Profile {
    /// Returns the directory of its binaries.
    pub fn bin_dir(self) -> PathBuf {
        workspace::target_dir().join(self.to_string())
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Release => "release",
            Self::Demo => "demo",
        })
    }
}

/// The set of things to build.
#[derive(Debug, Clone, Copy)]
pub struct BuildPlan {
    /// The guest kernel; the container tiers have none.
    pub kernel: bool,
    /// The emulated KVM host, if microVMs cannot run on this host.
    pub emulation: bool,
    /// The profile of the host's binaries.
    pub profile: Profile,
    /// Packages of the binaries to build in addition to the monitor.
    pub packages: &'static [&'static str],
}

/// Builds what is missing or out of date.
pub fn run(_: &Args) -> Result<ExitCode> {
    build_side_by_side(&BuildPlan {
        kernel: true,
        emulation: false,
        profile: Profile::Release,
        packages: &["chitin-cli", "chitin-bench"],
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Installs the tools for a plan, then builds it.
pub fn install_and_build(plan: &BuildPlan) -> Result<()> {
    let mut purposes = vec![Purpose::Image];
    if plan.kernel {
        purposes.push(Purpose::Kernel);
    }
    // If KVM can be opened, only the monitor's probe can tell whether it is usable.
    if plan.emulation && !microvm::kvm_opens() {
        purposes.push(Purpose::Emulation);
    }
    setup::ensure_installed(&purposes)?;
    build_side_by_side(plan)
}

fn build_side_by_side(plan: &BuildPlan) -> Result<()> {
    let (verdict, kvm_usable) = mpsc::channel();
    thread::scope(|scope| {
        let mut builds = Vec::new();
        if plan.kernel {
            builds.push(
                scope.spawn(|| report_failure(kernel::run(&kernel::Args::default()).map(drop))),
            );
        }
        if plan.emulation {
            builds.push(scope.spawn(move || {
                // No verdict: the monitor could not be built.
                let needed = !microvm::kvm_opens() || kvm_usable.recv() == Ok(false);
                report_failure(if needed { microvm::prepare_emulated_host() } else { Ok(()) })
            }));
        }
        let binaries = build_monitor(plan.profile)
            .and_then(|()| {
                if plan.emulation {
                    // A receiver that is gone has failed, which is reported below.
                    let _ = verdict.send(microvm::probe_passes(&plan.profile.bin_dir()));
                }
                build_packages(plan)
            })
            .and_then(|()| rootfs::run(&rootfs::Args::default()).map(drop));
        drop(verdict);
        let binaries = report_failure(binaries);
        builds.into_iter().map(join_build).fold(binaries, Result::and)
    })
}

/// Prints an error at once, because the other builds may take minutes to end. They are not
/// cancelled: the cache keeps their results.
fn report_failure(result: Result<()>) -> Result<()> {
    if let Err(error) = &result {
        print_note(&format!("failed: {error:#}; waiting for the other builds"));
    }
    result
}

fn join_build(build: ScopedJoinHandle<'_, Result<()>>) -> Result<()> {
    build.join().map_err(|_| anyhow!("a build panicked"))?
}

fn build_packages(plan: &BuildPlan) -> Result<()> {
    let mut cargo = new_command("cargo", ["build", "--profile", &plan.profile.to_string()]);
    cargo.args(plan.packages.iter().flat_map(|package| ["--package", package]));
    let label = format!("Building {}", plan.packages.join(" and "));
    follow_cargo(&mut cargo, &label, PACKAGE_CRATES)
}

/// Builds the monitor, statically linked. The shipped one is optimized as a whole: it starts 2.5
/// virtual milliseconds earlier and takes 1.7 MiB less memory. Cargo applies that to one program
/// only in a separate command; `cargo build` builds a monitor that does the same with shared
/// libraries.
pub fn build_monitor(profile: Profile) -> Result<()> {
    let profile_name = profile.to_string();
    let package = ["--package", "chitin-vmm", "--bin", "chitin-vmm"];
    let mut cargo = new_command("cargo", ["rustc", "--profile", &profile_name]);
    cargo.args(package).args(["--", "-C", "target-feature=+crt-static"]);
    if profile == Profile::Release {
        cargo.env("CARGO_PROFILE_RELEASE_LTO", "fat");
    }
    follow_cargo(&mut cargo, "Building the monitor", MONITOR_CRATES)
}

fn follow_cargo(cargo: &mut Command, label: &str, crates: u64) -> Result<()> {
    Progress::follow_cargo(cargo.current_dir(workspace::root_dir()), label, crates)
}
