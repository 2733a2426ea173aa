//! `chitin policy`: look at a policy before it is used.

use std::path::PathBuf;

use chitin::Policy;

use crate::failure::Failure;

/// What to do with policies.
#[derive(clap::Subcommand)]
#[command(after_help = "What a policy can say, with examples, is in docs/policy.md.

Examples:
  chitin policy check scraper.yaml
  chitin policy schema > policy.schema.json
  chitin run --policy scraper.yaml -- python3 scrape.py")]
pub enum Command {
    /// Say in words what a policy allows, and what keeps it on which tier
    Check {
        /// The policy
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Print the JSON Schema of policies, for editors
    Schema,
}

pub fn run(command: Command) -> Result<u8, Failure> {
    match command {
        Command::Check { file } => {
            print!("{}", Policy::load(file).map_err(chitin::Error::from)?.explain());
        }
        Command::Schema => print!("{}", Policy::schema()),
    }
    Ok(0)
}
