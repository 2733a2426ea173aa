//! `chitin doctor`: reports which tiers this host can run.

use chitin::doctor::{Diagnosis, TierAvailability, diagnose_host};
use chitin::host::{Grade, HostFinding, check_host, render_document};
use chitin::{Artifacts, TierKind, printable, printable_json};

use crate::error::CliError;
use crate::output::output;

/// Arguments of `chitin doctor`.
#[derive(clap::Args)]
#[command(after_help = "Exit code: 0 if microVMs run on this host, 1 if not. With --host, 0; with
--host --strict, 1 if a check is bad or a warning.

Examples:
  chitin doctor
  chitin doctor --json | jq .ironclaw
  chitin doctor --host")]
pub struct Args {
    /// Print JSON instead of text
    #[arg(long)]
    json: bool,
    /// Check the settings of the host that weaken every sandbox: SMT, KSM, swap, mitigations, and
    /// so on. docs/host.md describes them
    #[arg(long)]
    host: bool,
    /// Exit with code 1 if a check of the host is bad or a warning
    #[arg(long, requires = "host")]
    strict: bool,
    /// Print the table of docs/host.md
    #[arg(long, hide = true)]
    document: bool,
}

/// Examines the host and prints the result.
pub async fn print_diagnosis(args: &Args) -> Result<u8, CliError> {
    if args.document {
        output!("{}", render_document().trim_end());
        return Ok(0);
    }
    if args.host {
        return print_host(args);
    }
    let diagnosis = diagnose_host(&Artifacts::locate()).await;
    if args.json {
        let json = serde_json::to_string_pretty(&diagnosis)
            .map_err(|error| CliError::io("encode the diagnosis")(error.into()))?;
        output!("{}", printable_json(&json));
    } else {
        print_text(&diagnosis);
    }
    Ok(if diagnosis.ironclaw { 0 } else { 1 })
}

fn print_text(diagnosis: &Diagnosis) {
    for check in &diagnosis.checks {
        let detail = printable(&check.detail);
        output!("{} {:<13} {detail}", if check.ok { "ok" } else { "NO" }, check.name);
    }
    for TierAvailability { tier, capabilities, unavailable } in &diagnosis.tiers {
        match (capabilities, unavailable) {
            (Some(found), _) => {
                let version = printable(&found.version);
                output!("{tier}: available ({} {version})", found.implementation);
                let others = found.short_of.iter().map(String::as_str);
                for other in others.chain(found.list_known_faults().iter().copied()) {
                    output!("  {}", printable(other));
                }
            }
            // The checks above give the reasons.
            (None, _) if *tier == TierKind::Ironclaw => {
                output!("{tier}: not available on this host, for the reasons marked NO");
            }
            (None, Some(unavailable)) => {
                let reason = printable(&unavailable.to_string());
                output!("{tier}: not available on this host: {reason}");
            }
            (None, None) => {}
        }
    }
}

fn print_host(args: &Args) -> Result<u8, CliError> {
    let findings = check_host();
    if args.json {
        let json = serde_json::to_string_pretty(&findings)
            .map_err(|error| CliError::io("encode the findings")(error.into()))?;
        output!("{}", printable_json(&json));
    } else {
        print_findings(&findings);
    }
    let weak = findings.iter().any(|finding| finding.grade >= Grade::Warning);
    Ok(u8::from(args.strict && weak))
}

fn print_findings(findings: &[HostFinding]) {
    for finding in findings {
        let HostFinding { name, grade, source, found, reason, remedy } = finding;
        output!("{grade:<8} {name}: {}", printable(found));
        if let Some(remedy) = remedy {
            output!("         {source}");
            output!("         {reason}");
            output!("         remedy: {remedy}");
        }
    }
    let count = |grade| findings.iter().filter(|finding| finding.grade == grade).count();
    let [ok, unknown] = [Grade::Ok, Grade::Unknown].map(count);
    let [warnings, bad] = [Grade::Warning, Grade::Bad].map(count);
    output!("{ok} ok, {warnings} warnings, {bad} bad, {unknown} unknown");
}
