//! Builds a template: boots a guest, warms it up, saves it, and records a first copy.

use std::ffi::OsString;
use std::sync::Arc;

use chitin_protocol::Exit;
use tokio::time::Instant;

use super::{Manifest, unix_seconds};
use crate::error::Error;
use crate::launch::Launched;
use crate::process::{Command, ECHO};
use crate::session::Session;
use crate::spec::SandboxSpec;
use chitin_text::printable;

/// The most bytes of a failed warm-up's output in its error: the end, where its message is.
const MAX_WARM_UP_OUTPUT: usize = 2048;

/// Commands that run before a template is saved.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WarmUpSpec {
    /// A shell script. Processes that it leaves running go on in each copy.
    pub script: Option<String>,
    /// The first command of the copies, [`ECHO`] if empty. The pages that it uses are loaded in
    /// each copy before it runs. It runs twice for that, and its exit status does not matter.
    pub first_command: Vec<OsString>,
}

/// Builds a template of this name from a validated specification.
pub(crate) async fn build_template(
    spec: SandboxSpec,
    name: &str,
    warm_up: &WarmUpSpec,
) -> Result<Manifest, Error> {
    let started = Instant::now();
    let mut vm = spec.vm.clone();
    spec.require_microvm()?;
    spec.artifacts.check()?;
    let draft = spec.locate_templates()?.create_draft(name)?;

    vm.template = true;
    let guest = Launched::spawn(&spec, &vm, None, started)?;
    let guest = guest.wait_for_agent(&spec.artifacts).await?;
    guest.copy_policy_files().await?;
    guest.confine().await?;
    if let Some(script) = &warm_up.script {
        run_script(guest.session(), script).await?;
    }
    // Started once before the save, so that the saved kernel has its files in the page cache.
    run_first_command(guest.session(), &warm_up.first_command).await?;
    guest.session().freeze().await?;
    let files = draft.create_files()?;
    let binding = spec.bind_restored(&mut vm)?;
    guest.session().save(binding.clone(), &files).await?;

    // The pages that a copy uses are found by its mappings, which private memory does not have.
    (vm.template, vm.record, vm.private_memory) = (false, true, false);
    let copy = Launched::spawn(&spec, &vm, Some(&draft.open_files()?), Instant::now())?;
    let copy = copy.wait_for_agent(&spec.artifacts).await?;
    copy.confine().await?;
    run_first_command(copy.session(), &warm_up.first_command).await?;
    copy.session().record_used_pages(&draft.create_new_state()?, &draft.open_key()?).await?;

    let manifest = Manifest {
        name: name.into(),
        chitin: env!("CARGO_PKG_VERSION").into(),
        created: unix_seconds(),
        vcpus: vm.vcpus,
        memory_mib: vm.memory_mib,
        warm_up: warm_up.script.clone(),
        policy: spec.policy.as_ref().map(|policy| policy.digest.clone()),
        memory_bytes: 0,
        binding,
    };
    Ok(draft.publish(manifest)?)
}

async fn run_script(session: &Arc<Session>, script: &str) -> Result<(), Error> {
    let shell = Command::new(session.clone(), "/bin/sh".into());
    let output = shell.args(["-c", script]).output().await?;
    if output.exit == Exit::Code(0) {
        return Ok(());
    }
    let printed = [output.stdout, output.stderr].concat();
    Err(Error::WarmUp { exit: output.exit, output: describe_output(&printed) })
}

/// Returns the end of a command's output as one line of printable text. The warm-up is the caller's
/// command, but its output may come from anywhere.
fn describe_output(printed: &[u8]) -> String {
    let tail = &printed[printed.len().saturating_sub(MAX_WARM_UP_OUTPUT)..];
    let text = String::from_utf8_lossy(tail);
    let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    printable(&lines.join("; "))
}

/// Runs the first command of the copies, whatever its exit status.
async fn run_first_command(session: &Arc<Session>, argv: &[OsString]) -> Result<(), Error> {
    let command = match argv.split_first() {
        Some((program, arguments)) => {
            Command::new(session.clone(), program.clone()).args(arguments)
        }
        None => Command::new(session.clone(), ECHO.into()).arg("chitin"),
    };
    command.output().await.map(drop)
}
