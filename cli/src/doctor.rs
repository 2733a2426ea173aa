//! `chitin doctor`: reports which tiers this host can run.

use chitin::doctor::{Diagnosis, TierAvailability, diagnose_host};
use chitin::{Artifacts, TierKind};

use crate::error::CliError;

/// Arguments of `chitin doctor`.
#[derive(clap::Args)]
#[command(after_help = "Exit code: 0 if microVMs run on this host, 1 if not.

Examples:
  chitin doctor
  chitin doctor --json | jq .ironclaw")]
pub struct Args {
    /// Print JSON instead of text
    #[arg(long)]
    json: bool,
}

/// Examines the host and prints the result.
pub async fn print_diagnosis(args: &Args) -> Result<u8, CliError> {
    let diagnosis = diagnose_host(&Artifacts::locate()).await;
    if args.json {
        let json = serde_json::to_string_pretty(&diagnosis)
            .map_err(|error| CliError::io("encode the diagnosis")(error.into()))?;
        println!("{json}");
    } else {
        print_text(&diagnosis);
    }
    Ok(if diagnosis.ironclaw { 0 } else { 1 })
}

fn print_text(diagnosis: &Diagnosis) {
    for check in &diagnosis.checks {
        println!("{} {:<13} {}", if check.ok { "ok" } else { "NO" }, check.name, check.detail);
    }
    for TierAvailability { tier, capabilities, unavailable } in &diagnosis.tiers {
        match (capabilities, unavailable) {
            (Some(found), _) => {
                println!("{tier}: available ({} {})", found.implementation, found.version);
                for other in &found.short_of {
                    println!("  {other}");
                }
            }
            // The checks above give the reasons.
            (None, _) if *tier == TierKind::Ironclaw => {
                println!("{tier}: not available on this host, for the reasons marked NO");
            }
            (None, Some(unavailable)) => {
                println!("{tier}: not available on this host: {unavailable}");
            }
            (None, None) => {}
        }
    }
}
