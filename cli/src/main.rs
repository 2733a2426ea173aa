//! The command line of Chitin: arguments in, a sandbox run, an exit code out.
#![forbid(unsafe_code)]

mod audit;
mod doctor;
mod failure;
mod jail;
mod machine;
mod policy;
mod report;
mod run;
mod template;
mod tiers;

use std::process::exit;

use clap::{Parser, Subcommand};

use crate::failure::{CHITIN_FAILED, Failure};

/// Run untrusted agent code behind a hardware wall.
#[derive(Parser)]
#[command(name = "chitin", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a command in a sandbox of its own
    Run(Box<run::Args>),
    /// Sandboxes that were booted and saved, to start copies of
    #[command(subcommand)]
    Template(template::Command),
    /// What a sandbox may do, in a file
    #[command(subcommand)]
    Policy(policy::Command),
    /// Say what this host can do, and why not
    Doctor(doctor::Args),
    /// Attack sandboxes from inside, and say what held
    Audit(audit::Args),
}

fn main() {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if !error.use_stderr() => {
            // Help or version was asked for. A closed pipe is no reason to complain.
            let _ = error.print();
            exit(0);
        }
        Err(error) => {
            if error.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
                let _ = error.print();
                exit(CHITIN_FAILED.into());
            }
            eprintln!("chitin: {}", failure::usage_line(&error));
            exit(CHITIN_FAILED.into());
        }
    };
    // `exit` instead of a return: the thread that reads standard input may be blocked in it for ever.
    exit(match execute(cli.command) {
        Ok(code) => code.into(),
        Err(failure) => {
            failure.print();
            failure.exit_code().into()
        }
    });
}

fn execute(command: Command) -> Result<u8, Failure> {
    // One thread does: all the work is moving bytes.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| Failure::Io { what: "start the runtime".into(), source })?;
    let code = runtime.block_on(async {
        match command {
            Command::Run(args) => run::run(*args).await,
            Command::Template(command) => template::run(command).await,
            Command::Policy(command) => policy::run(command),
            Command::Doctor(args) => doctor::run(&args).await,
            Command::Audit(args) => audit::run(&args).await,
        }
    });
    runtime.shutdown_background();
    code
}
