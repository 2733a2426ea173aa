//! `chitin audit`: attacks sandboxes from inside and reports which promises held.

use std::io;
use std::path::PathBuf;

use chitin::audit::{self, Finding, PROPERTIES, Verdict};
use chitin::doctor::probe_tier;
use chitin::{
    Artifacts, Boundary, Capabilities, Sandbox, SelectedTier, TierKind, TierSelection, Unavailable,
    printable,
};
use serde::Serialize;

use crate::error::{CHITIN_FAILED, CliError};
use crate::output::{notice, output};
use crate::report::write_json;
use crate::weaker_tier::warn_if_weaker;

/// The exit code if a promised property did not hold.
const BROKEN: u8 = 1;

/// Arguments of `chitin audit`.
#[derive(clap::Args)]
#[command(after_help = "\
With -v, every attack is shown. With `--tier all`, a tier that is unavailable on this host is \
named and skipped.

Exit code: 0 if every promise of every attacked tier held, 1 if one did not, 125 if an audit \
could not be finished or no tier was attacked.

Examples:
  chitin audit
  chitin audit --tier nanoclaw -v
  chitin audit --tier all --json audit.json
  chitin audit --document > docs/tiers.md       # the promises themselves")]
pub struct Args {
    /// Tier to attack: ironclaw, nanoclaw, nemoclaw, or all
    #[arg(long, value_name = "T", default_value = "ironclaw")]
    tier: TierSelection,

    /// Memory of each sandbox, in MiB or with a unit
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = chitin::parse_mib)]
    memory: u64,

    /// Write every attack as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Print what each tier promises, as Markdown, and attack nothing
    #[arg(long, conflicts_with_all = ["tier", "json"])]
    document: bool,
}

#[derive(Serialize)]
struct Report {
    chitin: &'static str,
    tiers: Vec<TierAudit>,
}

/// The audit of one tier.
#[derive(Serialize)]
struct TierAudit {
    tier: TierKind,
    /// The implementation on this host; none if the tier was not attacked.
    #[serde(flatten)]
    capabilities: Option<Capabilities>,
    /// The boundary of its sandboxes.
    #[serde(rename = "wall")]
    boundary: Option<Boundary>,
    /// The reason for which this host does not have the tier.
    #[serde(rename = "not_here")]
    unavailable: Option<Unavailable>,
    /// The reason for which the audit could not be finished.
    failed: Option<String>,
    findings: Vec<Finding>,
}

impl TierAudit {
    fn new(tier: TierKind) -> TierAudit {
        TierAudit {
            tier,
            capabilities: None,
            boundary: None,
            unavailable: None,
            failed: None,
            findings: Vec::new(),
        }
    }

    fn is_broken(&self) -> bool {
        self.findings.iter().any(|finding| finding.verdict == Verdict::Broken)
    }

    /// Returns the cell of a property in the column of this tier.
    fn to_cell(&self, property: &str) -> &'static str {
        let found = self.findings.iter().find(|finding| finding.property == property);
        match (found, &self.unavailable) {
            (Some(finding), _) => verdict_word(finding.verdict),
            (None, Some(_)) => "unavailable",
            (None, None) => "NOT TRIED",
        }
    }

    /// Returns the heading of the column.
    fn to_heading(&self) -> String {
        self.tier.to_string().to_uppercase()
    }
}

/// Attacks the selected tiers and prints what held.
pub async fn run_audit(args: &Args, is_verbose: bool) -> Result<u8, CliError> {
    if args.document {
        output!("{}", audit::render_document().trim_end());
        return Ok(0);
    }
    let mut tiers = Vec::new();
    for kind in args.tier.to_vec() {
        tiers.push(attack_tier(args, kind, is_verbose).await?);
    }
    if args.tier == TierSelection::All {
        output!("");
        // A closed standard output is no reason to complain.
        let _ = write_table(&tiers, &mut io::stdout());
    }
    for tier in &tiers {
        if let Some(reason) = &tier.failed {
            let reason = printable(reason);
            notice!("chitin: {}: the audit could not be finished: {reason}", tier.tier);
        }
        if let Some(unavailable) = &tier.unavailable {
            let reason = printable(&unavailable.to_string());
            notice!("chitin: {} was not attacked: {reason}", tier.tier);
        }
    }
    let code = choose_exit_code(&tiers);
    if let Some(path) = &args.json {
        write_json(path, &Report { chitin: env!("CARGO_PKG_VERSION"), tiers })?;
    }
    Ok(code)
}

fn choose_exit_code(tiers: &[TierAudit]) -> u8 {
    let is_attacked = tiers.iter().any(|tier| !tier.findings.is_empty());
    match tiers.iter().any(TierAudit::is_broken) {
        true => BROKEN,
        false if !is_attacked || tiers.iter().any(|tier| tier.failed.is_some()) => CHITIN_FAILED,
        false => 0,
    }
}

/// Attacks one tier and prints each finding as it comes.
///
/// If all tiers are selected, one that is unavailable or fails does not stop the others.
async fn attack_tier(args: &Args, kind: TierKind, is_verbose: bool) -> Result<TierAudit, CliError> {
    let mut tier = TierAudit::new(kind);
    let is_one_of_many = args.tier == TierSelection::All;
    if is_one_of_many {
        tier.unavailable = probe_tier(kind, &Artifacts::locate()).await.unavailable;
        if let Some(unavailable) = &tier.unavailable {
            output!("{kind:<9} unavailable: {}", printable(&unavailable.to_string()));
            return Ok(tier);
        }
    }
    let builder = Sandbox::builder().tier(kind).memory_mib(args.memory);
    let on_finding = |selected: &SelectedTier, finding: Finding| {
        if tier.capabilities.is_none() {
            print_tier(selected, is_one_of_many);
            tier.capabilities = Some(selected.capabilities.clone());
            tier.boundary = Some(selected.boundary());
        }
        print_finding(&finding, is_one_of_many.then_some(kind), is_verbose);
        tier.findings.push(finding);
    };
    match audit::attack_properties(&builder, on_finding).await {
        Err(error) if is_one_of_many => tier.failed = Some(CliError::from(error).line()),
        outcome => outcome?,
    }
    Ok(tier)
}

/// Prints the implementation that is attacked: a line if it is one of many, else the headings.
fn print_tier(selected: &SelectedTier, is_one_of_many: bool) {
    warn_if_weaker(selected);
    let Capabilities { implementation, version, .. } = &selected.capabilities;
    let program = printable(&format!("{implementation} {version}"));
    match is_one_of_many {
        true => output!("{:<9} {program}", selected.tier),
        false => {
            let heading = selected.name().to_uppercase();
            output!("{:<20} {heading:<13} EVIDENCE ({program})", "PROPERTY");
        }
    }
}

fn verdict_word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Held => "held",
        Verdict::Broken => "BROKEN",
        Verdict::NotPromised => "not promised",
    }
}

/// Prints a finding, below the name of its tier if there are several.
fn print_finding(finding: &Finding, tier: Option<TierKind>, is_verbose: bool) {
    let evidence = match (finding.verdict, is_verbose) {
        (Verdict::Held, false) => format!("{} attacks failed", finding.attacks.len()),
        (Verdict::Held, true) => String::new(),
        _ => finding.evidence.clone(),
    };
    let tier = tier.map(|tier| format!("{tier:<9} ")).unwrap_or_default();
    output!(
        "{tier}{:<20} {:<13} {}",
        finding.property,
        verdict_word(finding.verdict),
        printable(&evidence)
    );
    if is_verbose {
        for attack in &finding.attacks {
            let outcome = if attack.succeeded { "SUCCEEDED" } else { "failed" };
            let line = format!("{}: {outcome}: {}", attack.tried, attack.seen);
            output!("  {}", printable(&line));
        }
    }
}

/// Writes a table, property by tier, and below it the evidence of each verdict other than `held`.
fn write_table(tiers: &[TierAudit], out: &mut impl io::Write) -> io::Result<()> {
    let row = |first: &str, cells: &mut dyn Iterator<Item = String>| {
        let cells: Vec<String> = cells.map(|cell| format!("{cell:<18}")).collect();
        format!("{first:<20} {}", cells.join(" ")).trim_end().to_owned()
    };
    writeln!(out, "{}", row("PROPERTY", &mut tiers.iter().map(TierAudit::to_heading)))?;
    let implementation = |tier: &TierAudit| match &tier.capabilities {
        Some(capabilities) => printable(&capabilities.implementation),
        None => "-".into(),
    };
    writeln!(out, "{}", row("", &mut tiers.iter().map(implementation)))?;
    for property in &PROPERTIES {
        let cells = &mut tiers.iter().map(|tier| tier.to_cell(property.name).to_owned());
        writeln!(out, "{}", row(property.name, cells))?;
    }
    for tier in tiers {
        if let Some(unavailable) = &tier.unavailable {
            let reason = printable(&unavailable.to_string());
            writeln!(out, "{}: unavailable: {reason}", tier.tier)?;
        }
        for finding in tier.findings.iter().filter(|finding| finding.verdict != Verdict::Held) {
            let (property, verdict) = (finding.property, verdict_word(finding.verdict));
            let evidence = printable(&finding.evidence);
            writeln!(out, "{}: {property}: {verdict}: {evidence}", tier.tier)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new_audit(kind: TierKind, verdicts: &[Verdict]) -> TierAudit {
        let findings = PROPERTIES.iter().zip(verdicts).map(|(property, verdict)| Finding {
            property: property.name,
            verdict: *verdict,
            evidence: "seen".into(),
            attacks: Vec::new(),
        });
        TierAudit { findings: findings.collect(), ..TierAudit::new(kind) }
    }

    fn new_unavailable(kind: TierKind) -> TierAudit {
        let unavailable = Unavailable { reason: "no daemon".into(), remedy: "start it".into() };
        TierAudit { unavailable: Some(unavailable), ..TierAudit::new(kind) }
    }

    #[test]
    fn committed_promises_are_current() {
        let committed = include_str!("../../docs/tiers.md");
        assert_eq!(
            committed,
            chitin::audit::render_document(),
            "update it: chitin audit --document > docs/tiers.md"
        );
    }

    #[test]
    fn broken_promise_exits_with_1_and_no_attack_with_125() {
        let held = || new_audit(TierKind::Nanoclaw, &[Verdict::Held, Verdict::NotPromised]);
        let failed = || TierAudit { failed: Some("why".into()), ..held() };
        let broken = || new_audit(TierKind::Nemoclaw, &[Verdict::Held, Verdict::Broken]);
        assert_eq!(choose_exit_code(&[new_unavailable(TierKind::Ironclaw), held()]), 0);
        assert_eq!(choose_exit_code(&[new_unavailable(TierKind::Ironclaw)]), CHITIN_FAILED);
        assert_eq!(choose_exit_code(&[held(), failed()]), CHITIN_FAILED);
        assert_eq!(choose_exit_code(&[held(), failed(), broken()]), BROKEN);
    }

    #[test]
    fn table_has_a_column_for_every_tier() {
        let tiers = [
            new_unavailable(TierKind::Ironclaw),
            new_audit(TierKind::Nanoclaw, &[Verdict::Held; PROPERTIES.len()]),
            new_audit(TierKind::Nemoclaw, &[Verdict::Broken]),
        ];
        let mut text = Vec::new();
        write_table(&tiers, &mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        let lines: Vec<Vec<&str>> =
            text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[0], ["PROPERTY", "IRONCLAW", "NANOCLAW", "NEMOCLAW"]);
        assert_eq!(lines[2], ["host", "files", "unavailable", "held", "BROKEN"]);
        assert_eq!(lines[3], ["host", "processes", "unavailable", "held", "NOT", "TRIED"]);
        assert!(text.contains("\nironclaw: unavailable: no daemon: start it\n"), "{text}");
        assert!(text.contains("\nnemoclaw: host files: BROKEN: seen\n"), "{text}");
    }
}
