//! What the fields say beside one another, and with their profile.

use std::path::Path;

use chitin_spec::{Delivery, Endpoint, Limits, ProxyScope, SecretSpec, TierKind};

use super::file::{Access, FileRule, How, MAX_ENTRIES, Part, PlainPath, PolicyFile, SecretRule};
use super::profile::Profile;
use super::yaml::{Node, Problem};
use super::{Policy, SharedFile};

/// Where a workload may write; `/var/tmp` is `/tmp`.
const SCRATCH: [&str; 4] = ["/work", "/tmp", "/var/tmp", "/dev/shm"];

/// Of these, those that files may be shared in.
const SHARED: [&str; 2] = ["/work", "/tmp"];

/// The kernel's, where no files are.
const KERNEL: [&str; 3] = ["/proc", "/sys", "/dev"];

/// Makes a policy of a file.
pub fn resolve(
    file: PolicyFile,
    root: &Node,
    origin: &str,
    digest: String,
) -> Result<Policy, Problem> {
    let runtime = file.runtime.unwrap_or(TierKind::Ironclaw);
    let fallback = file.fallback.unwrap_or_default();
    for (index, tier) in fallback.iter().enumerate() {
        if *tier == runtime || fallback[..index].contains(tier) {
            return Err(at(
                root,
                &["fallback", &index.to_string()],
                format!("{tier} is there already"),
            ));
        }
    }

    let rules = file.sandbox;
    let (mut profile, mut files, mut egress, mut syscalls) =
        (Profile::default(), None, Vec::new(), None);
    if let Some(rules) = rules {
        profile = rules.profile.unwrap_or_default();
        files = rules.filesystem;
        egress = rules.network.map(|network| network.allowed_egress).unwrap_or_default();
        syscalls = rules.syscall_filter;
    }
    let spec = profile.spec();

    let syscalls = syscalls.unwrap_or(spec.syscalls);
    if syscalls < spec.syscalls {
        let what = format!(
            "the profile {profile} demands {}: leave this out, or take another profile",
            spec.syscalls.name()
        );
        return Err(at(root, &["sandbox", "syscall_filter"], what));
    }
    if !egress.is_empty() && !spec.egress {
        let what = format!("the profile {profile} has no network: take restricted-net");
        return Err(at(root, &["sandbox", "network", "allowed_egress"], what));
    }
    bounded(egress.len(), root, &["sandbox", "network", "allowed_egress"])?;

    let resources = file.resources;
    let mut limits = spec.resources;
    if let Some(resources) = resources {
        limits = Limits {
            vcpus: resources.vcpus.map_or(limits.vcpus, |number| number.0),
            memory_mib: resources.memory_mib.map_or(limits.memory_mib, |number| number.0),
            timeout: resources.timeout.map(|limit| limit.0).or(limits.timeout),
            pids: resources.pids.map_or(limits.pids, |number| number.0),
            // The profile's own makes room for a smaller memory that the file names.
            disk_mib: resources.disk_mib.map(|number| number.0).or_else(|| {
                limits
                    .disk_mib
                    .map(|disk| disk.min(resources.memory_mib.map_or(disk, |memory| memory.0 / 2)))
            }),
        };
    }
    if let Some(disk) = limits.disk_mib.filter(|disk| *disk > limits.memory_mib / 2) {
        let what = format!(
            "{disk} MiB of files do not fit: they lie in memory, and may take half of its {} MiB",
            limits.memory_mib
        );
        return Err(at(root, &["resources", "disk_mib"], what));
    }

    let files_confined = spec.files_confined || files.is_some();
    let files = shared(files.unwrap_or_default(), root)?;
    let secrets = secrets(file.secrets.unwrap_or_default(), profile, &egress, root)?;
    Ok(Policy {
        origin: origin.into(),
        digest,
        plugin: file.plugin.map(|label| label.0),
        profile,
        runtime,
        fallback,
        image: file.image.map(|path| path.0),
        files_confined,
        files,
        egress,
        syscalls,
        limits,
        secrets,
        credential_source: file.hardening.and_then(|hardening| hardening.credential_source),
    })
}

fn shared(rules: Vec<FileRule>, root: &Node) -> Result<Vec<SharedFile>, Problem> {
    bounded(rules.len(), root, &["sandbox", "filesystem"])?;
    let mut files: Vec<SharedFile> = Vec::new();
    for (index, FileRule { access, path, source }) in rules.into_iter().enumerate() {
        let shown = path.0.display().to_string();
        let wrong = |what: String| {
            Err(at(root, &["sandbox", "filesystem", &index.to_string(), "path"], what))
        };
        if let Some(kernel) = KERNEL.iter().find(|kernel| path.is_in(kernel)) {
            return wrong(format!("{shown} is in {kernel}, which is the kernel's"));
        }
        let strictly_in =
            |directory: &&&str| path.is_in(directory) && path.0 != Path::new(directory);
        match access {
            Access::ReadOnly => {
                if let Some(scratch) = SCRATCH.iter().find(|scratch| path.is_in(scratch)) {
                    return wrong(format!(
                        "{shown} cannot be read-only in {scratch}, which the workload may write: choose a path \
                         outside of it, and name the host's in `source`"
                    ));
                }
            }
            Access::ReadWrite => {
                if SHARED.iter().find(strictly_in).is_none() {
                    return wrong(format!(
                        "{shown} cannot be written in the sandbox: choose a path below /work or /tmp, and name the \
                         host's in `source`"
                    ));
                }
            }
        }
        if let Some(other) = files
            .iter()
            .find(|other| path.0.starts_with(&other.path) || other.path.starts_with(&path.0))
        {
            return wrong(format!("{shown} and {} lie in each other", other.path.display()));
        }
        let source = source.map_or_else(|| path.0.clone(), |PlainPath(source)| source);
        files.push(SharedFile { access, path: path.0, source });
    }
    Ok(files)
}

fn secrets(
    rules: Vec<SecretRule>,
    profile: Profile,
    egress: &[Endpoint],
    root: &Node,
) -> Result<Vec<SecretSpec>, Problem> {
    bounded(rules.len(), root, &["secrets"])?;
    let mut secrets: Vec<SecretSpec> = Vec::new();
    for (index, rule) in rules.into_iter().enumerate() {
        let index = index.to_string();
        let name = rule.name.0;
        if secrets.iter().any(|secret| secret.name == name) {
            return Err(at(
                root,
                &["secrets", &index, "name"],
                format!("the secret {name} is there already"),
            ));
        }
        let delivery = match rule.delivery {
            Some(How::Env) if !profile.spec().env_secrets => {
                let what = format!(
                    "the profile {profile} keeps credentials out of the environment: take memory"
                );
                return Err(at(root, &["secrets", &index, "delivery"], what));
            }
            Some(How::Env) if rule.hosts.is_some() => {
                let what =
                    "what is in the environment is for no hosts: leave one of both out".into();
                return Err(at(root, &["secrets", &index, "delivery"], what));
            }
            Some(How::Env) => Delivery::Env,
            Some(How::Endpoint) if rule.hosts.is_some() => {
                let what =
                    "what is asked for at an endpoint is for no hosts: leave one of both out"
                        .into();
                return Err(at(root, &["secrets", &index, "delivery"], what));
            }
            Some(How::Endpoint) => {
                if let Some(other) =
                    secrets.iter().find(|secret| secret.delivery == Delivery::Endpoint)
                {
                    let what = format!("{} has the one endpoint there is", other.name);
                    return Err(at(root, &["secrets", &index, "delivery"], what));
                }
                Delivery::Endpoint
            }
            Some(How::Proxy) if rule.hosts.is_none() => {
                let what = "`proxy` needs `hosts`, which the value is for".into();
                return Err(at(root, &["secrets", &index, "delivery"], what));
            }
            Some(How::Memory) if rule.hosts.is_some() => {
                let what =
                    "what is delivered in memory is for no hosts: leave one of both out".into();
                return Err(at(root, &["secrets", &index, "delivery"], what));
            }
            Some(How::Proxy | How::Memory) | None => match rule.hosts {
                None => Delivery::Memory,
                Some(hosts) => {
                    let listed =
                        |host: &Endpoint| egress.iter().any(|endpoint| endpoint.covers(host));
                    if let Some(other) = hosts.iter().find(|host| !listed(host)) {
                        let what = format!("{other} is not among the `allowed_egress`");
                        return Err(at(root, &["secrets", &index, "hosts"], what));
                    }
                    if hosts.is_empty() {
                        return Err(at(
                            root,
                            &["secrets", &index, "hosts"],
                            "a credential for nobody".into(),
                        ));
                    }
                    bounded(hosts.len(), root, &["secrets", &index, "hosts"])?;
                    let parts = rule.replaced_in.unwrap_or_default();
                    let (query, body) = (parts.contains(&Part::Query), parts.contains(&Part::Body));
                    Delivery::Proxy(ProxyScope { hosts, query, body })
                }
            },
        };
        secrets.push(SecretSpec { name, source: rule.source.0, delivery });
    }
    Ok(secrets)
}

fn bounded(len: usize, root: &Node, path: &[&str]) -> Result<(), Problem> {
    match len {
        0..=MAX_ENTRIES => Ok(()),
        _ => Err(at(root, path, format!("{len} entries, and {MAX_ENTRIES} is the most"))),
    }
}

fn at(root: &Node, path: &[&str], what: String) -> Problem {
    Problem::new(root.place_of(path), what)
}
