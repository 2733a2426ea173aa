//! `chitin audit`: attacks sandboxes from inside and says what held.

use std::path::PathBuf;

use chitin::Sandbox;
use chitin::audit::{self, Finding, Verdict, Wall};
use serde::Serialize;

use crate::failure::Failure;
use crate::report::write_json;

/// A promised property did not hold.
const BROKEN: u8 = 1;

/// Arguments of `chitin audit`.
#[derive(clap::Args)]
#[command(after_help = "Exit code: 0 if everything held that is promised, 1 if not.

Examples:
  chitin audit
  chitin audit --verbose --json audit.json
  chitin audit --document                       # what is promised, as docs/tiers.md")]
pub struct Args {
    /// Memory of each sandbox in MiB
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    memory: u64,

    /// Show every attack
    #[arg(long, short)]
    verbose: bool,

    /// Write every attack as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Only print what is promised, in Markdown
    #[arg(long, conflicts_with_all = ["json", "verbose"])]
    document: bool,
}

#[derive(Serialize)]
struct Report {
    chitin: &'static str,
    tiers: Vec<Tier>,
}

#[derive(Serialize)]
struct Tier {
    tier: &'static str,
    findings: Vec<Finding>,
}

pub async fn run(args: &Args) -> Result<u8, Failure> {
    if args.document {
        print!("{}", audit::document());
        return Ok(0);
    }
    println!("{:<20} {:<13} EVIDENCE", "PROPERTY", "IRONCLAW");
    let builder = Sandbox::builder().memory_mib(args.memory);
    let findings = audit::audit(&builder, Wall::Kvm, |finding| show(finding, args.verbose)).await?;
    let broken = findings.iter().any(|finding| finding.verdict == Verdict::Broken);
    if let Some(path) = &args.json {
        let tiers = vec![Tier { tier: "ironclaw", findings }];
        write_json(path, &Report { chitin: env!("CARGO_PKG_VERSION"), tiers })?;
    }
    Ok(if broken { BROKEN } else { 0 })
}

fn show(finding: &Finding, verbose: bool) {
    let verdict = match finding.verdict {
        Verdict::Held => "held",
        Verdict::Broken => "BROKEN",
        Verdict::NotPromised => "not promised",
    };
    let evidence = match (finding.verdict, verbose) {
        (Verdict::Held, false) => format!("{} attacks failed", finding.attacks.len()),
        (Verdict::Held, true) => String::new(),
        _ => finding.evidence.clone(),
    };
    println!("{:<20} {verdict:<13} {}", finding.property, crate::failure::printable(&evidence));
    if verbose {
        for attack in &finding.attacks {
            let outcome = if attack.succeeded { "SUCCEEDED" } else { "failed" };
            let line = format!("{}: {outcome}: {}", attack.tried, attack.seen);
            println!("  {}", crate::failure::printable(&line));
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_is_promised_is_written_down() {
        let committed = include_str!("../../docs/tiers.md");
        assert_eq!(
            committed,
            chitin::audit::document(),
            "write it anew: chitin audit --document > docs/tiers.md"
        );
    }
}
