//! The options `--policy` and `--policy-may`.

use std::path::PathBuf;

use chitin::{Builder, Consent, Policy, PolicyError};

/// A policy, and the caller's consent to what it does on the host.
#[derive(Debug, clap::Args)]
pub struct PolicyArgs {
    /// Enforce this policy; `chitin policy check` explains what it allows
    #[arg(long = "policy", value_name = "FILE")]
    file: Option<PathBuf>,

    /// Consent to what the policy does on this host: exec (commands), env (variables), file
    /// (reads), write (files that it replaces), vault, image, all; or a single use, such as
    /// file:/srv/data.csv
    #[arg(long, value_name = "USE,…", requires = "file", value_parser = parse_consents)]
    policy_may: Vec<Consents>,
}

/// The consents of one option.
#[derive(Debug, Clone)]
struct Consents(Vec<Consent>);

impl PolicyArgs {
    /// Loads the policy, if one was given.
    pub fn load(&self) -> Result<Option<Policy>, PolicyError> {
        self.file.as_ref().map(Policy::load).transpose()
    }

    /// Sets the policy, with the consents.
    pub fn apply_to(&self, builder: Builder, policy: Option<Policy>) -> Builder {
        let consents = self.policy_may.iter().flat_map(|consents| consents.0.clone());
        match policy {
            Some(policy) => builder.policy(policy).policy_may(consents),
            None => builder,
        }
    }
}

/// Parses a list of kinds, or a single use, whose value may hold any character.
fn parse_consents(text: &str) -> Result<Consents, chitin::policy::ParseConsentError> {
    if text.contains(':') {
        return Ok(Consents(vec![text.parse()?]));
    }
    text.split(',').map(str::parse).collect::<Result<_, _>>().map(Consents)
}

#[cfg(test)]
mod tests {
    use chitin::policy::{HostUse, HostUseKind};

    use super::*;

    #[test]
    fn consent_is_a_list_of_kinds_or_one_use() {
        let parse = |text| parse_consents(text).map(|consents| consents.0);
        let kinds = [HostUseKind::Exec, HostUseKind::File].map(Consent::Kind).to_vec();
        assert_eq!(parse("exec,file"), Ok(kinds));
        let command = HostUse::Exec("cut -d: -f1,2 /etc/x".into());
        assert_eq!(parse("exec:cut -d: -f1,2 /etc/x"), Ok(vec![Consent::Use(command)]));
        for bad in ["", "exec,", "exec,nothing", "exec:"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
