//! `cargo xtask demo`: from a fresh clone to a report that an untrusted script wrote in a microVM.
//!
//! The script of `examples/weather-report` receives its data by copy and a token over the channel.
//! It writes a report, which is copied out. The report is signed with the token, so that the demo
//! can check that the token arrived, and that the report does not contain it.

use std::env;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail, ensure};
use hmac::{Hmac, Mac};
use sha2::Sha256;

use crate::build::{self, BuildPlan, Profile};
use crate::process::{capture_output, new_command, run_for_status};
use crate::{cache, microvm, workspace};

/// The variable that the script expects its token in.
const TOKEN: &str = "API_TOKEN";
const SIGNED: [&str; 2] = ["report.json", "report.md"];
const SIGNATURES: &str = "report.hmac";
/// Lines of the report that are shown.
const SHOWN_LINES: usize = 12;

/// Install and build what is missing, then run an agent's script in a microVM
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Builds everything and runs the example. Any exit code but 0 means that the script failed.
pub fn run(_: &Args) -> Result<ExitCode> {
    let started = Instant::now();
    let plan = BuildPlan {
        kernel: true,
        emulation: true,
        profile: Profile::Demo,
        packages: &["chitin-cli"],
    };
    build::install_and_build(&plan)?;

    let out = workspace::target_dir().join("demo-out");
    cache::remove_tree(&out)?;
    fs::create_dir_all(&out).with_context(|| format!("create {}", out.display()))?;
    let token = choose_token()?;
    let code = run_script(&plan.profile.bin_dir(), &out, &token)?;
    if code != ExitCode::SUCCESS {
        eprintln!("demo: the script or chitin failed; the reason is printed above");
        return Ok(code);
    }
    let report = out.join("weather-report");
    check_report(&report, token.as_bytes())?;
    show_report(&report)?;
    eprintln!("demo: done in {:.0} s", started.elapsed().as_secs_f32());
    Ok(ExitCode::SUCCESS)
}

/// Returns the caller's token, or a random one.
fn choose_token() -> Result<String> {
    if let Some(token) = env::var_os(TOKEN).filter(|token| !token.is_empty()) {
        return token.into_string().map_err(|_| anyhow!("{TOKEN} is not UTF-8"));
    }
    let mut random = [0; 16];
    File::open("/dev/urandom")
        .and_then(|mut source| source.read_exact(&mut random))
        .context("read /dev/urandom")?;
    Ok(random.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Returns the command line of `chitin run`.
fn command_line(bin_dir: &Path, out: &Path) -> Result<Vec<String>> {
    let text = |path: PathBuf| {
        path.into_os_string().into_string().map_err(|path| anyhow!("{path:?} is not UTF-8"))
    };
    let chitin = text(bin_dir.join("chitin"))?;
    let example = text(workspace::root_dir().join("examples/weather-report"))?;
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

fn run_script(bin_dir: &Path, out: &Path, token: &str) -> Result<ExitCode> {
    let line = command_line(bin_dir, out)?;
    let usable = microvm::is_usable(bin_dir)?;
    eprintln!("demo: {TOKEN}=… {}", line.join(" "));
    if !usable {
        let out = out.to_string_lossy();
        return microvm::run_nested(
            &["--timeout", "5m", "--out", &out, "--env", &format!("{TOKEN}={token}")],
            &line,
        );
    }
    let mut chitin = new_command(&line[0], &line[1..]);
    let status = run_for_status(chitin.env(TOKEN, token))?;
    Ok(status
        .code()
        .and_then(|code| u8::try_from(code).ok())
        .map_or(ExitCode::FAILURE, ExitCode::from))
}

/// Fails unless the report is signed with the token and does not contain it.
fn check_report(report: &Path, token: &[u8]) -> Result<()> {
    let read = |name: &str| {
        let path = report.join(name);
        fs::read(&path).with_context(|| format!("read {}", path.display()))
    };
    let signatures = read(SIGNATURES)?;
    let signatures = std::str::from_utf8(&signatures).context("the signatures are not UTF-8")?;
    for name in SIGNED {
        let content = read(name)?;
        ensure!(!contains_token(&content, token), "{name} contains the token");
        let signature =
            find_signature(signatures, name).with_context(|| format!("{name} is not signed"))?;
        let mut mac = Hmac::<Sha256>::new_from_slice(token).context("use the token as a key")?;
        mac.update(&content);
        if mac.verify_slice(&signature).is_err() {
            bail!("the signature of {name} was not made with the token");
        }
    }
    ensure!(!contains_token(signatures.as_bytes(), token), "{SIGNATURES} contains the token");
    eprintln!("demo: {} are signed with the token and do not contain it", SIGNED.join(" and "));
    Ok(())
}

/// Returns the signature of a file from a list of lines `HEX  NAME`.
fn find_signature(lines: &str, name: &str) -> Option<Vec<u8>> {
    let hex = lines.lines().find_map(|line| line.split_once("  ").filter(|(_, of)| *of == name))?.0;
    // By characters: the list comes out of a sandbox and may contain anything.
    let digits: Vec<u8> = hex
        .chars()
        .map(|c| c.to_digit(16).and_then(|d| u8::try_from(d).ok()))
        .collect::<Option<_>>()?;
    digits
        .len()
        .is_multiple_of(2)
        .then(|| digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect())
}

fn contains_token(content: &[u8], token: &[u8]) -> bool {
    content.windows(token.len().max(1)).any(|window| window == token)
}

fn show_report(report: &Path) -> Result<()> {
    let path = report.join("report.md");
    let text = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    // Text from a sandbox must not control the terminal.
    let text: String =
        String::from_utf8_lossy(&text).chars().filter(|c| !c.is_control() || *c == '\n').collect();
    println!();
    text.lines().take(SHOWN_LINES).for_each(|line| println!("    {line}"));
    println!("    …\n");
    eprintln!("demo: the whole report is in {}", path.display());
    let release = capture_output(&mut new_command("uname", ["--kernel-release"]))?;
    eprintln!("demo: the kernel of this machine is Linux {}", release.trim());
    Ok(())
}

#[cfg(test)]
#[path = "demo_test.rs"]
mod tests;
