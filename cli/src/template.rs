//! `chitin template`: build, list, look at and remove templates.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use chitin::{Manifest, Policy, Sandbox, Templates, Warming};

use crate::failure::Failure;
use crate::machine::Machine;

/// What to do with templates.
#[derive(clap::Subcommand)]
#[command(
    after_help = "Templates are in $CHITIN_TEMPLATES, else in chitin/templates below the user's data directory.

Examples:
  chitin template build py --warm-up 'python3 -c \"import json, ssl\"'
  chitin run --template py -- python3 -c 'print(1)'
  chitin template ls"
)]
pub enum Command {
    /// Boot, warm up, and save
    Build(BuildArgs),
    /// List them
    Ls,
    /// Show one as JSON
    Inspect(Name),
    /// Remove one
    Rm(Name),
}

/// Arguments of `chitin template build`.
#[derive(clap::Args)]
pub struct BuildArgs {
    #[command(flatten)]
    name: Name,

    /// Run this in a shell before saving; what it leaves running is frozen and goes on in each copy
    #[arg(long, value_name = "CMD")]
    warm_up: Option<String>,

    /// What copies will run first, if known: the pages it uses are made ready in each copy
    #[arg(long, value_name = "CMD")]
    first: Option<String>,

    /// Hold the warm-up to this policy; copies are started with the same, and get its credentials only then
    #[arg(long, value_name = "FILE")]
    policy: Option<PathBuf>,

    #[command(flatten)]
    machine: Machine,
}

/// Which one.
#[derive(clap::Args)]
pub struct Name {
    /// The template's name
    #[arg(value_name = "NAME")]
    name: String,
}

pub async fn run(command: Command) -> Result<u8, Failure> {
    let templates = Templates::locate().map_err(chitin::Error::from)?;
    match command {
        Command::Build(args) => {
            let mut builder = args.machine.shape(Sandbox::builder().templates(templates));
            if let Some(policy) = &args.policy {
                builder = builder.policy(Policy::load(policy).map_err(chitin::Error::from)?);
            }
            let first =
                args.first.map(|script| ["/bin/sh".into(), "-c".into(), script.into()].into());
            let warming = Warming { warm_up: args.warm_up, first: first.unwrap_or_default() };
            let manifest = builder.build_template(&args.name.name, &warming).await?;
            println!("{}: {} MiB of memory saved", manifest.name, manifest.memory_bytes >> 20);
        }
        Command::Ls => {
            let list = templates.list().map_err(chitin::Error::from)?;
            println!(
                "{:<24} {:>4} {:>8} {:>8}  {:<12} WARM-UP",
                "NAME", "CPUS", "MEMORY", "SAVED", "AGE"
            );
            list.iter().for_each(print_line);
        }
        Command::Inspect(Name { name }) => {
            let manifest = templates.inspect(&name).map_err(chitin::Error::from)?;
            let json = serde_json::to_string_pretty(&manifest).map_err(|error| Failure::Io {
                what: "encode the template".into(),
                source: error.into(),
            })?;
            println!("{json}");
        }
        Command::Rm(Name { name }) => templates.remove(&name).map_err(chitin::Error::from)?,
    }
    Ok(0)
}

fn print_line(manifest: &Manifest) {
    let created = SystemTime::UNIX_EPOCH + Duration::from_secs(manifest.created);
    let age = SystemTime::now().duration_since(created).unwrap_or_default();
    // Two units say enough: 3h 5m.
    let age = humantime::format_duration(Duration::from_secs(age.as_secs())).to_string();
    let age = age.split(' ').take(2).collect::<Vec<_>>().join(" ");
    println!(
        "{:<24} {:>4} {:>5}MiB {:>5}MiB  {:<12} {}",
        manifest.name,
        manifest.vcpus,
        manifest.memory_mib,
        manifest.memory_bytes >> 20,
        age,
        manifest.warm_up.as_deref().unwrap_or("-")
    );
}
