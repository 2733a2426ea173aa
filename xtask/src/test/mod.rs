//! `cargo xtask test`: every check and every test, or the end-to-end tests that a filter and a tier
//! select.
//!
//! ```text
//! sources:  format, dependencies, clippy, rustdoc, build of the tests ─┐
//! products: kernel, image, chitin, programs, OpenBao ──────────────────┴─▶ unit, doc tests ─┐
//!   ┌───────────────────────────────────────────────────────────────────────────────────────┘
//!   ├─▶ containers ──────────────────────────────────┐
//!   └─▶ microVMs in parts, one for each processor ───┴─▶ hostile guests, fuzz targets
//! ```

use std::process::{Command, ExitCode};
use std::thread;

use anyhow::{Context, Result};

use self::results::TestLog;
use self::selection::{END_TO_END, Selection, Tier};
use self::stages::Stages;
use crate::build::{self, BuildPlan, Profile};
use crate::parts::{Part, run_parts, stream_output};
use crate::process::new_command;
use crate::setup::{self, Purpose};
use crate::{fuzz, microvm, openbao, programs, workspace};

mod microvms;
mod results;
mod selection;
mod stages;

/// Run every check and every test
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Run only the end-to-end tests with this in their name, or in that of their file
    filter: Option<String>,
    /// Run only the end-to-end tests of this tier
    #[arg(long)]
    tier: Option<Tier>,
    /// Run the conformance cases of nemoclaw with Podman as well, which takes ten minutes more
    #[arg(long)]
    podman: bool,
}

/// Installs and builds what is missing, then tests. The summary names the slowest tests and what
/// was left out.
pub fn run(args: &Args) -> Result<ExitCode> {
    let suite = Suite { podman: args.podman, ..Suite::default() };
    if !args.podman {
        suite.stages.leave_out("nemoclaw on Podman, a daemon in place of Docker: --podman");
    }
    setup::ensure_installed(&[Purpose::Tests])?;
    let selection = if args.filter.is_none() && args.tier.is_none() {
        suite.run_all()?
    } else {
        Some(suite.run_selected(args)?)
    };
    Ok(suite.summarize(selection.as_ref()))
}

/// The cases that cannot hold on Podman. It mounts its own `/tmp` over the one that it is given, and
/// only the memory limit bounds it (`docs/conformance.md`).
const PODMAN_TMP: &str = "each_scratch_directory_is_limited|policy_limits_disk";

/// One run, with all that it found.
#[derive(Debug, Default)]
struct Suite {
    podman: bool,
    stages: Stages,
    log: TestLog,
}

impl Suite {
    /// Runs all stages. Returns no selection if a build or a check of the sources failed.
    fn run_all(&self) -> Result<Option<Selection>> {
        setup::ensure_installed(&[Purpose::Nanoclaw, Purpose::Nemoclaw, Purpose::Fuzzing])?;
        thread::scope(|scope| {
            scope.spawn(|| self.check_sources());
            self.stages.run("products", || self.build_products(true).map(|()| true));
        });
        if !self.stages.passed() {
            return Ok(None);
        }
        let selection = Selection::find_all()?;
        self.stages.run("unit tests", || self.run_unit_tests(&selection));
        self.stages.run("doc tests", || {
            self.stream("doc", cargo(&["test", "--workspace", "--doc", "--quiet"]))
        });
        self.run_end_to_end(&selection)?;
        let mut attacks = vec![hostile_part()?];
        attacks.extend(fuzz::parts(fuzz::SECONDS)?);
        self.stages.run("hostile guests and fuzzing", || self.run_parts(&attacks));
        Ok(Some(selection))
    }

    /// Runs the end-to-end tests that filter and tier select.
    fn run_selected(&self, args: &Args) -> Result<Selection> {
        let selection = Selection::find_matching(args.filter.as_deref(), args.tier)?;
        for what in ["checks of the sources", "unit and doc tests", "hostile guests", "fuzzing"] {
            self.stages.leave_out(what);
        }
        for (tier, purpose) in
            [(Tier::Nanoclaw, Purpose::Nanoclaw), (Tier::Nemoclaw, Purpose::Nemoclaw)]
        {
            if selection.count(tier) > 0 {
                setup::ensure_installed(&[purpose])?;
            }
        }
        let microvms = selection.count(Tier::Ironclaw) > 0;
        for tier in Tier::ALL {
            match selection.count(tier) {
                0 => self.stages.leave_out(format!("all tests of {tier}")),
                count => eprintln!("test: {count} tests of {tier}"),
            }
        }
        if !self.stages.run("products", || self.build_products(microvms).map(|()| true)) {
            return Ok(selection);
        }
        self.run_end_to_end(&selection)?;
        Ok(selection)
    }

    /// Prints stages, slowest tests, failures and skipped tests, and in the last line the number of
    /// each. A test that was selected and not run is a failure of this command.
    fn summarize(&self, selection: Option<&Selection>) -> ExitCode {
        eprintln!();
        for line in self.stages.summary().into_iter().chain(self.log.summary()) {
            eprintln!("{line}");
        }
        let names = selection.into_iter().flat_map(Selection::report_names);
        let skipped = self.log.missing(names);
        skipped.iter().for_each(|name| eprintln!("skipped: {name}"));
        let (passed, failed) = self.log.counts();
        eprintln!("test: {passed} passed, {failed} failed, {} skipped", skipped.len());
        if self.stages.passed() && failed == 0 && skipped.is_empty() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }

    /// Checks the sources, and compiles what the tests need of them.
    fn check_sources(&self) {
        self.stages.run("format", || self.stream("fmt", cargo(&["fmt", "--all", "--check"])));
        self.stages.run("dependencies", || {
            let checks = ["deny", "--workspace", "check", "bans", "licenses", "sources"];
            self.stream("deny", cargo(&checks))
        });
        self.stages.run("clippy", || {
            let all = ["clippy", "--workspace", "--all-targets", "--", "--deny", "warnings"];
            self.stream("clippy", cargo(&all))
        });
        self.stages.run("rustdoc", || {
            let mut doc = cargo(&["doc", "--workspace", "--no-deps"]);
            doc.env("RUSTDOCFLAGS", "--deny warnings");
            self.stream("doc", doc)
        });
        self.stages.run("build of the tests", || {
            self.stream("build", cargo(&["nextest", "run", "--workspace", "--no-run"]))
        });
        self.stages.run("build of the fuzz targets", || self.stream("fuzz", fuzz::build_command()));
    }

    fn build_products(&self, microvms: bool) -> Result<()> {
        build::install_and_build(&BuildPlan {
            kernel: microvms,
            emulation: microvms,
            profile: Profile::Release,
            packages: &["chitin-cli"],
        })?;
        programs::run(&programs::Args::default())?;
        openbao::run(&openbao::Args::default()).map(drop)
    }

    fn run_unit_tests(&self, selection: &Selection) -> Result<bool> {
        let mut command = cargo(&["nextest", "run"]);
        command.args(selection.scope.options());
        command.args(["--filterset", &format!("not package({END_TO_END})")]);
        self.stream("unit", command)
    }

    /// Runs the tests of the container tiers, which need no KVM, next to a separate Docker daemon.
    fn run_containers(&self, selection: &Selection) -> Result<bool> {
        // Built with the tests, as every binary of their package.
        let with_dockerd = workspace::target_dir().join("debug/with-dockerd");
        let words = ["cargo", "nextest", "run", "--profile", "containers"];
        let mut command = new_command(with_dockerd, words);
        command.args(selection.scope.options()).args(selection.options(None));
        command.current_dir(workspace::root_dir());
        self.stream("containers", command)
    }

    /// Runs the conformance tests of nemoclaw again, with a separate service of Podman.
    fn run_podman(&self, selection: &Selection) -> Result<bool> {
        let with_dockerd = workspace::target_dir().join("debug/with-dockerd");
        let words = ["--podman", "cargo", "nextest", "run", "--profile", "containers"];
        let mut command = new_command(with_dockerd, words);
        self.stages.leave_out(format!("on Podman, which mounts its own /tmp: {PODMAN_TMP}"));
        let only =
            format!("binary(conformance) & test(/(^|::)nemoclaw::/) & not test(/{PODMAN_TMP}/)");
        command.args(selection.scope.options()).args(selection.options(Some(&only)));
        // A filter may select none of them.
        command.arg("--no-tests=pass").current_dir(workspace::root_dir());
        self.stream("podman", command)
    }

    /// Runs the end-to-end tests. Those on emulated hosts run next to those of containers, which
    /// mostly wait. On this machine they would not: each tier checks that it leaves no process.
    fn run_end_to_end(&self, selection: &Selection) -> Result<()> {
        let containers = || {
            if selection.count(Tier::Nanoclaw) + selection.count(Tier::Nemoclaw) > 0 {
                self.stages.run("containers", || self.run_containers(selection));
            }
            if self.podman && selection.count(Tier::Nemoclaw) > 0 {
                self.stages.run("containers of Podman", || self.run_podman(selection));
            }
        };
        if selection.count(Tier::Ironclaw) == 0 {
            containers();
        } else if microvm::is_usable(&Profile::Release.bin_dir())? {
            containers();
            self.stages
                .run("microVMs", || self.stream("microvm", microvms::local_command(selection)));
        } else {
            microvm::prepare_emulated_host()?;
            let parts = microvms::nested_parts(selection)?;
            thread::scope(|scope| {
                scope.spawn(containers);
                self.stages.run("microVMs", || self.run_parts(&parts));
            });
        }
        Ok(())
    }

    /// Runs parts and records the tests that they report.
    fn run_parts(&self, parts: &[Part]) -> Result<bool> {
        let code = run_parts(microvms::host_count(), parts, &|line| self.log.observe(line))?;
        Ok(code == ExitCode::SUCCESS)
    }

    /// Runs a command and records the tests that it reports.
    fn stream(&self, name: &str, mut command: Command) -> Result<bool> {
        // Colours would be part of the lines.
        command.env("CARGO_TERM_COLOR", "never");
        let status = stream_output(&mut command, name, &|line| self.log.observe(line))?;
        Ok(status.success())
    }
}

fn hostile_part() -> Result<Part> {
    let xtask = std::env::current_exe().context("find this program")?;
    Ok(Part::local("hostile guests", new_command(xtask, ["hostile"])))
}

fn cargo(args: &[&str]) -> Command {
    let mut command = new_command("cargo", args);
    command.current_dir(workspace::root_dir());
    command
}

#[cfg(test)]
#[path = "threat_model_test.rs"]
mod threat_model_test;
