//! `cargo xtask`: everything that builds, runs or measures this workspace and is not `cargo`.
//!
//! One module for each command. To add one, write a module with `pub struct Args` (clap) and
//! `pub fn run(args) -> Result<ExitCode>`, and add a line to [`Task`] and to [`main`].

mod audit;
mod bench;
mod build;
mod cache;
mod debian;
mod demo;
#[cfg(test)]
mod docs_test;
mod duration;
mod fuzz;
mod hostile;
mod kernel;
mod microvm;
mod mutation;
mod nested;
mod openbao;
mod parts;
mod process;
mod programs;
mod progress;
mod pypi;
mod rootfs;
mod sbom;
mod setup;
mod static_build;
mod test;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install missing tools: Debian packages, a Rust target, subcommands of Cargo
    Setup(setup::Args),
    /// Build guest kernel, root image, `chitin`, its monitor and its benchmark tool
    Build(build::Args),
    /// Build the guest kernel, target/artifacts/vmlinux
    Kernel(kernel::Args),
    /// Build the read-only root image, target/artifacts/root.img
    Rootfs(rootfs::Args),
    /// Fetch OpenBao, the server that tests of Vault credentials use, target/artifacts/bao
    Openbao(openbao::Args),
    /// Fetch the programs that tests run in sandboxes, target/programs
    Programs(programs::Args),
    /// Run a command on an emulated machine that has a usable /dev/kvm
    Nested(nested::Args),
    /// Install and build what is missing, then run an agent's script in a microVM
    Demo(demo::Args),
    /// Measure with the deterministic clock, and compare with the committed figures
    Bench(bench::Args),
    /// Fuzz the parsers that a guest or a file can reach
    Fuzz(fuzz::Args),
    /// Write the bill of materials of what is shipped, target/sbom.cdx.json
    Sbom(sbom::Args),
    /// Attack the monitor from bare guests, and print the result of each attack
    Hostile(hostile::Args),
    /// Check that `chitin audit` notices the absence of each protection
    Audit(audit::Args),
    /// The runtime of a mutation of the audit
    #[command(hide = true)]
    AuditRuntime(audit::runtime::Args),
    /// Run every check and every test, or selected end-to-end tests
    Test(test::Args),
}

fn main() -> ExitCode {
    let result = match Cli::parse().task {
        Task::Setup(args) => setup::run(&args),
        Task::Build(args) => build::run(&args),
        Task::Kernel(args) => kernel::run(&args),
        Task::Rootfs(args) => rootfs::run(&args),
        Task::Openbao(args) => openbao::run(&args),
        Task::Programs(args) => programs::run(&args),
        Task::Nested(args) => nested::run(&args),
        Task::Demo(args) => demo::run(&args),
        Task::Bench(args) => bench::run(&args),
        Task::Fuzz(args) => fuzz::run(&args),
        Task::Sbom(args) => sbom::run(&args),
        Task::Hostile(args) => hostile::run(&args),
        Task::Audit(args) => audit::run(&args),
        Task::AuditRuntime(args) => audit::runtime::run(&args),
        Task::Test(args) => test::run(&args),
    };
    result.unwrap_or_else(|error| {
        eprintln!("xtask: {error:#}");
        // 125: xtask failed, and not the command that it runs.
        ExitCode::from(125)
    })
}
