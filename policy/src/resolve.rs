//! Applies a profile to a policy file and checks the rules about several fields.

use std::path::Path;

use chitin_spec::{
    Delivery, DeliveryKind, Endpoint, Limits, PathPrefix, ProxyScope, RequestMethod, SecretSpec,
    TierKind,
};

use super::file::{
    Access, FileRule, MAX_ENTRIES, NormalPath, PolicyFile, RequestPart, Resources, SecretRule,
};
use super::profile::{Profile, SyscallFilter};
use super::yaml::{Diagnostic, Node};
use super::{CopiedFile, Policy};

/// Directories that a workload can write. `/var/tmp` is `/tmp`.
const SCRATCH: [&str; 4] = ["/work", "/tmp", "/var/tmp", "/dev/shm"];

/// The scratch directories below which the policy may place writable files.
const WRITABLE: [&str; 2] = ["/work", "/tmp"];

/// Directories of the kernel, which hold no files.
const KERNEL: [&str; 3] = ["/proc", "/sys", "/dev"];

/// Resolves a file to a policy. `root` is the tree that the file was read from.
pub fn resolve_policy(
    file: PolicyFile,
    root: &Node,
    origin: &str,
    digest: String,
) -> Result<Policy, Diagnostic> {
    let runtime = file.runtime.unwrap_or(TierKind::Ironclaw);
    let fallback = file.fallback.unwrap_or_default();
    check_fallback(runtime, &fallback, root)?;

    let (mut profile, mut files, mut egress, mut syscalls) =
        (Profile::default(), None, Vec::new(), None);
    if let Some(rules) = file.sandbox {
        profile = rules.profile.unwrap_or_default();
        files = rules.filesystem;
        egress = rules.network.map(|network| network.allowed_egress).unwrap_or_default();
        syscalls = rules.syscall_filter;
    }
    let syscalls = resolve_syscalls(syscalls, profile, root)?;
    check_egress(&egress, profile, root)?;
    let limits = resolve_limits(file.resources, profile, root)?;
    let files_confined = profile.spec().files_confined || files.is_some();
    let files = resolve_files(files.unwrap_or_default(), root)?;
    let secrets = resolve_secrets(file.secrets.unwrap_or_default(), profile, &egress, root)?;
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
        private_memory: file
            .hardening
            .as_ref()
            .and_then(|hardening| hardening.private_memory)
            .unwrap_or_default(),
        credential_source: file.hardening.and_then(|hardening| hardening.credential_source),
    })
}

fn check_fallback(runtime: TierKind, fallback: &[TierKind], root: &Node) -> Result<(), Diagnostic> {
    for (index, tier) in fallback.iter().enumerate() {
        if *tier == runtime || fallback[..index].contains(tier) {
            let path = ["fallback", &index.to_string()];
            return Err(diagnostic(root, &path, format!("{tier} is listed twice")));
        }
    }
    Ok(())
}

fn resolve_syscalls(
    filter: Option<SyscallFilter>,
    profile: Profile,
    root: &Node,
) -> Result<SyscallFilter, Diagnostic> {
    let required = profile.spec().syscalls;
    let filter = filter.unwrap_or(required);
    if filter < required {
        let message = format!(
            "the profile {profile} requires {}: remove this key or choose another profile",
            required.name()
        );
        return Err(diagnostic(root, &["sandbox", "syscall_filter"], message));
    }
    Ok(filter)
}

fn check_egress(egress: &[Endpoint], profile: Profile, root: &Node) -> Result<(), Diagnostic> {
    let path = ["sandbox", "network", "allowed_egress"];
    if !egress.is_empty() && !profile.spec().egress {
        let message = format!("the profile {profile} has no network: choose restricted-net");
        return Err(diagnostic(root, &path, message));
    }
    check_len(egress.len(), root, &path)
}

fn resolve_limits(
    resources: Option<Resources>,
    profile: Profile,
    root: &Node,
) -> Result<Limits, Diagnostic> {
    let mut limits = profile.spec().resources;
    if let Some(resources) = resources {
        limits = Limits {
            vcpus: resources.vcpus.map_or(limits.vcpus, |number| number.0),
            memory_mib: resources.memory_mib.map_or(limits.memory_mib, |number| number.0),
            timeout: resources.timeout.map(|limit| limit.0).or(limits.timeout),
            pids: resources.pids.map_or(limits.pids, |number| number.0),
            // The profile's default shrinks with a smaller memory that the file names.
            disk_mib: resources.disk_mib.map(|number| number.0).or_else(|| {
                limits
                    .disk_mib
                    .map(|disk| disk.min(resources.memory_mib.map_or(disk, |memory| memory.0 / 2)))
            }),
        };
    }
    if let Some(disk) = limits.disk_mib.filter(|disk| *disk > limits.memory_mib / 2) {
        let message = format!(
            "{disk} MiB of files do not fit: files lie in memory and may take half of its {} MiB",
            limits.memory_mib
        );
        return Err(diagnostic(root, &["resources", "disk_mib"], message));
    }
    Ok(limits)
}

fn resolve_files(rules: Vec<FileRule>, root: &Node) -> Result<Vec<CopiedFile>, Diagnostic> {
    check_len(rules.len(), root, &["sandbox", "filesystem"])?;
    let mut files: Vec<CopiedFile> = Vec::new();
    for (index, rule) in rules.into_iter().enumerate() {
        check_path(&rule, &files).map_err(|message| {
            diagnostic(root, &["sandbox", "filesystem", &index.to_string(), "path"], message)
        })?;
        let FileRule { access, path: NormalPath(path), source } = rule;
        let source = source.map_or_else(|| path.clone(), |NormalPath(source)| source);
        files.push(CopiedFile { access, path, source });
    }
    Ok(files)
}

/// Checks the path in the sandbox. An error says why it is refused, with a remedy.
fn check_path(rule: &FileRule, earlier: &[CopiedFile]) -> Result<(), String> {
    let path = &rule.path;
    let shown = path.0.display();
    if let Some(kernel) = KERNEL.iter().find(|kernel| path.is_in(kernel)) {
        return Err(format!("{shown} is in {kernel}, which belongs to the kernel"));
    }
    match rule.access {
        Access::ReadOnly => {
            if let Some(scratch) = SCRATCH.iter().find(|scratch| path.is_in(scratch)) {
                return Err(format!(
                    "{shown} cannot be read-only in {scratch}, which the workload can write: \
                     choose a path outside of it, and name the host's path in `source`"
                ));
            }
        }
        Access::ReadWrite => {
            let is_below =
                |directory: &&&str| path.is_in(directory) && path.0 != Path::new(directory);
            if WRITABLE.iter().find(is_below).is_none() {
                return Err(format!(
                    "{shown} cannot be written in the sandbox: choose a path below /work or /tmp, \
                     and name the host's path in `source`"
                ));
            }
        }
    }
    let nested =
        |file: &&CopiedFile| path.0.starts_with(&file.path) || file.path.starts_with(&path.0);
    match earlier.iter().find(nested) {
        Some(other) => Err(format!("{shown} and {} contain each other", other.path.display())),
        None => Ok(()),
    }
}

fn resolve_secrets(
    rules: Vec<SecretRule>,
    profile: Profile,
    egress: &[Endpoint],
    root: &Node,
) -> Result<Vec<SecretSpec>, Diagnostic> {
    check_len(rules.len(), root, &["secrets"])?;
    let mut secrets: Vec<SecretSpec> = Vec::new();
    for (index, rule) in rules.into_iter().enumerate() {
        let index = index.to_string();
        let secret = resolve_secret(rule, profile, egress, &secrets)
            .map_err(|(key, message)| diagnostic(root, &["secrets", &index, key], message))?;
        secrets.push(secret);
    }
    Ok(secrets)
}

/// Resolves one credential. An error names the key of the rule at fault.
fn resolve_secret(
    rule: SecretRule,
    profile: Profile,
    egress: &[Endpoint],
    earlier: &[SecretSpec],
) -> Result<SecretSpec, (&'static str, String)> {
    let name = rule.name.0;
    if earlier.iter().any(|secret| secret.name == name) {
        return Err(("name", format!("the secret {name} is listed twice")));
    }
    let fault = |message: String| Err(("delivery", message));
    for (key, is_set) in [
        ("replaced_in", rule.replaced_in.is_some()),
        ("path_prefix", rule.path_prefix.is_some()),
        ("methods", rule.methods.is_some()),
    ] {
        if is_set && rule.hosts.is_none() {
            return Err((key, format!("`{key}` needs `hosts`, which receive the value")));
        }
    }
    let delivery = match (rule.delivery, rule.hosts) {
        (Some(DeliveryKind::Env), _) if !profile.spec().env_secrets => {
            return fault(format!(
                "the profile {profile} keeps credentials out of the environment: choose memory"
            ));
        }
        (
            Some(kind @ (DeliveryKind::Env | DeliveryKind::Endpoint | DeliveryKind::Memory)),
            Some(_),
        ) => {
            return fault(format!(
                "`{}` does not use `hosts`: remove one of the two keys",
                kind.name()
            ));
        }
        (Some(DeliveryKind::Env), None) => Delivery::Env,
        (Some(DeliveryKind::Endpoint), None) => {
            let taken = earlier.iter().find(|secret| secret.delivery == Delivery::Endpoint);
            if let Some(other) = taken {
                return fault(format!(
                    "only one secret can use `endpoint`, and {} does",
                    other.name
                ));
            }
            Delivery::Endpoint
        }
        (Some(DeliveryKind::Proxy), None) => {
            return fault("`proxy` needs `hosts`, which receive the value".into());
        }
        (Some(DeliveryKind::Memory) | None, None) => Delivery::Memory,
        (Some(DeliveryKind::Proxy) | None, Some(hosts)) => {
            check_hosts(&hosts, egress).map_err(|message| ("hosts", message))?;
            Delivery::Proxy(resolve_scope(hosts, rule.replaced_in, rule.path_prefix, rule.methods)?)
        }
    };
    Ok(SecretSpec { name, source: rule.source.0, delivery })
}

/// Resolves the requests in which a placeholder is replaced.
fn resolve_scope(
    hosts: Vec<Endpoint>,
    parts: Option<Vec<RequestPart>>,
    path_prefix: Option<PathPrefix>,
    methods: Option<Vec<RequestMethod>>,
) -> Result<ProxyScope, (&'static str, String)> {
    if methods.as_ref().is_some_and(Vec::is_empty) {
        return Err(("methods", "`methods` must not be empty".into()));
    }
    let (parts, methods) = (parts.unwrap_or_default(), methods.unwrap_or_default());
    for (key, len) in [("replaced_in", parts.len()), ("methods", methods.len())] {
        if len > MAX_ENTRIES {
            return Err((key, too_many(len)));
        }
    }
    let headers = parts.iter().filter_map(|part| match part {
        RequestPart::Header(name) => Some(name.clone()),
        RequestPart::Query | RequestPart::Body => None,
    });
    Ok(ProxyScope {
        hosts,
        query: parts.contains(&RequestPart::Query),
        body: parts.contains(&RequestPart::Body),
        headers: headers.collect(),
        path_prefix,
        methods,
    })
}

/// Checks the hosts that receive a credential: at least one, and each in `allowed_egress`.
fn check_hosts(hosts: &[Endpoint], egress: &[Endpoint]) -> Result<(), String> {
    let listed = |host: &Endpoint| egress.iter().any(|endpoint| endpoint.covers(host));
    if let Some(other) = hosts.iter().find(|host| !listed(host)) {
        return Err(format!("{other} is not covered by `allowed_egress`"));
    }
    match hosts.len() {
        0 => Err("`hosts` must not be empty".into()),
        1..=MAX_ENTRIES => Ok(()),
        len => Err(too_many(len)),
    }
}

fn check_len(len: usize, root: &Node, path: &[&str]) -> Result<(), Diagnostic> {
    match len {
        0..=MAX_ENTRIES => Ok(()),
        _ => Err(diagnostic(root, path, too_many(len))),
    }
}

fn too_many(len: usize) -> String {
    format!("{len} entries: at most {MAX_ENTRIES} are allowed")
}

fn diagnostic(root: &Node, path: &[&str], message: String) -> Diagnostic {
    Diagnostic::new(root.locate(path), message)
}
