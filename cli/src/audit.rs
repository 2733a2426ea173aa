//! `chitin audit`: attacks sandboxes from inside and says what held.

use std::io;
use std::path::PathBuf;

use chitin::audit::{self, Finding, PROPERTIES, Verdict};
use chitin::doctor::Availability;
use chitin::{Artifacts, Boundary, Capabilities, Sandbox, SelectedTier, TierKind, Unavailable};
use serde::Serialize;

use crate::failure::{CHITIN_FAILED, Failure, printable};
use crate::report::write_json;
use crate::tiers::{Tiers, announce};

/// A promised property did not hold.
const BROKEN: u8 = 1;

/// Arguments of `chitin audit`.
#[derive(clap::Args)]
#[command(
    after_help = "Exit code: 0 if everything held that is promised, 1 if not, 125 if the audit could not be made. With `--tier all`
a tier that this host does not have is named and left out: 0 says that at least one was attacked, and that all held that were.

Examples:
  chitin audit
  chitin audit --tier nanoclaw
  chitin audit --tier all --json audit.json
  chitin audit --document                       # what is promised, as docs/tiers.md"
)]
pub struct Args {
    /// Which tier to attack: ironclaw, nanoclaw, nemoclaw, or all that this host has
    #[arg(long, value_name = "T", default_value = "ironclaw")]
    tier: Tiers,

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
    #[arg(long, conflicts_with_all = ["tier", "json", "verbose"])]
    document: bool,
}

#[derive(Serialize)]
struct Report {
    chitin: &'static str,
    tiers: Vec<Tier>,
}

/// What came of a tier.
#[derive(Serialize)]
struct Tier {
    tier: TierKind,
    /// What it is made of here; none if it was not attacked.
    #[serde(flatten)]
    capabilities: Option<Capabilities>,
    wall: Option<Boundary>,
    /// Why this host does not have it.
    not_here: Option<Unavailable>,
    /// Why the audit of it could not be finished.
    failed: Option<String>,
    findings: Vec<Finding>,
}

impl Tier {
    fn new(tier: TierKind) -> Tier {
        Tier {
            tier,
            capabilities: None,
            wall: None,
            not_here: None,
            failed: None,
            findings: Vec::new(),
        }
    }

    fn is_broken(&self) -> bool {
        self.findings.iter().any(|finding| finding.verdict == Verdict::Broken)
    }

    /// What its column says of a property.
    fn cell(&self, property: &str) -> &'static str {
        let found = self.findings.iter().find(|finding| finding.property == property);
        match (found, &self.not_here) {
            (Some(finding), _) => word(finding.verdict),
            (None, Some(_)) => "not here",
            (None, None) => "NOT TRIED",
        }
    }

    fn column(&self) -> String {
        self.tier.to_string().to_uppercase()
    }
}

pub async fn run(args: &Args) -> Result<u8, Failure> {
    if args.document {
        print!("{}", audit::document());
        return Ok(0);
    }
    let mut tiers = Vec::new();
    for kind in args.tier.list() {
        tiers.push(attack(args, kind).await?);
    }
    if args.tier == Tiers::All {
        println!();
        // Standard output that is closed is nobody's to complain about.
        let _ = table(&tiers, &mut io::stdout());
    }
    for tier in &tiers {
        if let Some(reason) = &tier.failed {
            eprintln!(
                "chitin: {}: the audit could not be finished: {}",
                tier.tier,
                printable(reason)
            );
        }
        if let Some(unavailable) = &tier.not_here {
            eprintln!(
                "chitin: {} was not attacked: {}",
                tier.tier,
                printable(&unavailable.to_string())
            );
        }
    }
    let code = exit_code(&tiers);
    if let Some(path) = &args.json {
        write_json(path, &Report { chitin: env!("CARGO_PKG_VERSION"), tiers })?;
    }
    Ok(code)
}

fn exit_code(tiers: &[Tier]) -> u8 {
    let attacked = tiers.iter().any(|tier| !tier.findings.is_empty());
    match tiers.iter().any(Tier::is_broken) {
        true => BROKEN,
        false if !attacked || tiers.iter().any(|tier| tier.failed.is_some()) => CHITIN_FAILED,
        false => 0,
    }
}

/// Attacks one tier, and shows each finding as it comes. Of several, one that cannot be had or fails does not keep the others
/// from being attacked.
async fn attack(args: &Args, kind: TierKind) -> Result<Tier, Failure> {
    let mut tier = Tier::new(kind);
    let all = args.tier == Tiers::All;
    if all {
        tier.not_here = Availability::find(kind, &Artifacts::locate()).await.unavailable;
        if let Some(unavailable) = &tier.not_here {
            println!("{kind:<9} not here: {}", printable(&unavailable.to_string()));
            return Ok(tier);
        }
    }
    let builder = Sandbox::builder().tier(kind).memory_mib(args.memory);
    let done = |chosen: &SelectedTier, finding: Finding| {
        if tier.capabilities.is_none() {
            introduce(chosen, all);
            tier.capabilities = Some(chosen.capabilities.clone());
            tier.wall = Some(chosen.boundary());
        }
        show(&finding, all.then_some(kind), args.verbose);
        tier.findings.push(finding);
    };
    match audit::audit(&builder, done).await {
        Err(error) if all => tier.failed = Some(Failure::from(error).line()),
        outcome => outcome?,
    }
    Ok(tier)
}

/// Says what is attacked.
fn introduce(chosen: &SelectedTier, all: bool) {
    announce(chosen);
    let Capabilities { implementation, version, .. } = &chosen.capabilities;
    let is = printable(&format!("{implementation} {version}"));
    match all {
        true => println!("{:<9} {is}", chosen.tier),
        false => {
            println!("{:<20} {:<13} EVIDENCE ({is})", "PROPERTY", chosen.name().to_uppercase())
        }
    }
}

fn word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Held => "held",
        Verdict::Broken => "BROKEN",
        Verdict::NotPromised => "not promised",
    }
}

/// Shows a finding, and of which tier, if there are several.
fn show(finding: &Finding, tier: Option<TierKind>, verbose: bool) {
    let evidence = match (finding.verdict, verbose) {
        (Verdict::Held, false) => format!("{} attacks failed", finding.attacks.len()),
        (Verdict::Held, true) => String::new(),
        _ => finding.evidence.clone(),
    };
    let tier = tier.map(|tier| format!("{tier:<9} ")).unwrap_or_default();
    println!(
        "{tier}{:<20} {:<13} {}",
        finding.property,
        word(finding.verdict),
        printable(&evidence)
    );
    if verbose {
        for attack in &finding.attacks {
            let outcome = if attack.succeeded { "SUCCEEDED" } else { "failed" };
            let line = format!("{}: {outcome}: {}", attack.tried, attack.seen);
            println!("  {}", printable(&line));
        }
    }
}

/// Property by tier, and under it whatever is not simply held.
fn table(tiers: &[Tier], out: &mut impl io::Write) -> io::Result<()> {
    let row = |first: &str, cells: &mut dyn Iterator<Item = String>| {
        let cells: Vec<String> = cells.map(|cell| format!("{cell:<18}")).collect();
        format!("{first:<20} {}", cells.join(" ")).trim_end().to_owned()
    };
    writeln!(out, "{}", row("PROPERTY", &mut tiers.iter().map(Tier::column)))?;
    let made_of = |tier: &Tier| tier.capabilities.as_ref().map(|is| is.implementation.clone());
    let made_of = |tier: &Tier| printable(&made_of(tier).unwrap_or_else(|| "-".into()));
    writeln!(out, "{}", row("", &mut tiers.iter().map(made_of)))?;
    for property in &PROPERTIES {
        let cells = &mut tiers.iter().map(|tier| tier.cell(property.name).to_owned());
        writeln!(out, "{}", row(property.name, cells))?;
    }
    for tier in tiers {
        if let Some(unavailable) = &tier.not_here {
            writeln!(out, "{}: not here: {}", tier.tier, printable(&unavailable.to_string()))?;
        }
        for finding in tier.findings.iter().filter(|finding| finding.verdict != Verdict::Held) {
            let evidence = printable(&finding.evidence);
            writeln!(
                out,
                "{}: {}: {}: {evidence}",
                tier.tier,
                finding.property,
                word(finding.verdict)
            )?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tier(kind: TierKind, verdicts: &[Verdict]) -> Tier {
        let findings = PROPERTIES.iter().zip(verdicts).map(|(property, verdict)| Finding {
            property: property.name,
            verdict: *verdict,
            evidence: "seen".into(),
            attacks: Vec::new(),
        });
        Tier { findings: findings.collect(), ..Tier::new(kind) }
    }

    fn missing(kind: TierKind) -> Tier {
        let unavailable = Unavailable { reason: "no daemon".into(), remedy: "start it".into() };
        Tier { not_here: Some(unavailable), ..Tier::new(kind) }
    }

    #[test]
    fn what_is_promised_is_written_down() {
        let committed = include_str!("../../docs/tiers.md");
        assert_eq!(
            committed,
            chitin::audit::document(),
            "write it anew: chitin audit --document > docs/tiers.md"
        );
    }

    #[test]
    fn one_break_is_1_and_nothing_attacked_is_a_failure() {
        let held = || tier(TierKind::Nanoclaw, &[Verdict::Held, Verdict::NotPromised]);
        let failed = || Tier { failed: Some("why".into()), ..held() };
        let broken = || tier(TierKind::Nemoclaw, &[Verdict::Held, Verdict::Broken]);
        assert_eq!(exit_code(&[missing(TierKind::Ironclaw), held()]), 0);
        assert_eq!(exit_code(&[missing(TierKind::Ironclaw)]), CHITIN_FAILED);
        assert_eq!(exit_code(&[held(), failed()]), CHITIN_FAILED);
        assert_eq!(exit_code(&[held(), failed(), broken()]), BROKEN);
    }

    #[test]
    fn every_tier_has_a_column_whatever_came_of_it() {
        let tiers = [
            missing(TierKind::Ironclaw),
            tier(TierKind::Nanoclaw, &[Verdict::Held; PROPERTIES.len()]),
            tier(TierKind::Nemoclaw, &[Verdict::Broken]),
        ];
        let mut text = Vec::new();
        table(&tiers, &mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        let lines: Vec<Vec<&str>> =
            text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[0], ["PROPERTY", "IRONCLAW", "NANOCLAW", "NEMOCLAW"]);
        assert_eq!(lines[2], ["host", "files", "not", "here", "held", "BROKEN"]);
        assert_eq!(lines[3], ["host", "processes", "not", "here", "held", "NOT", "TRIED"]);
        assert!(text.contains("\nironclaw: not here: no daemon: start it\n"), "{text}");
        assert!(text.contains("\nnemoclaw: host files: BROKEN: seen\n"), "{text}");
    }
}
