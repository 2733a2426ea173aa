//! The command line of Chitin: arguments in, a sandbox run, an exit code out.
#![forbid(unsafe_code)]

mod audit;
mod doctor;
mod error;
mod jail_args;
mod logging;
mod machine_args;
mod output;
mod policy;
mod policy_args;
mod prune;
mod report;
mod run;
mod template;
mod usage;
mod weaker_tier;

use std::ffi::OsString;
use std::process::exit;
use std::time::Duration;

use clap::{CommandFactory, Parser, Subcommand};

use crate::error::CliError;
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
  CHITIN_VMM        path of the monitor
  CHITIN_RUNTIME_PATH
                    directories of runsc, crun and runc, searched before those of the system; PATH
                    is not searched. A program that others than root can replace is not run"
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
    /// Remove what earlier runs have left behind: containers, images
    Prune(prune::Args),
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
    let args: Vec<OsString> = std::env::args_os().collect();
    let cli = Cli::try_parse_from(&args)
        .unwrap_or_else(|error| exit(usage::report_usage(error, &Cli::command(), &args).into()));
    // `exit` instead of a return: the thread that reads standard input may be blocked for ever.
    let done = execute(cli).and_then(|code| output::finish().map(|()| code));
    exit(match done {
        Ok(code) => code.into(),
        Err(error) => {
            error.print();
            error.exit_code().into()
        }
    });
}

/// Time for clean-up in the background at the end. What is left then is removed by the next start.
const CLEANUP_LIMIT: Duration = Duration::from_secs(5);

fn execute(cli: Cli) -> Result<u8, CliError> {
    cli.log.install()?;
    // One thread is enough: all the work is moving bytes.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(CliError::io("start the async runtime"))?;
    let code = runtime.block_on(async {
        let code = match cli.command {
            Command::Run(args) => run::run_command(*args).await,
            Command::Template(command) => template::execute(command).await,
            Command::Policy(command) => policy::execute(command),
            Command::Doctor(args) => doctor::print_diagnosis(&args).await,
            Command::Prune(args) => prune::prune_host(&args).await,
            Command::Audit(args) => audit::run_audit(&args, cli.log.is_verbose()).await,
        };
        // Trials of runtimes that were given up still have a container to remove.
        let _ = tokio::time::timeout(CLEANUP_LIMIT, chitin::wait_for_cleanup()).await;
        code
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
