//! `cargo xtask demo`: from a fresh clone to a report that an untrusted script wrote in a microVM.
//!
//! The script of `examples/weather-report` gets data by copy, a token over the channel, and writes a report that is copied
//! out. The report is signed under the token, so we can check that the token arrived, and that nothing else did.

use std::env;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use hmac::{Hmac, Mac};
use sha2::Sha256;

use crate::process::{command, output, start_failure};
use crate::{build, cache, microvm, setup, workspace};

/// The name under which the script expects its token.
const TOKEN: &str = "API_TOKEN";
const SIGNED: [&str; 2] = ["report.json", "report.md"];
const SIGNATURES: &str = "report.hmac";
/// Lines of the report to show.
const HEAD: usize = 12;

/// Install and build what is missing, then run an agent's script in a microVM
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Builds everything and runs the example; any exit code but 0 means that the script failed.
pub fn run(_: &Args) -> Result<ExitCode> {
    let started = Instant::now();
    let code = setup::run(&setup::Args::default())?;
    if code != ExitCode::SUCCESS {
        return Ok(code);
    }
    build::run(&build::Args::default())?;

    let out = workspace::target().join("demo");
    cache::remove_tree(&out)?;
    fs::create_dir_all(&out).with_context(|| format!("create {}", out.display()))?;
    let token = token()?;
    let code = run_script(&out, &token)?;
    if code != ExitCode::SUCCESS {
        eprintln!("demo: the script, or chitin, failed: see above");
        return Ok(code);
    }
    let report = out.join("weather-report");
    check_report(&report, token.as_bytes())?;
    show(&report)?;
    eprintln!("demo: done in {:.0} s", started.elapsed().as_secs_f32());
    Ok(ExitCode::SUCCESS)
}

/// The caller's token, or one made for this run.
fn token() -> Result<String> {
    if let Some(token) = env::var_os(TOKEN).filter(|token| !token.is_empty()) {
        return token.into_string().map_err(|_| anyhow::anyhow!("{TOKEN} is not UTF-8"));
    }
    let mut random = [0; 16];
    File::open("/dev/urandom")
        .and_then(|mut source| source.read_exact(&mut random))
        .context("read /dev/urandom")?;
    Ok(random.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// What `chitin` is asked to do.
fn command_line(out: &Path) -> Result<Vec<String>> {
    let text = |path: PathBuf| {
        path.into_os_string().into_string().map_err(|path| anyhow::anyhow!("{path:?} is not UTF-8"))
    };
    let chitin = text(workspace::target().join("release/chitin"))?;
    let example = text(workspace::root().join("examples/weather-report"))?;
    let words = [
        chitin.as_str(),
        "run",
        "--copy-in",
        &format!("{example}:/work/weather-report"),
        "--secret",
        &format!("{TOKEN}=env:{TOKEN}"),
        "--copy-out",
        &format!("/work/out:{}/weather-report", text(out.to_owned())?),
        "--",
        "python3",
        "weather-report/report.py",
        "weather-report/data/weather.csv",
        "/work/out",
    ];
    Ok(words.map(Into::into).into())
}

fn run_script(out: &Path, token: &str) -> Result<ExitCode> {
    let line = command_line(out)?;
    let usable = microvm::usable()?;
    eprintln!("demo: {TOKEN}=… {}", line.join(" "));
    if !usable {
        let out = out.to_string_lossy();
        return microvm::nested_with(
            &["--timeout", "5m", "--out", &out, "--env", &format!("{TOKEN}={token}")],
            &line,
        );
    }
    let mut chitin = Command::new(&line[0]);
    chitin.args(&line[1..]).env(TOKEN, token).stdin(Stdio::null());
    let status = chitin.status().with_context(|| start_failure(&chitin))?;
    Ok(status
        .code()
        .and_then(|code| u8::try_from(code).ok())
        .map_or(ExitCode::FAILURE, ExitCode::from))
}

/// Fails unless the report is signed under the token, and does not contain it.
fn check_report(report: &Path, token: &[u8]) -> Result<()> {
    let read = |name: &str| {
        let path = report.join(name);
        fs::read(&path).with_context(|| format!("read {}", path.display()))
    };
    let signatures = read(SIGNATURES)?;
    let signatures = std::str::from_utf8(&signatures).context("the signatures are not text")?;
    for name in SIGNED {
        let content = read(name)?;
        ensure!(!contains(&content, token), "{name} contains the token");
        let signature =
            signature_of(signatures, name).with_context(|| format!("{name} is not signed"))?;
        let mut mac = Hmac::<Sha256>::new_from_slice(token).context("use the token as a key")?;
        mac.update(&content);
        if mac.verify_slice(&signature).is_err() {
            bail!("the signature of {name} is not that of our token");
        }
    }
    ensure!(!contains(signatures.as_bytes(), token), "{SIGNATURES} contains the token");
    eprintln!("demo: {} are signed under the token, and do not contain it", SIGNED.join(" and "));
    Ok(())
}

/// The signature in a list of lines `HEX  NAME`.
fn signature_of(lines: &str, name: &str) -> Option<Vec<u8>> {
    let hex = lines.lines().find_map(|line| line.split_once("  ").filter(|(_, of)| *of == name))?.0;
    // By characters: the list comes out of a sandbox and may hold anything.
    let digits: Vec<u8> = hex
        .chars()
        .map(|c| c.to_digit(16).and_then(|d| u8::try_from(d).ok()))
        .collect::<Option<_>>()?;
    digits
        .len()
        .is_multiple_of(2)
        .then(|| digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect())
}

fn contains(content: &[u8], token: &[u8]) -> bool {
    content.windows(token.len().max(1)).any(|window| window == token)
}

fn show(report: &Path) -> Result<()> {
    let path = report.join("report.md");
    let text = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    // What was written in a sandbox must not steer our terminal.
    let text: String =
        String::from_utf8_lossy(&text).chars().filter(|c| !c.is_control() || *c == '\n').collect();
    println!();
    text.lines().take(HEAD).for_each(|line| println!("    {line}"));
    println!("    …\n");
    eprintln!("demo: the whole report is {}", path.display());
    let here = output(&mut command("uname", ["--kernel-release"]))?;
    eprintln!("demo: this machine's own kernel is Linux {}", here.trim());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &[u8] = b"Jefe";
    const CONTENT: &str = "what do ya want for nothing?";
    /// RFC 4231, test case 2.
    const MAC: &str = "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843";

    fn report(json: &str, md: &str, signatures: &str) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for (name, content) in [("report.json", json), ("report.md", md), (SIGNATURES, signatures)]
        {
            fs::write(directory.path().join(name), content).unwrap();
        }
        directory
    }

    fn error_of(json: &str, md: &str, signatures: &str) -> String {
        format!(
            "{:#}",
            check_report(report(json, md, signatures).path(), KEY).expect_err("a bad report")
        )
    }

    #[test]
    fn a_report_signed_under_the_token_is_accepted() {
        let good = report(CONTENT, CONTENT, &format!("{MAC}  report.json\n{MAC}  report.md\n"));
        check_report(good.path(), KEY).unwrap();
        assert!(check_report(good.path(), b"other").is_err());
    }

    #[test]
    fn other_reports_are_not() {
        let signatures = format!("{MAC}  report.json\n{MAC}  report.md\n");
        assert!(
            error_of(CONTENT, "changed", &signatures)
                .contains("report.md is not that of our token")
        );
        assert!(error_of("Jefe", CONTENT, &signatures).contains("report.json contains the token"));
        assert!(
            error_of(CONTENT, CONTENT, &format!("{signatures}Jefe\n"))
                .contains("report.hmac contains the token")
        );
        for bad in
            ["", "  report.json", "zz  report.json", "é  report.json", "123  report.json", MAC]
        {
            assert!(check_report(report(CONTENT, CONTENT, bad).path(), KEY).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_missing_report_is_named() {
        let empty = tempfile::tempdir().unwrap();
        assert!(
            format!("{:#}", check_report(empty.path(), KEY).expect_err("no report"))
                .contains(SIGNATURES)
        );
    }
}
