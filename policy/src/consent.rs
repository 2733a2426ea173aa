//! The parts of the host that a policy uses, and the caller's consent to them.
//!
//! A policy restricts a sandbox, so that a caller may take one from a third party. The same file
//! can run commands on the host and read its files, and that needs the caller's own word.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use chitin_spec::{SecretSource, SecretSpec};
use chitin_text::printable;

use super::file::Access;
use super::{Policy, PolicyError};

/// A part of the host that a policy uses. `KIND:VALUE` is its text form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostUse {
    /// Runs a shell command on the host, with the rights of the caller.
    Exec(String),
    /// Reads an environment variable of the caller.
    Env(String),
    /// Reads a file or directory of the host.
    File(PathBuf),
    /// Replaces a file or directory of the host by what the workload has written.
    Write(PathBuf),
    /// Reads a secret with the caller's login to Vault.
    Vault(String),
    /// Boots an image of the host, which has the agent that enforces the policy.
    Image(PathBuf),
}

/// The kind of a [`HostUse`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostUseKind {
    /// [`HostUse::Exec`]
    Exec,
    /// [`HostUse::Env`]
    Env,
    /// [`HostUse::File`]
    File,
    /// [`HostUse::Write`]
    Write,
    /// [`HostUse::Vault`]
    Vault,
    /// [`HostUse::Image`]
    Image,
}

impl HostUseKind {
    /// All kinds.
    pub const ALL: [HostUseKind; 6] = [
        HostUseKind::Exec,
        HostUseKind::Env,
        HostUseKind::File,
        HostUseKind::Write,
        HostUseKind::Vault,
        HostUseKind::Image,
    ];

    /// Returns the word that options use.
    pub fn name(self) -> &'static str {
        match self {
            HostUseKind::Exec => "exec",
            HostUseKind::Env => "env",
            HostUseKind::File => "file",
            HostUseKind::Write => "write",
            HostUseKind::Vault => "vault",
            HostUseKind::Image => "image",
        }
    }

    fn parse(name: &str) -> Option<HostUseKind> {
        HostUseKind::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

impl HostUse {
    /// Returns the kind.
    pub fn kind(&self) -> HostUseKind {
        match self {
            HostUse::Exec(_) => HostUseKind::Exec,
            HostUse::Env(_) => HostUseKind::Env,
            HostUse::File(_) => HostUseKind::File,
            HostUse::Write(_) => HostUseKind::Write,
            HostUse::Vault(_) => HostUseKind::Vault,
            HostUse::Image(_) => HostUseKind::Image,
        }
    }

    /// Returns what happens on the host, as a clause without a subject.
    pub(crate) fn describe(&self) -> String {
        match self {
            HostUse::Exec(command) => {
                format!("runs `{}` on this host, with all rights of this user", printable(command))
            }
            HostUse::Env(name) => format!("reads the environment variable {}", printable(name)),
            HostUse::File(path) => format!("reads {}", print_path(path)),
            HostUse::Write(path) => {
                format!("replaces {} by what the workload has written", print_path(path))
            }
            HostUse::Vault(source) => format!("reads {} with your login", printable(source)),
            HostUse::Image(path) => {
                format!("boots the image {}, whose agent enforces this policy", print_path(path))
            }
        }
    }
}

fn print_path(path: &std::path::Path) -> String {
    printable(&path.to_string_lossy())
}

impl fmt::Display for HostUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HostUse::Exec(command) => write!(f, "exec:{}", printable(command)),
            HostUse::Env(name) => write!(f, "env:{}", printable(name)),
            HostUse::File(path) => write!(f, "file:{}", print_path(path)),
            HostUse::Write(path) => write!(f, "write:{}", print_path(path)),
            // The text of a source begins with its kind.
            HostUse::Vault(source) => f.write_str(&printable(source)),
            HostUse::Image(path) => write!(f, "image:{}", print_path(path)),
        }
    }
}

/// A consent of the caller: `all`, a kind, or a single use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Consent {
    /// The policy may do on the host whatever it says. For policies of the caller's own.
    All,
    /// Every use of this kind.
    Kind(HostUseKind),
    /// This use alone.
    Use(HostUse),
}

/// A text that is not a [`Consent`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{}` is not a use of the host: write exec, env, file, write, vault, image or all, or a single \
     use such as file:/srv/data.csv",
    printable(.0)
)]
pub struct ParseConsentError(pub String);

impl FromStr for Consent {
    type Err = ParseConsentError;

    fn from_str(text: &str) -> Result<Consent, ParseConsentError> {
        let invalid = || ParseConsentError(text.into());
        let Some((kind, value)) = text.split_once(':') else {
            return match text {
                "all" => Ok(Consent::All),
                kind => HostUseKind::parse(kind).map(Consent::Kind).ok_or_else(invalid),
            };
        };
        if value.is_empty() {
            return Err(invalid());
        }
        Ok(Consent::Use(match HostUseKind::parse(kind).ok_or_else(invalid)? {
            HostUseKind::Exec => HostUse::Exec(value.into()),
            HostUseKind::Env => HostUse::Env(value.into()),
            HostUseKind::File => HostUse::File(value.into()),
            HostUseKind::Write => HostUse::Write(value.into()),
            HostUseKind::Vault => HostUse::Vault(text.into()),
            HostUseKind::Image => HostUse::Image(value.into()),
        }))
    }
}

impl Consent {
    fn covers(&self, host_use: &HostUse) -> bool {
        match self {
            Consent::All => true,
            Consent::Kind(kind) => *kind == host_use.kind(),
            Consent::Use(allowed) => allowed == host_use,
        }
    }
}

/// The uses of the host that a caller has not consented to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnconsentedUses(pub Vec<HostUse>);

impl fmt::Display for UnconsentedUses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, host_use) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { "; it " };
            write!(f, "{separator}{}", host_use.describe())?;
        }
        Ok(())
    }
}

impl UnconsentedUses {
    /// Returns the options that would consent, one for each kind.
    pub(crate) fn options(&self) -> String {
        let used = |kind: &HostUseKind| self.0.iter().any(|host_use| host_use.kind() == *kind);
        let kinds: Vec<&str> =
            HostUseKind::ALL.into_iter().filter(used).map(HostUseKind::name).collect();
        format!("--policy-may {}", kinds.join(","))
    }
}

impl Policy {
    /// Returns the parts of the host that the policy uses, in the order of [`HostUseKind::ALL`].
    pub fn host_uses(&self) -> Vec<HostUse> {
        let mut uses: Vec<HostUse> = self.secrets.iter().map(use_of_source).collect();
        if let Some(source) = &self.credential_source {
            uses.push(HostUse::Vault(source.to_string()));
        }
        for file in &self.files {
            uses.push(HostUse::File(file.source.clone()));
            if file.access == Access::ReadWrite {
                uses.push(HostUse::Write(file.source.clone()));
            }
        }
        uses.extend(self.image.clone().map(HostUse::Image));
        uses.sort_by_key(|host_use| {
            HostUseKind::ALL.iter().position(|kind| *kind == host_use.kind())
        });
        uses.dedup();
        uses
    }

    /// Checks that the caller has consented to every use of the host. A credential that the caller
    /// lists with the same source is the caller's own.
    ///
    /// # Errors
    /// [`PolicyError::Consent`] with all uses that lack it.
    pub fn check_consent(
        &self,
        consents: &[Consent],
        own_secrets: &[SecretSpec],
    ) -> Result<(), PolicyError> {
        let mut uses = self.host_uses();
        let own: Vec<HostUse> = own_secrets.iter().map(use_of_source).collect();
        uses.retain(|host_use| {
            !own.contains(host_use) && !consents.iter().any(|consent| consent.covers(host_use))
        });
        if uses.is_empty() {
            return Ok(());
        }
        let (origin, uses) = (self.origin.clone(), UnconsentedUses(uses));
        Err(PolicyError::Consent { origin, uses })
    }
}

fn use_of_source(secret: &SecretSpec) -> HostUse {
    match &secret.source {
        SecretSource::Exec(command) => HostUse::Exec(command.clone()),
        SecretSource::Env(name) => HostUse::Env(name.clone()),
        SecretSource::File(path) => HostUse::File(path.clone()),
        SecretSource::Vault(source) => HostUse::Vault(source.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Uses the host in every way.
    const GREEDY: &str = "image: /srv/root.img
hardening: {credential_source: 'vault://kv/all'}
sandbox:
  filesystem:
    - {access: read-only, path: /data/a, source: /srv/a}
    - {access: read-write, path: /work/b, source: /srv/b}
secrets:
  - {name: A, source: 'exec:id'}
  - {name: B, source: 'env:HOME'}
  - {name: C, source: 'file:/etc/c'}
  - {name: D, source: 'vault://kv/d#f'}
";

    fn greedy() -> Policy {
        Policy::parse(GREEDY, "p.yaml").unwrap()
    }

    fn refused(policy: &Policy, consents: &[&str]) -> Vec<String> {
        let consents: Vec<Consent> = consents.iter().map(|text| text.parse().unwrap()).collect();
        match policy.check_consent(&consents, &[]) {
            Ok(()) => Vec::new(),
            Err(PolicyError::Consent { uses, .. }) => {
                uses.0.iter().map(ToString::to_string).collect()
            }
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn every_use_of_the_host_needs_consent() {
        let all = [
            "exec:id",
            "env:HOME",
            "file:/etc/c",
            "file:/srv/a",
            "file:/srv/b",
            "write:/srv/b",
            "vault://kv/d#f",
            "vault://kv/all",
            "image:/srv/root.img",
        ];
        assert_eq!(refused(&greedy(), &[]), all);
        assert!(refused(&greedy(), &["all"]).is_empty());
        assert!(refused(&greedy(), &all).is_empty());
        assert!(refused(&greedy(), &["exec", "env", "file", "write", "vault", "image"]).is_empty());
        // Consent to a kind or a use is consent to nothing else.
        assert_eq!(
            refused(&greedy(), &["file", "vault", "image", "exec:id"]),
            ["env:HOME", "write:/srv/b"]
        );
        assert!(refused(&greedy(), &["exec:id -u"]).contains(&"exec:id".into()));
    }

    #[test]
    fn policy_that_only_restricts_needs_no_consent() {
        let text = "sandbox: {profile: restricted}\nresources: {pids: 9}\n";
        assert!(refused(&Policy::parse(text, "p").unwrap(), &[]).is_empty());
    }

    #[test]
    fn secret_of_the_caller_needs_no_consent() {
        let policy = Policy::parse("secrets: [{name: A, source: 'env:A'}]", "p").unwrap();
        let own = |text: &str| policy.check_consent(&[], &[text.parse().unwrap()]);
        assert!(own("A=env:A").is_ok());
        assert!(matches!(own("A=env:B"), Err(PolicyError::Consent { .. })));
    }

    #[test]
    fn invalid_consent_is_rejected() {
        for bad in ["", "net", "exec:", "every", "file,exec", "ALL", "all:"] {
            assert!(bad.parse::<Consent>().is_err(), "{bad}");
        }
    }

    #[test]
    fn refusal_names_uses_and_option() {
        let error = greedy().check_consent(&[], &[]).unwrap_err().to_string();
        for words in ["`id`", "HOME", "/srv/b", "--policy-may exec,env,file,write,vault,image"] {
            assert!(error.contains(words), "{error}");
        }
    }
}
