//! A policy in sentences.

use std::fmt::Write;

use chitin_spec::{Delivery, SecretSource, TierKind};

use super::file::Access;
use super::{Field, Policy, SyscallFilter, Verdict};

/// What the workload of any policy can read and write; the agent makes it so (`guest-agent/src/root_fs.rs`).
const SYSTEM: &str = "the system (/usr, /bin, /sbin, /lib, /lib64, /etc, /opt, /proc, /sys, /dev)";
const SCRATCH: &str = "/work, /tmp, /var/tmp and /dev/shm";

pub fn explain(policy: &Policy) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = sentences(policy, &mut text);
    text
}

fn sentences(policy: &Policy, out: &mut String) -> std::fmt::Result {
    let plugin = policy.plugin.as_ref().map(|plugin| format!(" for {plugin}")).unwrap_or_default();
    let profile = policy.profile.spec();
    writeln!(
        out,
        "{}: a policy{plugin}, profile {}: {}.",
        policy.origin, policy.profile, profile.purpose
    )?;
    writeln!(out)?;
    tier(policy, out)?;
    files(policy, out)?;
    network(policy, out)?;
    match policy.syscalls {
        SyscallFilter::DefaultDeny => writeln!(
            out,
            "System calls: those that are listed in docs/policy.md; any other fails with EPERM. No namespaces, no tracing, no \
             vsock."
        )?,
        SyscallFilter::DefaultAllow => {
            writeln!(
                out,
                "System calls: all but io_uring, bpf, perf, userfaultfd, key rings and vsock."
            )?;
        }
    }
    writeln!(
        out,
        "Rights: an ordinary user (1000), no new privileges, no capability but binding ports below 1024."
    )?;
    secrets(policy, out)?;
    resources(policy, out)?;
    table(policy, out)
}

fn tier(policy: &Policy, out: &mut String) -> std::fmt::Result {
    let wall = match policy.runtime {
        TierKind::Ironclaw => "in a microVM with a kernel of its own (ironclaw)",
        TierKind::Nanoclaw => {
            "under gVisor or, where runsc is absent, in a hardened container (nanoclaw)"
        }
        TierKind::Nemoclaw => "in a hardened container of the Docker daemon (nemoclaw)",
    };
    write!(out, "Isolation: it runs {wall}")?;
    if policy.fallback.is_empty() {
        write!(out, ", or not at all")?;
    } else {
        write!(
            out,
            ", or where that cannot be had, as {}",
            listed(&policy.fallback, TierKind::to_string)
        )?;
    }
    match &policy.image {
        Some(image) => writeln!(out, ", from the root image {}.", image.display()),
        None => writeln!(out, "."),
    }
}

fn files(policy: &Policy, out: &mut String) -> std::fmt::Result {
    match policy.files_confined {
        true => write!(out, "Files: it may read {SYSTEM}")?,
        false => write!(out, "Files: it may read all of its root image")?,
    }
    match policy.limits.disk_mib {
        Some(disk) => writeln!(out, ", and write {SCRATCH}, {disk} MiB in all.")?,
        None => writeln!(out, ", and write {SCRATCH}, up to half of its memory.")?,
    }
    for file in &policy.files {
        let (path, source) = (file.path.display(), file.source.display());
        match file.access {
            Access::ReadOnly => {
                writeln!(out, "  It may read {path}, a copy of this host's {source}.")?
            }
            Access::ReadWrite => writeln!(
                out,
                "  It may change {path}, a copy of this host's {source}, which is replaced by it if the workload succeeds."
            )?,
        }
    }
    Ok(())
}

fn network(policy: &Policy, out: &mut String) -> std::fmt::Result {
    match policy.egress.as_slice() {
        [] => writeln!(out, "Network: none but its own loopback."),
        endpoints => {
            let endpoints = listed(endpoints, ToString::to_string);
            writeln!(out, "Network: it may connect to {endpoints}, and to nothing else.")
        }
    }
}

fn secrets(policy: &Policy, out: &mut String) -> std::fmt::Result {
    if policy.secrets.is_empty() && policy.credential_source.is_none() {
        return writeln!(out, "Credentials: none.");
    }
    writeln!(out, "Credentials:")?;
    for secret in &policy.secrets {
        let source = match &secret.source {
            SecretSource::Env(name) => format!("this host's environment variable {name}"),
            SecretSource::File(path) => format!("this host's file {}", path.display()),
            SecretSource::Exec(command) => format!("what `{command}` prints on this host"),
            SecretSource::Vault(source) => source.to_string(),
        };
        let delivery = match &secret.delivery {
            Delivery::Memory => {
                "a file in memory that it finds by the variable NAME_FILE".to_owned()
            }
            Delivery::Env => "an environment variable, seen by everything it starts".to_owned(),
            Delivery::Endpoint => "keys that AWS's SDKs fetch when they need them".to_owned(),
            Delivery::Proxy(reach) => {
                let parts = match (reach.query, reach.body) {
                    (false, false) => "headers",
                    (true, false) => "headers and the query",
                    (false, true) => "headers and the body",
                    (true, true) => "headers, the query and the body",
                };
                let hosts = listed(&reach.hosts, ToString::to_string);
                format!(
                    "a placeholder in the variable NAME, which this host replaces in {parts} of requests to {hosts}"
                )
            }
        };
        writeln!(
            out,
            "  {} from {source}, as {}.",
            secret.name,
            delivery.replace("NAME", &secret.name)
        )?;
    }
    if let Some(source) = &policy.credential_source {
        let what = source.field.as_ref().map_or("every field by its name", String::as_str);
        writeln!(
            out,
            "  {what} from {}, each as a file in memory that it finds by the variable NAME_FILE.",
            source.location()
        )?;
    }
    Ok(())
}

fn resources(policy: &Policy, out: &mut String) -> std::fmt::Result {
    let limits = &policy.limits;
    let cpus = if limits.vcpus == 1 { "CPU" } else { "CPUs" };
    let time = match limits.timeout {
        Some(limit) => format!("ends after {}", humantime::format_duration(limit)),
        None => "has no time limit".into(),
    };
    writeln!(
        out,
        "Resources: {} {cpus}, {} MiB of memory, {} processes and threads; it {time}. Options may ask for less and not for more.",
        limits.vcpus, limits.memory_mib, limits.pids
    )
}

/// Which field is kept by what on the tiers that may be used, and which refuse the policy.
fn table(policy: &Policy, out: &mut String) -> std::fmt::Result {
    for tier in TierKind::ALL {
        let wanted = if tier == policy.runtime {
            ""
        } else if policy.fallback.contains(&tier) {
            " (fallback)"
        } else {
            " (not listed here)"
        };
        writeln!(out)?;
        match policy.check_tier(tier) {
            Ok(()) => writeln!(out, "On {tier}{wanted} all of it is kept:")?,
            Err(_) => writeln!(out, "On {tier}{wanted} a run is REFUSED:")?,
        }
        let verdicts = Field::ALL.map(|field| (field, policy.verdict(field, tier)));
        // A tier that refuses everything says so once.
        if let [(_, first @ Verdict::Refused(why)), rest @ ..] = &verdicts
            && rest.iter().all(|(_, verdict)| matches!(verdict, Verdict::Refused(_)))
        {
            let Verdict::Refused(_) = first else { continue };
            writeln!(out, "  {why}")?;
            continue;
        }
        for (field, verdict) in verdicts {
            match verdict {
                Verdict::Kept(how) => writeln!(out, "  {}: {how}", field.name())?,
                Verdict::Refused(why) => writeln!(out, "  {}: REFUSED: {why}", field.name())?,
            }
        }
    }
    Ok(())
}

fn listed<T>(items: &[T], name: impl Fn(&T) -> String) -> String {
    let names: Vec<String> = items.iter().map(name).collect();
    match names.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, rest)) => format!("{} and {last}", rest.join(", ")),
        None => String::new(),
    }
}
