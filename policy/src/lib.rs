//! The policy file: the rights and resources of a sandbox.
//!
//! ```text
//!   text ──yaml──▶ nodes with locations ──decode──▶ PolicyFile ──resolve, with profile──▶ Policy
//! ```
//!
//! The reader is strict: anything unknown is an error with line and column, never ignored. No type
//! here enforces anything; the module `tiers` names the mechanism that enforces each field on each
//! tier.
#![forbid(unsafe_code)]

mod consent;
mod decode;
mod explain;
mod file;
mod profile;
mod resolve;
mod tiers;
mod yaml;

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use chitin_protocol::{Confine, FileRule, SystemCalls};
use chitin_spec::{Boundary, Endpoint, Limits, SecretSpec, TierKind, VaultSource};
use schemars::transform::{Transform, transform_subschemas};
use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest, Sha256};

pub use consent::{Consent, HostUse, HostUseKind, ParseConsentError, UnconsentedUses};
pub use file::Access;
pub use profile::{PROFILES, Profile, ProfileSpec, SyscallFilter};
pub use tiers::{Field, Verdict};
pub use yaml::Location;

use file::PolicyFile;
use yaml::{Diagnostic, MAX_BYTES};

/// An invalid policy, or a request that the policy does not permit.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// The file cannot be read.
    #[error("read the policy {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// The policy does not list the requested tier.
    #[error(
        "the policy {origin} does not permit the tier {tier}: add it to `fallback`, or choose a \
         listed tier"
    )]
    Tier {
        /// The file.
        origin: String,
        /// The requested tier.
        tier: TierKind,
    },
    /// The file exceeds the size limit.
    #[error("{} is larger than {} KiB: not a policy file", path.display(), MAX_BYTES / 1024)]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// The file is not UTF-8.
    #[error("the policy {} is not UTF-8: invalid byte at offset {at}", path.display())]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// Offset of the first invalid byte.
        at: usize,
    },
    /// The file breaks a rule of the format.
    #[error("{origin}, {location}: {message}")]
    Invalid {
        /// The file.
        origin: String,
        /// Location.
        location: Location,
        /// The rule, and a valid alternative.
        message: String,
    },
    /// The tier cannot enforce a field.
    #[error("{tier} cannot enforce the policy {origin}: {field}: {why}")]
    Refused {
        /// The file.
        origin: String,
        /// The tier.
        tier: TierKind,
        /// The field.
        field: &'static str,
        /// Reason.
        why: &'static str,
    },
    /// The request exceeds a limit of the policy.
    #[error(
        "{what} {asked} is more than the {allowed} that the policy {origin} allows: lower it, or \
         change the policy"
    )]
    Exceeded {
        /// The file.
        origin: String,
        /// The limit, as the user knows it.
        what: &'static str,
        /// Requested value.
        asked: String,
        /// Largest permitted value.
        allowed: String,
    },
    /// The policy does not list the requested credential.
    #[error("secret {name}: the policy {origin} does not list it")]
    Secret {
        /// The file.
        origin: String,
        /// The credential.
        name: String,
    },
    /// The policy does not list the requested endpoint.
    #[error(
        "--allow {endpoint}: the policy {origin} does not list it: remove the option, or change \
         the policy"
    )]
    Egress {
        /// The file.
        origin: String,
        /// The endpoint.
        endpoint: Endpoint,
    },
    /// The policy uses the host in ways that the caller has not consented to.
    #[error(
        "the policy {origin} needs your consent: it {uses}; if you trust it, add `{}`",
        uses.options()
    )]
    Consent {
        /// The file.
        origin: String,
        /// The uses that lack consent.
        uses: UnconsentedUses,
    },
    /// A template was built under another policy.
    #[error(
        "the template `{template}` was built under {built}: build it again with \
         `chitin template build --policy`"
    )]
    Template {
        /// The template.
        template: String,
        /// The policy that it was built under.
        built: String,
    },
}

/// A file or directory of the host that the sandbox gets as a copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopiedFile {
    /// Access of the workload.
    pub access: Access,
    /// Path in the sandbox.
    pub path: PathBuf,
    /// Path on the host.
    pub source: PathBuf,
}

/// The rights and resources of a sandbox: a policy file with its profile applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Name of the file in messages.
    pub origin: String,
    /// SHA-256 of the file's bytes, in hexadecimal.
    pub digest: String,
    /// Plugin that the policy is for.
    pub plugin: Option<String>,
    /// Profile.
    pub profile: Profile,
    /// First choice of tier.
    pub runtime: TierKind,
    /// Tiers to try, in order, if `runtime` is unavailable.
    pub fallback: Vec<TierKind>,
    /// Root image that replaces the default one.
    pub image: Option<PathBuf>,
    /// The workload can read only the system and [`files`](Policy::files).
    pub files_confined: bool,
    /// Files and directories that are copied in.
    pub files: Vec<CopiedFile>,
    /// Permitted destinations of connections.
    pub egress: Vec<Endpoint>,
    /// Permitted system calls.
    pub syscalls: SyscallFilter,
    /// Share of the machine.
    pub limits: Limits,
    /// Credentials, with distinct names.
    pub secrets: Vec<SecretSpec>,
    /// Vault secret whose fields are credentials with the names of the fields.
    pub credential_source: Option<VaultSource>,
    /// The sandbox shares no page of memory with another.
    pub private_memory: bool,
}

impl Policy {
    /// Reads a policy file.
    ///
    /// # Errors
    /// Fails if the file cannot be read, is larger than 64 KiB, is not UTF-8, or is invalid.
    pub fn load(path: impl AsRef<Path>) -> Result<Policy, PolicyError> {
        let path = path.as_ref();
        let failed = |source| PolicyError::Read { path: path.to_owned(), source };
        let mut bytes = Vec::new();
        File::open(path)
            .and_then(|file| file.take(MAX_BYTES + 1).read_to_end(&mut bytes))
            .map_err(failed)?;
        if bytes.len() as u64 > MAX_BYTES {
            return Err(PolicyError::TooLarge { path: path.to_owned() });
        }
        match std::str::from_utf8(&bytes) {
            Ok(text) => Policy::parse(text, &path.display().to_string()),
            Err(error) => {
                Err(PolicyError::NotUtf8 { path: path.to_owned(), at: error.valid_up_to() })
            }
        }
    }

    /// Parses a policy. Messages call the text `origin`.
    ///
    /// # Errors
    /// [`PolicyError::TooLarge`], and [`PolicyError::Invalid`] with line and column.
    pub fn parse(text: &str, origin: &str) -> Result<Policy, PolicyError> {
        if text.len() as u64 > MAX_BYTES {
            return Err(PolicyError::TooLarge { path: origin.into() });
        }
        let digest = format!("{:x}", Sha256::digest(text));
        let resolved = yaml::parse_document(text).and_then(|root| {
            let file = PolicyFile::deserialize(&root)
                .map_err(|error| error.into_diagnostic(root.location))?;
            resolve::resolve_policy(file, &root, origin, digest)
        });
        resolved.map_err(|Diagnostic { location, message }| PolicyError::Invalid {
            origin: origin.into(),
            location,
            message,
        })
    }

    /// Returns the JSON Schema of the file format, for editors.
    pub fn schema() -> String {
        let mut schema = schemars::schema_for!(PolicyFile);
        RemoveNull.transform(&mut schema);
        let mut text = serde_json::to_string_pretty(&schema).unwrap_or_default();
        text.push('\n');
        text
    }

    /// Explains in sentences what the policy permits, and the mechanism that enforces it on each
    /// tier.
    pub fn explain(&self) -> String {
        explain::explain_policy(self)
    }

    /// Checks that a tier can enforce every field.
    ///
    /// # Errors
    /// [`PolicyError::Refused`] for the first field that it cannot.
    pub fn check_tier(&self, tier: TierKind) -> Result<(), PolicyError> {
        for field in Field::ALL {
            if let Verdict::Refused(why) = self.verdict(field, tier) {
                let origin = self.origin.clone();
                return Err(PolicyError::Refused { origin, tier, field: field.name(), why });
            }
        }
        Ok(())
    }

    /// Returns the acceptable tiers, the first choice first.
    pub fn tiers(&self) -> impl Iterator<Item = TierKind> {
        std::iter::once(self.runtime).chain(self.fallback.iter().copied())
    }

    /// Returns the first of the [`tiers`](Policy::tiers) that can enforce every field.
    ///
    /// # Errors
    /// Fails with the reason of `runtime` if no tier can.
    pub fn tier(&self) -> Result<TierKind, PolicyError> {
        match self.tiers().find(|tier| self.check_tier(*tier).is_ok()) {
            Some(tier) => Ok(tier),
            None => self.check_tier(self.runtime).map(|()| self.runtime),
        }
    }

    /// Returns the part of the policy that the agent enforces behind a boundary.
    ///
    /// The tier limits processes and disk of a container. gVisor's kernel counts processes itself,
    /// so there the agent sets the limit.
    pub fn confine(&self, request: u32, boundary: Boundary) -> Confine {
        let limits_tasks = match boundary {
            Boundary::Kvm | Boundary::Gvisor => true,
            Boundary::Namespaces => false,
        };
        let rule = |file: &CopiedFile| FileRule {
            path: file.path.as_os_str().as_bytes().into(),
            writable: file.access == Access::ReadWrite,
        };
        Confine {
            request,
            system_calls: match self.syscalls {
                SyscallFilter::DefaultAllow => SystemCalls::DefaultAllow,
                SyscallFilter::DefaultDeny => SystemCalls::DefaultDeny,
            },
            files: self.files_confined.then(|| self.files.iter().map(rule).collect()),
            max_tasks: limits_tasks.then_some(self.limits.pids),
            max_disk: self
                .limits
                .disk_mib
                .filter(|_| boundary == Boundary::Kvm)
                .map(|mib| u64::from(mib) << 20),
        }
    }

    /// Returns true if the policy permits every name that an endpoint matches.
    pub fn may_reach(&self, endpoint: &Endpoint) -> bool {
        self.egress.iter().any(|listed| listed.covers(endpoint))
    }

    /// Returns the requested value, or the policy's if there is no request.
    ///
    /// # Errors
    /// [`PolicyError::Exceeded`] if the requested value is larger than the policy's.
    pub fn tighten(
        &self,
        what: &'static str,
        asked: Option<u64>,
        allowed: u32,
    ) -> Result<u64, PolicyError> {
        let allowed = u64::from(allowed);
        match asked {
            Some(asked) if asked > allowed => {
                Err(self.exceeded_error(what, asked.to_string(), allowed.to_string()))
            }
            asked => Ok(asked.unwrap_or(allowed)),
        }
    }

    /// Does the same for the time limit.
    ///
    /// # Errors
    /// [`PolicyError::Exceeded`] if the requested limit is longer than the policy's.
    pub fn tighten_timeout(
        &self,
        asked: Option<Duration>,
    ) -> Result<Option<Duration>, PolicyError> {
        match (asked, self.limits.timeout) {
            (Some(asked), Some(allowed)) if asked > allowed => {
                let format = |limit| humantime::format_duration(limit).to_string();
                Err(self.exceeded_error("a time limit of", format(asked), format(allowed)))
            }
            (asked, allowed) => Ok(asked.or(allowed)),
        }
    }

    fn exceeded_error(&self, what: &'static str, asked: String, allowed: String) -> PolicyError {
        PolicyError::Exceeded { origin: self.origin.clone(), what, asked, allowed }
    }
}

/// Removes `null` from every type: a key may be absent but not empty, and schemars reads an
/// `Option` as both.
struct RemoveNull;

impl Transform for RemoveNull {
    fn transform(&mut self, schema: &mut schemars::Schema) {
        transform_subschemas(self, schema);
        let Some(object) = schema.as_object_mut() else { return };
        if let Some(Value::Array(types)) = object.get_mut("type") {
            types.retain(|kind| kind != "null");
            if let [only] = types.as_slice() {
                let only = only.clone();
                object.insert("type".into(), only);
            }
        }
        if let Some(Value::Array(choices)) = object.get_mut("anyOf") {
            choices.retain(|choice| choice.get("type").is_none_or(|kind| kind != "null"));
            if let [Value::Object(only)] = choices.as_slice() {
                let only = only.clone();
                object.remove("anyOf");
                object.extend(only);
            }
        }
    }
}

#[cfg(test)]
#[path = "policy_test.rs"]
mod tests;
