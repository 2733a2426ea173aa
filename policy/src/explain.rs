//! Explains a policy in sentences.

use std::fmt::Write;

use chitin_spec::{Delivery, ProxyScope, SecretSource, TierKind};
use chitin_text::printable;

use super::file::Access;
use super::{Field, Policy, SyscallFilter, Verdict};

/// The files that a workload can read and write under any policy. The agent sets them up when it
/// builds the workload's root.
const SYSTEM: &str = "the system (/usr, /bin, /sbin, /lib, /lib64, /etc, /opt, /proc, /sys, /dev)";
const SCRATCH: &str = "/work, /tmp, /var/tmp and /dev/shm";

pub fn explain_policy(policy: &Policy) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = write_all(policy, &mut text);
    text
}

fn write_all(policy: &Policy, out: &mut String) -> std::fmt::Result {
    let plugin = policy.plugin.as_ref().map(|plugin| format!(" for {plugin}")).unwrap_or_default();
    let profile = policy.profile.spec();
    writeln!(
        out,
        "{}: policy{plugin}, profile {}: {}.",
        policy.origin, policy.profile, profile.purpose
    )?;
    writeln!(out)?;
    write_host_uses(policy, out)?;
    write_isolation(policy, out)?;
    write_files(policy, out)?;
    write_network(policy, out)?;
    match policy.syscalls {
        SyscallFilter::DefaultDeny => writeln!(
            out,
            "System calls: only those listed in docs/policy.md; any other fails with EPERM. \
             No namespaces, no tracing, no vsock."
        )?,
        SyscallFilter::DefaultAllow => {
            writeln!(
                out,
                "System calls: all except io_uring, bpf, perf, userfaultfd, key rings and vsock."
            )?;
        }
    }
    writeln!(
        out,
        "Rights: an ordinary user (1000), no new privileges, no capability but \
         CAP_NET_BIND_SERVICE."
    )?;
    write_credentials(policy, out)?;
    write_resources(policy, out)?;
    write_enforcement(policy, out)
}

/// Writes what the policy does on the host, first of all: everything else is about the sandbox.
fn write_host_uses(policy: &Policy, out: &mut String) -> std::fmt::Result {
    let uses = policy.host_uses();
    if uses.is_empty() {
        return writeln!(out, "Host: it uses nothing of this host.");
    }
    writeln!(
        out,
        "WARNING: THIS POLICY USES YOUR HOST. A run is refused until you consent to each of these \
         on the command line:"
    )?;
    for host_use in uses {
        let option = host_use.to_string().replace('\'', "'\\''");
        writeln!(out, "  It {}.\n    --policy-may '{option}'", host_use.describe())?;
    }
    writeln!(out)
}

fn write_isolation(policy: &Policy, out: &mut String) -> std::fmt::Result {
    let isolation = match policy.runtime {
        TierKind::Ironclaw => "in a microVM with its own kernel (ironclaw)",
        TierKind::Nanoclaw => {
            "under gVisor or, where runsc is missing, in a hardened container (nanoclaw)"
        }
        TierKind::Nemoclaw => "in a hardened container of the Docker daemon (nemoclaw)",
    };
    write!(out, "Isolation: it runs {isolation}")?;
    if policy.fallback.is_empty() {
        write!(out, ", or not at all")?;
    } else {
        write!(
            out,
            "; if that is unavailable, as {}",
            join_names(&policy.fallback, TierKind::to_string)
        )?;
    }
    match &policy.image {
        Some(image) => writeln!(out, ", from the root image {}.", image.display()),
        None => writeln!(out, "."),
    }
}

fn write_files(policy: &Policy, out: &mut String) -> std::fmt::Result {
    match policy.files_confined {
        true => write!(out, "Files: it can read {SYSTEM}")?,
        false => write!(out, "Files: it can read all of its root image")?,
    }
    match policy.limits.disk_mib {
        Some(disk) => writeln!(out, ", and write {SCRATCH}, {disk} MiB in all.")?,
        None => writeln!(out, ", and write {SCRATCH}, up to half of its memory.")?,
    }
    for file in &policy.files {
        let (path, source) = (file.path.display(), file.source.display());
        match file.access {
            Access::ReadOnly => {
                writeln!(out, "  It can read {path}, a copy of this host's {source}.")?
            }
            Access::ReadWrite => writeln!(
                out,
                "  It can change {path}, a copy of this host's {source}, which is replaced if the \
                 workload succeeds."
            )?,
        }
    }
    Ok(())
}

fn write_network(policy: &Policy, out: &mut String) -> std::fmt::Result {
    match policy.egress.as_slice() {
        [] => writeln!(out, "Network: loopback only."),
        endpoints => {
            let endpoints = join_names(endpoints, ToString::to_string);
            writeln!(out, "Network: it can connect to {endpoints} only.")
        }
    }
}

fn write_credentials(policy: &Policy, out: &mut String) -> std::fmt::Result {
    if policy.secrets.is_empty() && policy.credential_source.is_none() {
        return writeln!(out, "Credentials: none.");
    }
    writeln!(out, "Credentials:")?;
    for secret in &policy.secrets {
        let source = match &secret.source {
            SecretSource::Env(name) => {
                format!("this host's environment variable {}", printable(name))
            }
            SecretSource::File(path) => format!("this host's file {}", path.display()),
            SecretSource::Exec(command) => {
                format!("the output of `{}` on this host", printable(command))
            }
            SecretSource::Vault(source) => source.to_string(),
        };
        let delivery = match &secret.delivery {
            Delivery::Memory => "a file in memory that the variable NAME_FILE names".to_owned(),
            Delivery::Env => "an environment variable that its child processes see".to_owned(),
            Delivery::Endpoint => "access keys that AWS SDKs fetch when they need them".to_owned(),
            Delivery::Proxy(scope) => {
                format!(
                    "a placeholder in the variable NAME that this host replaces in {}",
                    explain_scope(scope)
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
        let fields = source.field.as_ref().map_or("every field under its name", String::as_str);
        writeln!(
            out,
            "  {fields} from {}, each as a file in memory that the variable NAME_FILE names.",
            source.location()
        )?;
    }
    Ok(())
}

/// Returns the requests in which a placeholder is replaced.
fn explain_scope(scope: &ProxyScope) -> String {
    let mut parts = vec!["headers that carry keys".to_owned()];
    parts.extend(scope.headers.iter().map(|name| format!("the header {name}")));
    parts.extend(scope.query.then(|| "the query".to_owned()));
    parts.extend(scope.body.then(|| "the body".to_owned()));
    let (parts, hosts) =
        (join_names(&parts, String::clone), join_names(&scope.hosts, ToString::to_string));
    let methods = match scope.methods.as_slice() {
        [] => String::new(),
        methods => format!("{} ", join_names(methods, ToString::to_string)),
    };
    let prefix =
        scope.path_prefix.as_ref().map_or(String::new(), |it| format!(", at or below {it}"));
    format!("{parts} of {methods}requests to {hosts}{prefix}")
}

fn write_resources(policy: &Policy, out: &mut String) -> std::fmt::Result {
    let limits = &policy.limits;
    let cpus = if limits.vcpus == 1 { "CPU" } else { "CPUs" };
    let time = match limits.timeout {
        Some(limit) => format!("ends after {}", humantime::format_duration(limit)),
        None => "has no time limit".into(),
    };
    writeln!(
        out,
        "Resources: {} {cpus}, {} MiB of memory, {} processes and threads; it {time}. Options can \
         lower this, not raise it.",
        limits.vcpus, limits.memory_mib, limits.pids
    )
}

/// Writes the mechanism that enforces each field on each tier, and the tiers that refuse the
/// policy.
fn write_enforcement(policy: &Policy, out: &mut String) -> std::fmt::Result {
    for tier in TierKind::ALL {
        let listing = if tier == policy.runtime {
            ""
        } else if policy.fallback.contains(&tier) {
            " (fallback)"
        } else {
            " (not listed here)"
        };
        writeln!(out)?;
        match policy.check_tier(tier) {
            Ok(()) => writeln!(out, "On {tier}{listing}, all of it is enforced:")?,
            Err(_) => writeln!(out, "On {tier}{listing}, a run is REFUSED:")?,
        }
        let verdicts = Field::ALL.map(|field| (field, policy.verdict(field, tier)));
        // Print the reason once if the tier refuses every field.
        if let [(_, first @ Verdict::Refused(why)), rest @ ..] = &verdicts
            && rest.iter().all(|(_, verdict)| matches!(verdict, Verdict::Refused(_)))
        {
            let Verdict::Refused(_) = first else { continue };
            writeln!(out, "  {why}")?;
            continue;
        }
        for (field, verdict) in verdicts {
            match verdict {
                Verdict::Enforced(how) => writeln!(out, "  {}: {how}", field.name())?,
                Verdict::Refused(why) => writeln!(out, "  {}: REFUSED: {why}", field.name())?,
            }
        }
    }
    Ok(())
}

fn join_names<T>(items: &[T], name: impl Fn(&T) -> String) -> String {
    let names: Vec<String> = items.iter().map(name).collect();
    match names.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, rest)) => format!("{} and {last}", rest.join(", ")),
        None => String::new(),
    }
}
