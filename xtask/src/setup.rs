//! `cargo xtask setup`: installs what the other commands need and is not there yet.

use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};

use crate::process::{command, exists, output, run_aloud, start_failure};
use crate::static_build::TARGET as MUSL;

/// Debian packages, and what each is for.
const PACKAGES: [(&str, &str); 13] = [
    ("build-essential", "compiler, linker and make for the guest kernel"),
    ("flex", "the kernel's configuration parser"),
    ("bison", "the kernel's configuration parser"),
    ("bc", "the kernel's generated headers"),
    ("libelf-dev", "the kernel's objtool, which checks and patches its code"),
    ("patch", "our patches to the kernel"),
    ("xz-utils", "unpacking kernel source and modules"),
    ("qemu-system-x86", "the emulated machine of cargo xtask nested"),
    ("erofs-utils", "mkfs.erofs makes the root image"),
    ("fakeroot", "gives the root image's files their owners without being root"),
    ("libssl-dev", "the server that tests of vaults ask"),
    ("pkg-config", "finding that library"),
    ("ca-certificates", "downloads"),
];

/// Install what the other commands need: Debian packages, a Rust target, cargo-nextest, cargo-fuzz
#[derive(Debug, Default, clap::Args)]
pub struct Args {
    /// Only say what is missing; exit code 1 if anything is
    #[arg(long)]
    check: bool,
}

/// One thing that is missing, and the command that installs it.
struct Missing {
    what: String,
    why: String,
    install: Vec<String>,
    needs_root: bool,
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
        if item.needs_root {
            // A fresh container has no package lists, and stale ones name versions that are gone.
            install(&["apt-get".into(), "update".into()])?;
        }
        install(&item.install)?;
    }
    if let Some(item) = missing.iter().find(|item| !root && item.needs_root) {
        eprintln!("\nInstalling packages needs root. Run this, then cargo xtask setup again:\n");
        eprintln!("    sudo apt-get update && sudo {}\n", item.install.join(" "));
        return Ok(ExitCode::from(1));
    }
    Ok(ExitCode::SUCCESS)
}

fn missing() -> Result<Vec<Missing>> {
    let mut missing = Vec::new();
    let packages = missing_packages()?;
    if !packages.is_empty() {
        let names: Vec<&str> = packages.iter().map(|(name, _)| *name).collect();
        let reasons: Vec<String> = packages.iter().map(|(name, why)| format!("{name}: {why}")).collect();
        let mut install =
            ["apt-get", "install", "--yes", "--no-install-recommends"].map(str::to_owned).to_vec();
        install.extend(names.iter().map(|name| (*name).to_owned()));
        missing.push(Missing {
            what: format!("Debian packages {}", names.join(" ")),
            why: reasons.join("\n        "),
            install,
            needs_root: true,
        });
    }
    if !exists("npm") {
        // Not among the packages above: an npm that came another way counts as well, and Debian's is three hundred packages.
        let install =
            ["apt-get", "install", "--yes", "--no-install-recommends", "npm"].map(str::to_owned).to_vec();
        missing.push(Missing {
            what: "npm".into(),
            why: "fetching the programs, Node and one in Go, that tests run under a policy".into(),
            install,
            needs_root: true,
        });
    }
    if !musl_target()? {
        missing.push(Missing {
            what: format!("Rust target {MUSL}"),
            why: "the static agent, which is PID 1 of every sandbox".into(),
            install: ["rustup", "target", "add", MUSL].map(str::to_owned).to_vec(),
            needs_root: false,
        });
    }
    if !exists("cargo-nextest") {
        missing.push(Missing {
            what: "cargo-nextest".into(),
            why: "cargo xtask test: one process and one time limit per test".into(),
            install: ["cargo", "install", "--locked", "cargo-nextest"].map(str::to_owned).to_vec(),
            needs_root: false,
        });
    }
    if !exists("cargo-fuzz") {
        missing.push(Missing {
            what: "cargo-fuzz".into(),
            why: "cargo xtask fuzz: instrumented builds of the fuzz targets".into(),
            install: ["cargo", "install", "--locked", "cargo-fuzz"].map(str::to_owned).to_vec(),
            needs_root: false,
        });
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
    let mut query = command("dpkg-query", ["--show", "--showformat=${Package} ${db:Status-Abbrev}\\n"]);
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
