//! `chitin template`: builds, lists, shows and removes templates.

use std::time::{Duration, SystemTime};

use chitin::{Manifest, Sandbox, Templates, WarmUpSpec, error_chain, printable, printable_json};

use crate::error::CliError;
use crate::machine_args::MachineArgs;
use crate::output::{notice, output};
use crate::policy_args::PolicyArgs;

/// Commands about templates.
#[derive(clap::Subcommand)]
#[command(after_help = "\
Templates are stored in $CHITIN_TEMPLATES, or else in chitin/templates in the user's data \
directory. The key that protects them is in $XDG_STATE_HOME/chitin/keys, or else in \
~/.local/state/chitin/keys (root: /var/lib/chitin/keys).

Examples:
  chitin template build py --warm-up 'python3 -c \"import json, ssl\"'
  chitin run --template py -- python3 -c 'print(1)'
  chitin template ls
  chitin template inspect py | jq .warm_up")]
pub enum Command {
    /// Boot a sandbox, warm it up, and save it
    Build(BuildArgs),
    /// List the templates
    Ls,
    /// Print a template as JSON
    Inspect(NameArg),
    /// Remove a template
    Rm(NameArg),
}

/// Arguments of `chitin template build`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  chitin template build py --warm-up 'python3 -c \"import json, ssl\"'
  chitin template build py --warm-up 'python3 -c \"import ssl\"' --first 'python3 -c \"print(1)\"'
  chitin template build server --warm-up \"$(cat examples/warm-python.sh)\" --memory 512")]
pub struct BuildArgs {
    #[command(flatten)]
    name: NameArg,

    /// Run this shell command before saving; processes that it leaves running continue in each copy
    #[arg(long, value_name = "CMD")]
    warm_up: Option<String>,

    /// Shell command that copies are expected to run first: the pages that it uses are prepared in
    /// each copy
    #[arg(long, value_name = "CMD")]
    first: Option<String>,

    // Copies must be started with the same policy, and receive its credentials only then.
    #[command(flatten)]
    policy: PolicyArgs,

    #[command(flatten)]
    machine: MachineArgs,
}

/// The name of a template.
#[derive(clap::Args)]
pub struct NameArg {
    /// Name of the template
    #[arg(value_name = "NAME")]
    name: String,
}

/// Executes a command about templates.
pub async fn execute(command: Command) -> Result<u8, CliError> {
    let templates = Templates::locate().map_err(chitin::Error::from)?;
    match command {
        Command::Build(args) => build_template(args, templates).await?,
        Command::Ls => {
            let list = templates.list().map_err(chitin::Error::from)?;
            output!(
                "{:<24} {:>4} {:>8} {:>8}  {:<12} WARM-UP",
                "NAME",
                "CPUS",
                "MEMORY",
                "SAVED",
                "AGE"
            );
            list.templates.iter().for_each(print_line);
            for (name, error) in &list.rejected {
                notice!("chitin: {}: {}", printable(name), error_chain(error));
            }
        }
        Command::Inspect(NameArg { name }) => {
            let manifest = templates.inspect(&name).map_err(chitin::Error::from)?;
            let json = serde_json::to_string_pretty(&manifest)
                .map_err(|error| CliError::io("encode the template")(error.into()))?;
            output!("{}", printable_json(&json));
        }
        Command::Rm(NameArg { name }) => templates.remove(&name).map_err(chitin::Error::from)?,
    }
    Ok(0)
}

async fn build_template(args: BuildArgs, templates: Templates) -> Result<(), CliError> {
    let mut builder = args.machine.apply_to(Sandbox::builder().templates(templates));
    builder = args.policy.apply_to(builder, args.policy.load().map_err(chitin::Error::from)?);
    let first = args.first.map(|script| ["/bin/sh".into(), "-c".into(), script.into()].into());
    let first_command = first.unwrap_or_default();
    let warm_up = WarmUpSpec { script: args.warm_up, first_command };
    let manifest = builder.build_template(&args.name.name, &warm_up).await?;
    output!("{}: {} MiB of memory saved", manifest.name, manifest.memory_bytes >> 20);
    Ok(())
}

fn print_line(manifest: &Manifest) {
    let created = SystemTime::UNIX_EPOCH + Duration::from_secs(manifest.created);
    let age = SystemTime::now().duration_since(created).unwrap_or_default();
    // Two units are precise enough: 3h 5m.
    let age = humantime::format_duration(Duration::from_secs(age.as_secs())).to_string();
    let age = age.split(' ').take(2).collect::<Vec<_>>().join(" ");
    output!(
        "{:<24} {:>4} {:>5}MiB {:>5}MiB  {:<12} {}",
        manifest.name,
        manifest.vcpus,
        manifest.memory_mib,
        manifest.memory_bytes >> 20,
        age,
        printable(manifest.warm_up.as_deref().unwrap_or("-"))
    );
}
