//! The policy file: what a sandbox may do.
//!
//! ```text
//!   text ──yaml──▶ nodes with places ──decode──▶ PolicyFile ──resolve, with its profile──▶ Policy ──▶ what enforces it
//! ```
//!
//! Strict from end to end: what is not understood is an error with line and column, never ignored. No types here know how
//! anything is enforced; [`tiers`] says by what on which tier.
#![forbid(unsafe_code)]

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

pub use file::{Access, How, Source};
pub use profile::{PROFILES, Profile, ProfileSpec, SyscallFilter};
pub use tiers::{Field, Verdict};
pub use yaml::Place;

use file::PolicyFile;
use yaml::{MAX_BYTES, Problem};

/// What is wrong with a policy, or with what is asked for under it.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// The file cannot be read.
    #[error("read the policy {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It does not list that tier.
    #[error(
        "the policy {origin} does not accept the tier {tier}: it would have to be its runtime or in its fallback"
    )]
    Tier {
        /// The file.
        origin: String,
        /// What was asked for.
        tier: TierKind,
    },
    /// The file is larger than any policy.
    #[error("the policy {} is larger than {} KiB: is it a policy?", path.display(), MAX_BYTES / 1024)]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// The file is no text.
    #[error("the policy {} is not UTF-8, from byte {at} on", path.display())]
    NoText {
        /// The file.
        path: PathBuf,
        /// The first byte that is none.
        at: usize,
    },
    /// Something in it is wrong.
    #[error("{origin}, {place}: {what}")]
    Invalid {
        /// The file.
        origin: String,
        /// Where.
        place: Place,
        /// What, and what would be right.
        what: String,
    },
    /// It asks for what this tier cannot do.
    #[error("the policy {origin} cannot be kept on {tier}: {field}: {why}")]
    Refused {
        /// The file.
        origin: String,
        /// The tier.
        tier: TierKind,
        /// The field.
        field: &'static str,
        /// Why.
        why: &'static str,
    },
    /// More was asked for than it allows.
    #[error(
        "{what} {asked} is more than the {allowed} that the policy {origin} allows: ask for less, or change the policy"
    )]
    Exceeded {
        /// The file.
        origin: String,
        /// What was asked for.
        what: &'static str,
        /// How much.
        asked: String,
        /// How much there may be.
        allowed: String,
    },
    /// A credential was asked for that it does not list.
    #[error("secret {name}: the policy {origin} does not list it")]
    Secret {
        /// The file.
        origin: String,
        /// The credential.
        name: String,
    },
    /// An endpoint was asked for that it does not list.
    #[error(
        "--allow {endpoint}: the policy {origin} does not list it: ask for less, or change the policy"
    )]
    Egress {
        /// The file.
        origin: String,
        /// The endpoint.
        endpoint: Endpoint,
    },
    /// A template was made under something else.
    #[error(
        "the template `{template}` was built under {built}: build it again with `chitin template build --policy`"
    )]
    Template {
        /// The template.
        template: String,
        /// What it was built under.
        built: String,
    },
}

/// A file or directory of the host, as the sandbox has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SharedFile {
    /// What may be done with it.
    pub access: Access,
    /// Where it is in the sandbox.
    pub path: PathBuf,
    /// Where it is on the host.
    pub source: PathBuf,
}

/// What a sandbox may do: a file and its profile, resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// What the file is called in messages.
    pub origin: String,
    /// SHA-256 of the file's bytes, in hexadecimal.
    pub digest: String,
    /// What it is for.
    pub plugin: Option<String>,
    /// Its profile.
    pub profile: Profile,
    /// How the sandbox is isolated.
    pub runtime: TierKind,
    /// What else will do, in this order.
    pub fallback: Vec<TierKind>,
    /// Another root image than the one that was built.
    pub image: Option<PathBuf>,
    /// Whether the workload can read nothing but the system and [`files`](Policy::files).
    pub files_confined: bool,
    /// What is copied in.
    pub files: Vec<SharedFile>,
    /// What may be connected to.
    pub egress: Vec<Endpoint>,
    /// Which system calls may be made.
    pub syscalls: SyscallFilter,
    /// How much of the machine the sandbox gets.
    pub limits: Limits,
    /// Credentials, each by its name.
    pub secrets: Vec<SecretSpec>,
    /// A secret of a vault of which each field is a credential, by the field's name.
    pub credential_source: Option<VaultSource>,
}

impl Policy {
    /// Reads a file.
    ///
    /// # Errors
    /// The file cannot be read, is larger than 64 KiB, or says something wrong.
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
                Err(PolicyError::NoText { path: path.to_owned(), at: error.valid_up_to() })
            }
        }
    }

    /// Reads a text; `origin` is what messages call it.
    ///
    /// # Errors
    /// [`PolicyError::TooLarge`] and [`PolicyError::Invalid`], with line and column.
    pub fn parse(text: &str, origin: &str) -> Result<Policy, PolicyError> {
        if text.len() as u64 > MAX_BYTES {
            return Err(PolicyError::TooLarge { path: origin.into() });
        }
        let digest = format!("{:x}", Sha256::digest(text));
        let resolved = yaml::read(text).and_then(|root| {
            let file = PolicyFile::deserialize(&root).map_err(|error| error.problem(root.place))?;
            resolve::resolve(file, &root, origin, digest)
        });
        resolved.map_err(|Problem { place, what }| PolicyError::Invalid {
            origin: origin.into(),
            place,
            what,
        })
    }

    /// The JSON Schema of the file, for editors.
    pub fn schema() -> String {
        let mut schema = schemars::schema_for!(PolicyFile);
        NoNull.transform(&mut schema);
        let mut text = serde_json::to_string_pretty(&schema).unwrap_or_default();
        text.push('\n');
        text
    }

    /// What it allows, in sentences, and what keeps it on which tier.
    pub fn explain(&self) -> String {
        explain::explain(self)
    }

    /// Whether a tier can keep all of it.
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

    /// The tiers that will do, in this order.
    pub fn tiers(&self) -> impl Iterator<Item = TierKind> {
        std::iter::once(self.runtime).chain(self.fallback.iter().copied())
    }

    /// The first of the [`tiers`](Policy::tiers) that can keep all of it.
    ///
    /// # Errors
    /// Why `runtime` cannot, if none can.
    pub fn tier(&self) -> Result<TierKind, PolicyError> {
        match self.tiers().find(|tier| self.check_tier(*tier).is_ok()) {
            Some(tier) => Ok(tier),
            None => self.check_tier(self.runtime).map(|()| self.runtime),
        }
    }

    /// What the agent has to do about it behind a boundary. Of a container, whoever made it bounds processes and disk; of gVisor's,
    /// whose kernel counts for itself, the agent has the processes bounded.
    pub fn confine(&self, request: u32, boundary: Boundary) -> Confine {
        let counts = match boundary {
            Boundary::Kvm | Boundary::Gvisor => true,
            Boundary::Namespaces => false,
        };
        let rule = |file: &SharedFile| FileRule {
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
            max_tasks: counts.then_some(self.limits.pids),
            max_disk: self
                .limits
                .disk_mib
                .filter(|_| boundary == Boundary::Kvm)
                .map(|mib| u64::from(mib) << 20),
        }
    }

    /// Whether all that an endpoint means is listed.
    pub fn may_reach(&self, endpoint: &Endpoint) -> bool {
        self.egress.iter().any(|listed| listed.covers(endpoint))
    }

    /// What becomes of a number that was asked for beside the policy: it may be less than the policy's, which stands if there is
    /// none.
    pub fn tighten(
        &self,
        what: &'static str,
        asked: Option<u64>,
        allowed: u32,
    ) -> Result<u64, PolicyError> {
        let allowed = u64::from(allowed);
        match asked {
            Some(asked) if asked > allowed => {
                Err(self.exceeded(what, asked.to_string(), allowed.to_string()))
            }
            asked => Ok(asked.unwrap_or(allowed)),
        }
    }

    /// The same for the time limit.
    pub fn tighten_timeout(
        &self,
        asked: Option<Duration>,
    ) -> Result<Option<Duration>, PolicyError> {
        match (asked, self.limits.timeout) {
            (Some(asked), Some(allowed)) if asked > allowed => {
                let words = |limit| humantime::format_duration(limit).to_string();
                Err(self.exceeded("a time limit of", words(asked), words(allowed)))
            }
            (asked, allowed) => Ok(asked.or(allowed)),
        }
    }

    fn exceeded(&self, what: &'static str, asked: String, allowed: String) -> PolicyError {
        PolicyError::Exceeded { origin: self.origin.clone(), what, asked, allowed }
    }
}

/// A key that may be left out may not be left empty; schemars takes an `Option` for both.
struct NoNull;

impl Transform for NoNull {
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
