//! `chitin run`: one command in one sandbox, with standard streams, signals and an exit code like
//! any other command.

mod args;
mod copies;
mod end;
mod secrets;
mod signals;
mod stdio;
mod values;

use std::ffi::OsString;
use std::net::Ipv4Addr;
use std::num::NonZeroU64;
use std::time::Duration;

use chitin::{
    Builder, EgressLimits, Exit, Forward, Jail, Phases, Policy, Sandbox, SecretSpec, SelectedTier,
    StartError, TierError, TierKind, Usage,
};
use tokio::net::TcpListener;

pub use self::args::Args;
pub use self::copies::CopyRecord;
use self::copies::{check_sources, check_targets, copy_in, copy_out, keep_first_error};
use self::end::{NamedLimits, explain_end, find_cause};
use self::secrets::collect_secrets;
use self::signals::Signals;
use self::stdio::{Attended, Deadline, attend_process};
use self::values::{PortPair, parse_env};
use crate::error::{CHITIN_FAILED, CliError};
use crate::jail_args::warn_if_root;
use crate::output::notice;
use crate::report::{Isolation, JailReport, PolicyRecord, Report, write_json};
use crate::weaker_tier::warn_if_weaker;

/// The exit code of a shell for a command that signal 0 ended; the number of the signal is added.
const SIGNALED: u8 = 128;

/// The time after the time limit in which results can be copied out.
const COPY_GRACE: Duration = Duration::from_secs(10);

/// The state of a run, which the report describes even if the run fails.
#[derive(Default)]
struct Progress {
    selected: Option<SelectedTier>,
    ended: Option<(Exit, Usage)>,
    limits: Option<NamedLimits>,
    phases: Phases,
    jail: Option<Jail>,
    private_memory: bool,
    deadline: Option<Deadline>,
    copies: Vec<CopyRecord>,
}

/// Runs the command, writes the report, and returns the exit code.
pub async fn run_command(args: Args) -> Result<u8, CliError> {
    let mut progress = Progress::default();
    let loaded = args.policy.load().map_err(chitin::Error::from);
    let policy = loaded.as_ref().ok().and_then(Option::as_ref);
    let record = policy.map(PolicyRecord::new);
    progress.private_memory =
        args.machine.private_memory || policy.is_some_and(|policy| policy.private_memory);
    let wanted = args.tier.or(policy.map(|policy| policy.runtime)).unwrap_or(TierKind::Ironclaw);
    let outcome = match loaded {
        Ok(policy) => run_sandbox(&args, policy, &mut progress).await,
        Err(error) => Err(error.into()),
    };
    print_cause(&progress, &outcome);
    if let Some(path) = &args.report {
        let report = new_report(&args, record, wanted, progress, &outcome);
        match (write_json(path, &report), &outcome) {
            (Err(error), Ok(_)) => return Err(error),
            // Both failed: the first error is returned, the second one is printed.
            (Err(error), Err(_)) => error.print(),
            (Ok(()), _) => {}
        }
    }
    outcome
}

/// Prints the limit that ended the run, or that a successful command has reached.
fn print_cause(progress: &Progress, outcome: &Result<u8, CliError>) {
    let Some(limits) = &progress.limits else { return };
    let reached = progress.ended.as_ref().map(|(_, usage)| usage.reached).unwrap_or_default();
    let cause = find_cause(progress.ended.as_ref(), outcome);
    for line in explain_end(cause, reached, limits) {
        notice!("chitin: {line}");
    }
}

fn new_report(
    args: &Args,
    policy: Option<PolicyRecord>,
    wanted: TierKind,
    progress: Progress,
    outcome: &Result<u8, CliError>,
) -> Report {
    let cause = find_cause(progress.ended.as_ref(), outcome);
    let tier = progress.selected.as_ref().map_or(wanted, |selected| selected.tier);
    let (exit, usage) = progress.ended.unzip();
    Report {
        chitin: env!("CARGO_PKG_VERSION"),
        tier: progress.selected.as_ref().map_or_else(|| wanted.to_string(), SelectedTier::name),
        isolation: progress.selected.as_ref().map(Isolation::new),
        policy,
        command: args.command.iter().map(|arg| arg.to_string_lossy().into_owned()).collect(),
        cause,
        exit_code: outcome.as_ref().map_or_else(CliError::exit_code, |code| *code),
        exit,
        usage,
        error: outcome.as_ref().err().map(CliError::line),
        jail: (tier == TierKind::Ironclaw)
            .then(|| JailReport { on: args.machine.jail.is_jailed(), closed: progress.jail }),
        private_memory: progress.private_memory,
        copies: progress.copies,
        phases: progress.phases,
    }
}

/// Starts the sandbox, runs the command in it, and ends it.
async fn run_sandbox(
    args: &Args,
    policy: Option<Policy>,
    progress: &mut Progress,
) -> Result<u8, CliError> {
    let env = parse_env(&args.env)?;
    let secrets = collect_secrets(args)?;
    // Files and ports are checked before anything is booted for them.
    check_sources(&args.copy_in)?;
    check_targets(&args.copy_out)?;
    let listeners = bind_ports(&args.publish).await?;
    let mut signals = Signals::listen()?;

    let builder = new_builder(args, policy, secrets);
    let started = tokio::select! {
        started = builder.start() => started.map_err(|error| Err(error.into())),
        number = signals.next() => Err(Ok(SIGNALED + number)),
    };
    let sandbox = match started {
        Ok(sandbox) => sandbox,
        Err(outcome) => {
            // The unfinished start was dropped, which ends all that it has begun. Credentials that
            // were issued for it must be revoked before this process ends.
            chitin::wait_for_cleanup().await;
            for leftover in chitin::take_leftovers() {
                CliError::from(chitin::Error::from(TierError::Leftover { leftover })).print();
            }
            return outcome;
        }
    };
    let selected = sandbox.selected_tier();
    warn_if_weaker(selected);
    warn_if_root(sandbox.jail().as_ref());
    progress.selected = Some(selected.clone());
    progress.deadline = sandbox.time_limit();
    progress.limits = Some(NamedLimits::of(&sandbox, args.template.is_some()));
    let forwards: Vec<Forward> =
        listeners.into_iter().map(|(listener, port)| sandbox.forward(listener, port)).collect();
    let outcome = use_sandbox(&sandbox, args, env, &mut signals, progress).await;
    (progress.phases, progress.jail) = (sandbox.phases(), sandbox.jail());
    drop(forwards);
    let (stopped, warnings) = sandbox.stop_with_warnings().await;
    for warning in warnings {
        notice!("chitin: credentials: {warning}");
    }
    match (outcome, stopped) {
        (Ok(0), Err(error)) => Err(error.into()),
        // Of two failures the first tells more, and the second is printed.
        (outcome, Err(error)) => {
            CliError::from(error).print();
            outcome
        }
        (outcome, Ok(())) => outcome,
    }
}

async fn bind_ports(publish: &[PortPair]) -> Result<Vec<(TcpListener, u16)>, CliError> {
    let mut listeners = Vec::new();
    for PortPair { host, guest } in publish {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, *host))
            .await
            .map_err(CliError::io(format!("-p {host}:{guest}: listen on 127.0.0.1:{host}")))?;
        listeners.push((listener, *guest));
    }
    Ok(listeners)
}

/// Translates the arguments.
fn new_builder(args: &Args, policy: Option<Policy>, secrets: Vec<SecretSpec>) -> Builder {
    let mut builder = args.machine.apply_to(Sandbox::builder().console(args.console));
    builder = args.policy.apply_to(builder, policy);
    builder = builder.fallback(args.fallback.iter().copied());
    if let Some(tier) = args.tier {
        builder = builder.tier(tier);
    }
    if let Some(timeout) = args.timeout {
        builder = builder.timeout(timeout);
    }
    if !args.copy_out.is_empty() {
        builder = builder.copy_grace(COPY_GRACE);
    }
    if let Some(template) = &args.template {
        builder = builder.template(template);
    }
    builder = secrets.into_iter().fold(builder, Builder::secret_spec);
    builder = args.allow.iter().fold(builder, Builder::allow).allow_private(args.allow_private);
    if let Some(path) = &args.audit {
        builder = builder.audit(path);
    }
    builder = builder.on_refused_egress(|refused| {
        notice!("chitin: {refused}");
    });
    let default = EgressLimits::default();
    builder.egress_limits(EgressLimits {
        connections: args.egress_connections.map_or(default.connections, usize::from),
        total_bytes: args.egress_bytes.map(NonZeroU64::get),
        bytes_per_second: args.egress_rate,
        ..default
    })
}

/// Copies in, runs the command, and copies out. A signal at any step ends the run.
async fn use_sandbox(
    sandbox: &Sandbox,
    args: &Args,
    env: Vec<(OsString, OsString)>,
    signals: &mut Signals,
    progress: &mut Progress,
) -> Result<u8, CliError> {
    tokio::select! {
        copied = copy_in(sandbox, &args.copy_in, &mut progress.copies) => copied?,
        () = wait_for_limit(progress.deadline) => return Err(time_error(progress.deadline)),
        number = signals.next() => return Ok(SIGNALED + number),
    }

    let mut command =
        sandbox.command(&args.command[0]).args(&args.command[1..]).current_dir(&args.workdir);
    for (name, value) in env {
        command = command.env(name, value);
    }
    if !args.no_stdin {
        command = command.piped_stdin();
    }
    let attended = attend_process(sandbox, command.spawn()?, signals, progress.deadline).await;
    let (outcome, undelivered) = match attended {
        Ok(Attended::Interrupted) => return Ok(SIGNALED + signals.last),
        Ok(Attended::Ended { exit, usage, undelivered }) => {
            let code = to_exit_code(&exit, &args.command[0]);
            progress.ended = Some((exit, usage));
            (Ok(code), undelivered)
        }
        Err(error @ CliError::Sandbox(chitin::Error::Timeout { .. })) => (Err(error), Ok(())),
        Err(error) => return Err(error),
    };
    tokio::select! {
        copied = copy_results(sandbox, args, &outcome, &mut progress.copies) => {
            finish_run(outcome, keep_first_error(undelivered, copied))
        }
        number = signals.next() => Ok(SIGNALED + number),
    }
}

/// Copies out, also after a failure or the time limit. The files of a policy are copied back only
/// after a success.
async fn copy_results(
    sandbox: &Sandbox,
    args: &Args,
    outcome: &Result<u8, CliError>,
    records: &mut Vec<CopyRecord>,
) -> Result<(), CliError> {
    let returned = match outcome {
        Ok(0) => sandbox.copy_back().await.map_err(CliError::from),
        _ => Ok(()),
    };
    keep_first_error(returned, copy_out(sandbox, &args.copy_out, records).await)
}

/// Returns the outcome of the workload, or the error of a run whose workload succeeded.
fn finish_run(
    outcome: Result<u8, CliError>,
    results: Result<(), CliError>,
) -> Result<u8, CliError> {
    match (outcome, results) {
        (Ok(0), Err(error)) => Err(error),
        // A workload that failed may not have written the file, and its end tells more.
        (outcome, Err(error)) => {
            error.print();
            outcome
        }
        (outcome, Ok(())) => outcome,
    }
}

/// Waits until the time limit, or for ever.
async fn wait_for_limit(deadline: Option<Deadline>) {
    match deadline {
        Some((at, _)) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

fn time_error(deadline: Option<Deadline>) -> CliError {
    let limit = deadline.map(|(_, limit)| limit).unwrap_or_default();
    chitin::Error::Timeout { limit }.into()
}

/// Returns the exit code of a shell for the end of a command, and prints why one did not start.
fn to_exit_code(exit: &Exit, program: &OsString) -> u8 {
    match exit {
        Exit::Code(code) => *code,
        Exit::Signal(number) => SIGNALED.saturating_add(*number),
        Exit::NotStarted { error, failure } => {
            notice!("chitin: start {} in the sandbox: {failure}", program.display());
            match error {
                StartError::NotFound => 127,
                StartError::NotExecutable => 126,
                StartError::Other => CHITIN_FAILED,
            }
        }
    }
}
