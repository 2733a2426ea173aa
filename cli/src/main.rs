//! The command line of Chitin: arguments in, a sandbox run, an exit code out.
#![forbid(unsafe_code)]

mod audit;
mod doctor;
mod error;
mod jail_args;
mod logging;
mod machine_args;
mod policy;
mod policy_args;
mod report;
mod run;
mod template;
mod weaker_tier;

use std::process::exit;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};

use crate::error::{CHITIN_FAILED, CliError};
use crate::logging::LogArgs;

/// Run untrusted agent code in sandboxes with a hardware boundary.
#[derive(Parser)]
#[command(
    name = "chitin",
    version,
    arg_required_else_help = true,
    after_help = "Examples:
  chitin doctor
  chitin run -- python3 -c 'print(6 * 7)'
  chitin run --allow api.example.com:443 --copy-in agent.py:/work/ -- python3 agent.py
  chitin template build py --warm-up 'python3 -c \"import json, ssl\"'
  chitin run --template py -- python3 -c 'print(1)'

`chitin COMMAND --help` describes a command and has more examples.

Environment:
  CHITIN_LOG        log filter if -v is not given, in the syntax of the Rust crate
                    tracing-subscriber: info, debug, chitin_broker=trace,chitin=info
  CHITIN_ARTIFACTS  directory of the guest kernel and the root image
  CHITIN_TEMPLATES  directory of the templates
  CHITIN_VMM        path of the monitor"
)]
struct Cli {
    #[command(flatten)]
    log: LogArgs,

    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run one command in a new sandbox
    Run(Box<run::Args>),
    /// Build, list, show and remove templates: booted and saved sandboxes to start copies of
    #[command(subcommand)]
    Template(template::Command),
    /// Check policies: files that say what a sandbox may do
    #[command(subcommand)]
    Policy(policy::Command),
    /// Report which tiers this host can run, and the reason for each that it cannot
    Doctor(doctor::Args),
    /// Attack sandboxes from inside and report which promises held
    Audit(audit::Args),
}

fn main() {
    // The environment may contain secrets already.
    if let Err(error) = chitin::harden_process() {
        let error = CliError::from(error);
        error.print();
        exit(error.exit_code().into());
    }
    let cli = Cli::try_parse().unwrap_or_else(|error| exit(report_usage(&error).into()));
    // `exit` instead of a return: the thread that reads standard input may be blocked for ever.
    exit(match execute(cli) {
        Ok(code) => code.into(),
        Err(error) => {
            error.print();
            error.exit_code().into()
        }
    });
}

/// Prints help, version or a usage error, and returns the exit code.
fn report_usage(error: &clap::Error) -> u8 {
    let is_help = error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand;
    if is_help || !error.use_stderr() {
        // A closed pipe is no reason to complain.
        let _ = error.print();
    } else {
        eprintln!("chitin: {}", error::usage_line(error));
    }
    if error.use_stderr() { CHITIN_FAILED } else { 0 }
}

fn execute(cli: Cli) -> Result<u8, CliError> {
    cli.log.install()?;
    // One thread is enough: all the work is moving bytes.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(CliError::io("start the async runtime"))?;
    let code = runtime.block_on(async {
        match cli.command {
            Command::Run(args) => run::run_command(*args).await,
            Command::Template(command) => template::execute(command).await,
            Command::Policy(command) => policy::execute(command),
            Command::Doctor(args) => doctor::print_diagnosis(&args).await,
            Command::Audit(args) => audit::run_audit(&args, cli.log.is_verbose()).await,
        }
    });
    runtime.shutdown_background();
    code
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn options_do_not_conflict() {
        Cli::command().debug_assert();
    }

    #[test]
    fn options_after_the_program_belong_to_it() {
        let cli = Cli::try_parse_from(["chitin", "run", "-v", "--", "ls", "-v", "-vv"]).unwrap();
        assert_eq!(cli.log.verbosity(), 1);
        let cli = Cli::try_parse_from(["chitin", "-vv", "run", "ls", "-v"]).unwrap();
        assert_eq!(cli.log.verbosity(), 2);
    }
}
