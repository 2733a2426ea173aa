//! The policy file as it is written. The same types serve the reader, the schema and the
//! documentation.
//!
//! A rule about a single field is checked here, a rule about several fields in [`super::resolve`].

use std::fmt;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use chitin_spec::{
    DeliveryKind, Endpoint, HeaderField, KEY_HEADERS, MAX_MEMORY_MIB, MAX_VCPUS, MIN_MEMORY_MIB,
    Mebibytes, ParseScopeError, ParseSecretError, PathPrefix, RequestMethod, SecretSource,
    TierKind, VaultSource, check_name, string_type,
};
use schemars::JsonSchema;
use serde::Deserialize;

use super::profile::{Profile, SyscallFilter};

/// Longest path, `PATH_MAX` of Linux.
const MAX_PATH: usize = 4096;

/// Longest label. A report prints it on one line.
const MAX_LABEL: usize = 128;

/// Maximum entries of a list, so that their cost (a Landlock rule, a file, an address each) stays
/// small.
pub const MAX_ENTRIES: usize = 64;

/// The rights and resources of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "Chitin policy")]
pub struct PolicyFile {
    /// Name of the plugin that the policy is for. The report shows it; nothing else depends on it.
    pub plugin: Option<Label>,
    /// Tier that isolates the sandbox (default `ironclaw`). A weaker tier is used only if
    /// `fallback` lists it.
    pub runtime: Option<TierKind>,
    /// Tiers to try, in order, if `runtime` is unavailable.
    #[schemars(length(max = 2))]
    pub fallback: Option<Vec<TierKind>>,
    /// Absolute path of a root image on the host. The default is the image that Chitin was built
    /// with.
    pub image: Option<NormalPath>,
    /// Hardening of the sandbox.
    pub hardening: Option<Hardening>,
    /// Files, network and system calls of the workload.
    pub sandbox: Option<Rules>,
    /// Share of the machine that the sandbox gets.
    pub resources: Option<Resources>,
    /// Credentials of the workload.
    #[schemars(length(max = MAX_ENTRIES))]
    pub secrets: Option<Vec<SecretRule>>,
}

/// Hardening of the sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Hardening {
    /// Drops every capability except CAP_NET_BIND_SERVICE. `false` is refused: no workload keeps
    /// more.
    pub strip_agent_capabilities: Option<Always>,
    /// Makes everything read-only except the scratch directories. `false` is refused: no tier has a
    /// writable root.
    pub readonly_root_filesystem: Option<Always>,
    /// Gives the sandbox copies of the kernel, of the root image and of a template's memory, instead
    /// of pages that it shares with other sandboxes (default `false`). Needs a microVM.
    pub private_memory: Option<bool>,
    /// A Vault secret whose fields become credentials with the names of the fields:
    /// `vault://MOUNT/PATH`, or `vault://MOUNT/PATH#FIELD` for a single field.
    pub credential_source: Option<VaultSource>,
}

/// Files, network and system calls of the workload.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Rules {
    /// Defaults for keys that are absent, and restrictions that the file cannot loosen (default
    /// `default`).
    pub profile: Option<Profile>,
    /// Files and directories of the host that are copied in. If the key is present, even with an
    /// empty list, the workload can read only these and the system.
    #[schemars(length(max = MAX_ENTRIES))]
    pub filesystem: Option<Vec<FileRule>>,
    /// Permitted connections.
    pub network: Option<Network>,
    /// Permitted system calls.
    pub syscall_filter: Option<SyscallFilter>,
}

/// A file or directory of the host that the sandbox gets as a copy, never shared.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FileRule {
    /// Access of the workload.
    pub access: Access,
    /// Path in the sandbox: below /work or /tmp for `read-write`, outside of them for `read-only`.
    pub path: NormalPath,
    /// Path on the host (default: the same path).
    pub source: Option<NormalPath>,
}

/// Access to a copied file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Access {
    /// Copy it in.
    ReadOnly,
    /// Copy it in, and back to its source if the workload succeeds.
    ReadWrite,
}

/// Permitted connections.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// Permitted destinations, `HOST:PORT` or `*.DOMAIN:PORT`. Every other one is refused.
    #[schemars(length(max = MAX_ENTRIES))]
    pub allowed_egress: Vec<Endpoint>,
}

/// Share of the machine that the sandbox gets. Command-line options can lower it, not raise it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Resources {
    /// Virtual CPUs.
    pub vcpus: Option<Bounded<1, MAX_VCPUS>>,
    /// Memory in MiB, or with a unit (`1G`), including files that the workload writes.
    pub memory_mib: Option<Mebibytes<MIN_MEMORY_MIB, MAX_MEMORY_MIB>>,
    /// Time after which the sandbox is ended: `90s`, `5m`, `1h 30m`.
    pub timeout: Option<TimeLimit>,
    /// Maximum number of processes and threads.
    pub pids: Option<Bounded<1, 4096>>,
    /// Maximum size of written files, in MiB or with a unit (`128M`). They lie in memory and may
    /// take half of it.
    pub disk_mib: Option<Mebibytes<1, 8192>>,
}

/// A credential.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SecretRule {
    /// Name of the credential: a valid name of an environment variable.
    pub name: SecretName,
    /// `env:VAR`, `file:PATH`, `exec:CMD` or `vault://MOUNT/PATH#FIELD`.
    pub source: SourceRule,
    /// Way in which the workload gets it (default: `proxy` if `hosts` is present, else `memory`).
    pub delivery: Option<DeliveryKind>,
    /// Hosts that receive the value, `HOST:PORT` or `*.DOMAIN:PORT`, each covered by
    /// `allowed_egress`. The value does not enter the sandbox.
    pub hosts: Option<Vec<Endpoint>>,
    /// Parts of a request in which the placeholder is replaced in addition to the headers that
    /// carry keys: `query`, `body` (up to 1 MiB), `header:NAME`.
    #[schemars(length(max = MAX_ENTRIES))]
    pub replaced_in: Option<Vec<RequestPart>>,
    /// Replaces the placeholder only in requests for this path and those below it.
    pub path_prefix: Option<PathPrefix>,
    /// Replaces the placeholder only in requests with these methods.
    #[schemars(length(max = MAX_ENTRIES))]
    pub methods: Option<Vec<RequestMethod>>,
}

string_type!(RequestPart, "RequestPart", r"^(query|body|header:[A-Za-z0-9!#$%&'*+.^_`|~-]+)$");
string_type!(Label, "Label", r"^[^\u0000-\u001f]{1,128}$");
string_type!(NormalPath, "NormalPath", r"^/[^/]+(/[^/]+)*$");
string_type!(SourceRule, "Source", r"^((env|exec):.+|file:/.+|vault://[^/#]+/[^#]+(#.+)?)$");
string_type!(SecretName, "SecretName", r"^[A-Za-z_][A-Za-z0-9_]{0,127}$");
string_type!(TimeLimit, "TimeLimit", r"^([0-9]+ ?[a-z]+ ?)+$");

/// A label for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Label(pub String);

impl FromStr for Label {
    type Err = String;

    fn from_str(text: &str) -> Result<Label, String> {
        match text.chars().count() {
            1..=MAX_LABEL => Ok(Label(text.into())),
            0 => Err("a name must not be empty".into()),
            _ => Err(format!("a name has at most {MAX_LABEL} characters")),
        }
    }
}

/// An absolute path in normal form: no `.`, no `..`, no repeated or trailing slash.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NormalPath(pub PathBuf);

impl NormalPath {
    /// Returns true if the path is `directory` or lies below it.
    pub fn is_in(&self, directory: &str) -> bool {
        self.0.starts_with(directory)
    }
}

impl FromStr for NormalPath {
    type Err = String;

    fn from_str(text: &str) -> Result<NormalPath, String> {
        let path = Path::new(text);
        if !path.is_absolute() {
            return Err(format!("the path `{text}` is relative: it must begin with /"));
        }
        if path.components().any(|component| component == Component::ParentDir) {
            return Err(format!("the path `{text}` contains `..`: write its target"));
        }
        let plain: PathBuf = path.components().collect();
        if plain.as_os_str() != text || text == "/" {
            return Err(format!(
                "the path `{text}` is not in normal form: one / before each name, none at the end"
            ));
        }
        if text.len() > MAX_PATH {
            return Err(format!("a path has at most {MAX_PATH} bytes"));
        }
        Ok(NormalPath(plain))
    }
}

/// The source of a credential. The path of a file must be absolute and in normal form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceRule(pub SecretSource);

impl FromStr for SourceRule {
    type Err = String;

    fn from_str(text: &str) -> Result<SourceRule, String> {
        let source: SecretSource =
            text.parse().map_err(|error: ParseSecretError| error.to_string())?;
        match &source {
            SecretSource::File(path) => {
                NormalPath::from_str(&path.to_string_lossy())?;
            }
            SecretSource::Env(name) if name.contains('@') => {
                return Err(format!(
                    "`{name}` cannot name an environment variable: hosts are in the key `hosts`"
                ));
            }
            _ => {}
        }
        Ok(SourceRule(source))
    }
}

/// A part of an HTTP request in which a placeholder is replaced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RequestPart {
    /// The query of the URL. Servers write it to their logs.
    Query,
    /// The body, up to 1 MiB.
    Body,
    /// A header, in addition to those that carry keys.
    Header(HeaderField),
}

impl FromStr for RequestPart {
    type Err = String;

    fn from_str(text: &str) -> Result<RequestPart, String> {
        match text.split_once(':') {
            None if text == "query" => Ok(RequestPart::Query),
            None if text == "body" => Ok(RequestPart::Body),
            None if text == "header" || text == "headers" => Err(format!(
                "`{text}` does not name a header: write `header:NAME` for each one in addition to \
                 {}",
                KEY_HEADERS.join(", ")
            )),
            Some(("header", name)) => name
                .parse()
                .map(RequestPart::Header)
                .map_err(|error: ParseScopeError| error.to_string()),
            _ => {
                Err(format!("`{text}` is not a part of a request: use query, body or header:NAME"))
            }
        }
    }
}

/// The name of a credential.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SecretName(pub String);

impl FromStr for SecretName {
    type Err = String;

    fn from_str(text: &str) -> Result<SecretName, String> {
        check_name(text).map_err(|error| error.to_string())?;
        Ok(SecretName(text.into()))
    }
}

/// A time limit, not zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimeLimit(pub Duration);

impl FromStr for TimeLimit {
    type Err = String;

    fn from_str(text: &str) -> Result<TimeLimit, String> {
        match humantime::parse_duration(text) {
            Ok(limit) if limit.is_zero() => Err("a time limit must not be zero".into()),
            Ok(limit) => Ok(TimeLimit(limit)),
            Err(error) => Err(format!("`{text}` is not a duration such as 90s, 5m or 1h: {error}")),
        }
    }
}

/// An integer from `MIN` to `MAX`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bounded<const MIN: u32, const MAX: u32>(pub u32);

impl<'de, const MIN: u32, const MAX: u32> Deserialize<'de> for Bounded<MIN, MAX> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Number;
        impl serde::de::Visitor<'_> for Number {
            type Value = i64;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an integer")
            }

            fn visit_i64<E>(self, number: i64) -> Result<i64, E> {
                Ok(number)
            }
        }
        let number = deserializer.deserialize_i64(Number)?;
        match u32::try_from(number) {
            Ok(number) if (MIN..=MAX).contains(&number) => Ok(Bounded(number)),
            _ => Err(serde::de::Error::custom(format!(
                "{number} is out of range: use {MIN} to {MAX}"
            ))),
        }
    }
}

impl<const MIN: u32, const MAX: u32> JsonSchema for Bounded<MIN, MAX> {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        format!("From{MIN}To{MAX}").into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "type": "integer", "minimum": MIN, "maximum": MAX })
    }
}

/// A protection that cannot be switched off. The key exists so that a file can demand it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Always;

impl<'de> Deserialize<'de> for Always {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OnlyTrue;
        impl serde::de::Visitor<'_> for OnlyTrue {
            type Value = Always;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("`true`")
            }

            fn visit_bool<E: serde::de::Error>(self, value: bool) -> Result<Always, E> {
                match value {
                    true => Ok(Always),
                    false => Err(E::custom(
                        "this cannot be switched off on any tier: write `true` or remove the key",
                    )),
                }
            }
        }
        deserializer.deserialize_bool(OnlyTrue)
    }
}

impl JsonSchema for Always {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Always".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "const": true })
    }
}
