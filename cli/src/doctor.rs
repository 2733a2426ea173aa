use chitin::Artifacts;

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
        let json = serde_json::to_string_pretty(&diagnosis)
            .map_err(|error| Failure::Io { what: "encode the diagnosis".into(), source: error.into() })?;
        println!("{json}");
    } else {
        for check in &diagnosis.checks {
            println!("{} {:<13} {}", if check.ok { "ok" } else { "NO" }, check.name, check.detail);
        }
        match diagnosis.ironclaw {
            true => println!("ironclaw (microVM): ready"),
            false => println!("ironclaw (microVM): not on this host, for the reasons marked NO"),
        }
    }
    Ok(if diagnosis.ironclaw { 0 } else { 1 })
}
