//! `chitin policy`: inspects a policy before it is used.

use std::path::PathBuf;

use chitin::{Policy, printable};

use crate::error::CliError;
use crate::output::output;

/// Commands about policies.
#[derive(clap::Subcommand)]
#[command(after_help = "docs/policy.md describes policies, with examples.

Examples:
  chitin policy check scraper.yaml
  chitin policy schema > policy.schema.json
  chitin run --policy scraper.yaml -- python3 scrape.py
  chitin run --policy scraper.yaml --policy-may env,file -- python3 scrape.py")]
pub enum Command {
    /// Explain in words what a policy allows, and what enforces it on each tier
    Check {
        /// The policy
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Print the JSON Schema of policies, for editors
    Schema,
}

/// Executes a command about policies.
pub fn execute(command: Command) -> Result<u8, CliError> {
    match command {
        Command::Check { file } => {
            // Text of a third party must not steer the terminal.
            for line in Policy::load(file).map_err(chitin::Error::from)?.explain().lines() {
                output!("{}", printable(line));
            }
        }
        Command::Schema => output!("{}", Policy::schema().trim_end()),
    }
    Ok(0)
}
