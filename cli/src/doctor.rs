use chitin::doctor::Availability;
use chitin::{Artifacts, TierKind};

use crate::failure::Failure;

/// Arguments of `chitin doctor`.
#[derive(clap::Args)]
#[command(after_help = "Exit code: 0 if microVMs run here, 1 if not.

Examples:
  chitin doctor
  chitin doctor --json | jq .ironclaw")]
pub struct Args {
    /// Print JSON instead of text
    #[arg(long)]
    json: bool,
}

pub async fn run(args: &Args) -> Result<u8, Failure> {
    let diagnosis = chitin::doctor::diagnose(&Artifacts::locate()).await;
    if args.json {
        let json = serde_json::to_string_pretty(&diagnosis).map_err(|error| Failure::Io {
            what: "encode the diagnosis".into(),
            source: error.into(),
        })?;
        println!("{json}");
    } else {
        for check in &diagnosis.checks {
            println!("{} {:<13} {}", if check.ok { "ok" } else { "NO" }, check.name, check.detail);
        }
        for Availability { tier, capabilities, unavailable } in &diagnosis.tiers {
            match (capabilities, unavailable) {
                (Some(found), _) => {
                    println!("{tier}: ready ({} {})", found.implementation, found.version);
                    for other in &found.short_of {
                        println!("  {other}");
                    }
                }
                // Its reasons stand above.
                (None, _) if *tier == TierKind::Ironclaw => {
                    println!("{tier}: not on this host, for the reasons marked NO");
                }
                (None, Some(unavailable)) => println!("{tier}: not on this host: {unavailable}"),
                (None, None) => {}
            }
        }
    }
    Ok(if diagnosis.ironclaw { 0 } else { 1 })
}
