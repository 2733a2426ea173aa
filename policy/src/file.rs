//! The file as it is written: one type for the reader, the schema and the documentation. What a field says by itself is checked
//! here, what it says beside others in [`super::resolve`].

use std::fmt;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use chitin_spec::{
    Endpoint, MAX_MEMORY_MIB, MAX_VCPUS, MIN_MEMORY_MIB, ParseSecretError, SecretSource, TierKind,
    VaultSource, check_name, string_type,
};
use schemars::JsonSchema;
use serde::Deserialize;

use super::profile::{Profile, SyscallFilter};

/// Longest path, `PATH_MAX` of Linux.
const MAX_PATH: usize = 4096;

/// Longest label: it stands in a line of a report.
const MAX_LABEL: usize = 128;

/// The most entries of one list: what each costs (a Landlock rule, a memfd, an address) stays small.
pub const MAX_ENTRIES: usize = 64;

/// What a sandbox may do.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "Chitin policy")]
pub struct PolicyFile {
    /// What this policy is for; it stands in the report and changes nothing.
    pub plugin: Option<Label>,
    /// How the sandbox is isolated. Without it `ironclaw`. Never replaced by something weaker that `fallback` does not list.
    pub runtime: Option<TierKind>,
    /// What else will do, in this order, where `runtime` cannot be had.
    #[schemars(length(max = 2))]
    pub fallback: Option<Vec<TierKind>>,
    /// A root image on the host, an absolute path; without it the one that was built.
    pub image: Option<PlainPath>,
    /// How hard the sandbox is made.
    pub hardening: Option<Hardening>,
    /// What the workload may reach.
    pub sandbox: Option<Rules>,
    /// How much of the machine it gets.
    pub resources: Option<Resources>,
    /// Credentials it is handed.
    #[schemars(length(max = MAX_ENTRIES))]
    pub secrets: Option<Vec<SecretRule>>,
}

/// How hard the sandbox is made.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Hardening {
    /// Every capability is dropped but the one to bind ports below 1024. `false` is refused: no workload keeps more.
    pub strip_agent_capabilities: Option<Always>,
    /// Nothing can be written but the scratch directories. `false` is refused: no tier has a writable root.
    pub readonly_root_filesystem: Option<Always>,
    /// A secret of a vault of which each field is a credential, by its name: `vault://MOUNT/PATH`, or `#FIELD` for only that one.
    pub credential_source: Option<VaultSource>,
}

/// What the workload may reach.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Rules {
    /// What holds where this file says nothing, and what it may not loosen. Without it `default`.
    pub profile: Option<Profile>,
    /// Files and directories of the host that are copied in. With this key, even an empty list, the workload may read
    /// these and the system, and nothing else.
    #[schemars(length(max = MAX_ENTRIES))]
    pub filesystem: Option<Vec<FileRule>>,
    /// What it may connect to.
    pub network: Option<Network>,
    /// Which system calls it may make.
    pub syscall_filter: Option<SyscallFilter>,
}

/// A file or directory of the host in the sandbox: a copy, never shared.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FileRule {
    /// What the workload may do with it.
    pub access: Access,
    /// Where it is in the sandbox. Of `read-write`: below /work or /tmp; of `read-only`: outside of them.
    pub path: PlainPath,
    /// Where it is on the host; without it the same path.
    pub source: Option<PlainPath>,
}

/// What may be done with a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Access {
    /// Copied in.
    ReadOnly,
    /// Copied in, and back to where it came from if the workload succeeds.
    ReadWrite,
}

/// What may be connected to.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// `HOST:PORT` or `*.DOMAIN:PORT`, and nothing else.
    #[schemars(length(max = MAX_ENTRIES))]
    pub allowed_egress: Vec<Endpoint>,
}

/// How much of the machine the sandbox gets. Options of a command may ask for less and not for more.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Resources {
    /// Virtual CPUs.
    pub vcpus: Option<Bounded<1, MAX_VCPUS>>,
    /// Memory in MiB, files that the workload writes included.
    pub memory_mib: Option<Bounded<MIN_MEMORY_MIB, MAX_MEMORY_MIB>>,
    /// The sandbox ends after so long, whatever it does: `90s`, `5m`, `1h 30m`.
    pub timeout: Option<Limit>,
    /// Processes and threads at once.
    pub pids: Option<Bounded<1, 4096>>,
    /// What can be written, in MiB; at most half of the memory, in which it lies.
    pub disk_mib: Option<Bounded<1, 8192>>,
}

/// A credential.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SecretRule {
    /// The name the workload knows it by, an environment variable's.
    pub name: SecretName,
    /// `env:VAR`, `file:PATH`, `exec:CMD` or `vault://MOUNT/PATH#FIELD`.
    pub source: Source,
    /// How the workload gets it; without it `proxy` where there are hosts, else `memory`.
    pub delivery: Option<How>,
    /// The hosts it is for, `HOST:PORT` or `*.DOMAIN:PORT`, each allowed by `allowed_egress`: the value goes to these and does not
    /// enter the sandbox.
    pub hosts: Option<Vec<Endpoint>>,
    /// Where its placeholder is replaced beside headers.
    pub replaced_in: Option<Vec<Part>>,
}

/// A part of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Part {
    /// The query of the URL, which servers write to their logs.
    Query,
    /// The body, of up to 1 MiB.
    Body,
}

/// How a workload gets a credential.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum How {
    /// A file in memory that `NAME_FILE` names.
    Memory,
    /// The environment variable `NAME`, which everything that the workload starts sees.
    Env,
    /// A placeholder in the environment variable `NAME`, replaced on the way to `hosts`.
    Proxy,
    /// Keys of AWS, which SDKs fetch from an address in the sandbox when they need them. For one credential.
    Endpoint,
}

// ---- values that are checked as they are read ----

string_type!(Label, "Label", r"^[^\u0000-\u001f]{1,128}$");
string_type!(PlainPath, "PlainPath", r"^/[^/]+(/[^/]+)*$");
string_type!(Source, "Source", r"^((env|exec):.+|file:/.+|vault://[^/#]+/[^#]+(#.+)?)$");
string_type!(SecretName, "SecretName", r"^[A-Za-z_][A-Za-z0-9_]{0,127}$");
string_type!(Limit, "Limit", r"^([0-9]+ ?[a-z]+ ?)+$");

/// A label for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Label(pub String);

impl FromStr for Label {
    type Err = String;

    fn from_str(text: &str) -> Result<Label, String> {
        match text.chars().count() {
            1..=MAX_LABEL => Ok(Label(text.into())),
            0 => Err("an empty name".into()),
            _ => Err(format!("a name of more than {MAX_LABEL} characters")),
        }
    }
}

/// An absolute path that means what it says: no `.`, no `..`, no doubled slash.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlainPath(pub PathBuf);

impl PlainPath {
    /// Whether it is this directory or something in it.
    pub fn is_in(&self, directory: &str) -> bool {
        self.0.starts_with(directory)
    }
}

impl FromStr for PlainPath {
    type Err = String;

    fn from_str(text: &str) -> Result<PlainPath, String> {
        let path = Path::new(text);
        if !path.is_absolute() {
            return Err(format!("the path `{text}` is relative: it has to begin with /"));
        }
        if path.components().any(|component| component == Component::ParentDir) {
            return Err(format!("the path `{text}` holds `..`: write where it leads"));
        }
        let plain: PathBuf = path.components().collect();
        if plain.as_os_str() != text || text == "/" {
            return Err(format!(
                "the path `{text}` has to be plain: names with one / before each, and none at the end"
            ));
        }
        if text.len() > MAX_PATH {
            return Err(format!("a path of more than {MAX_PATH} bytes"));
        }
        Ok(PlainPath(plain))
    }
}

/// Where a credential comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source(pub SecretSource);

impl FromStr for Source {
    type Err = String;

    fn from_str(text: &str) -> Result<Source, String> {
        let source: SecretSource =
            text.parse().map_err(|error: ParseSecretError| error.to_string())?;
        if let SecretSource::File(path) = &source {
            PlainPath::from_str(&path.to_string_lossy())?;
        }
        Ok(Source(source))
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

/// A time limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit(pub Duration);

impl FromStr for Limit {
    type Err = String;

    fn from_str(text: &str) -> Result<Limit, String> {
        match humantime::parse_duration(text) {
            Ok(limit) if limit.is_zero() => Err("a time limit of nothing".into()),
            Ok(limit) => Ok(Limit(limit)),
            Err(error) => Err(format!("`{text}` is no time such as 90s, 5m or 1h: {error}")),
        }
    }
}

/// A number in a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bounded<const MIN: u32, const MAX: u32>(pub u32);

impl<'de, const MIN: u32, const MAX: u32> Deserialize<'de> for Bounded<MIN, MAX> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Number;
        impl serde::de::Visitor<'_> for Number {
            type Value = i64;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a whole number")
            }

            fn visit_i64<E>(self, number: i64) -> Result<i64, E> {
                Ok(number)
            }
        }
        let number = deserializer.deserialize_i64(Number)?;
        match u32::try_from(number) {
            Ok(number) if (MIN..=MAX).contains(&number) => Ok(Bounded(number)),
            _ => Err(serde::de::Error::custom(format!("{number} is out of range: {MIN} to {MAX}"))),
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

/// Something that cannot be switched off; the key is there so that a file can demand it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Always;

impl<'de> Deserialize<'de> for Always {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Truth;
        impl serde::de::Visitor<'_> for Truth {
            type Value = Always;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("`true`")
            }

            fn visit_bool<E: serde::de::Error>(self, value: bool) -> Result<Always, E> {
                match value {
                    true => Ok(Always),
                    false => Err(E::custom(
                        "this cannot be switched off, on any tier: say `true`, or leave it out, which is the same",
                    )),
                }
            }
        }
        deserializer.deserialize_bool(Truth)
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
