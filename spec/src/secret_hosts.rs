//! The hosts of a credential: `SOURCE@HOST,…`.
//!
//! A credential with hosts never enters the sandbox. A text that means hosts and is not a list of
//! them is therefore an error, and never a part of the source: the value would be delivered in
//! memory instead.

use std::borrow::Cow;
use std::net::IpAddr;

use crate::endpoint::{Endpoint, EndpointError, MAX_SHOWN};

/// A text after `@` that means hosts and is not a list of them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`@{shown}`: {error}; if this `@` belongs to the source, write it twice: `@@`")]
pub struct ParseHostsError {
    /// The beginning of the host, escaped.
    pub shown: String,
    /// The rule that it breaks.
    pub error: SecretHostError,
}

/// A rule that a text breaks as the host of a credential.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SecretHostError {
    /// There is no host.
    #[error("no host follows: write @HOST or @HOST:PORT")]
    Empty,
    /// It is a URL.
    #[error("this is a URL: write the host alone, HOST or HOST:PORT")]
    Url,
    /// It has a path.
    #[error("a host has no path: remove everything from `/` on")]
    Path,
    /// There is white space in the list.
    #[error("remove the white space from the list of hosts")]
    Space,
    /// It may be a host of the local network, or a part of the source.
    #[error("a name without a dot needs a port: write HOST:443")]
    SingleLabel,
    /// It is not a valid host or port.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
}

/// Splits the hosts from a source that has a known scheme. Returns the source, and the hosts if it
/// has any.
pub(crate) fn split_hosts(
    text: &str,
) -> Result<(Cow<'_, str>, Option<Vec<Endpoint>>), ParseHostsError> {
    let Some((source, hosts)) = text.rsplit_once('@') else { return Ok((text.into(), None)) };
    if let Some(source) = source.strip_suffix('@') {
        return Ok((format!("{source}@{hosts}").into(), None));
    }
    if belongs_to_source(source, hosts) {
        return Ok((text.into(), None));
    }
    let hosts: Result<Vec<Endpoint>, ParseHostsError> = hosts.split(',').map(parse_host).collect();
    Ok((source.into(), Some(hosts?)))
}

/// Returns true if the text after the last `@` cannot mean hosts.
fn belongs_to_source(source: &str, after: &str) -> bool {
    match source.split_once(':') {
        // The name of a variable has no `@`.
        Some(("env", _)) => false,
        // A path continues after its `@`; a field does too, and a path before it.
        Some(("file", _)) => after.contains('/') && !after.contains("://"),
        Some(("vault", rest)) => {
            !rest.contains('#') && after.contains(['/', '#']) && !after.contains("://")
        }
        // A command has other words, quotes or expansions.
        Some(("exec", _)) => after.split(',').any(|word| !may_be_host(word.trim())),
        _ => false,
    }
}

fn may_be_host(word: &str) -> bool {
    word.chars().all(|c| c.is_alphanumeric() || ".-_*:/[]".contains(c))
}

fn parse_host(host: &str) -> Result<Endpoint, ParseHostsError> {
    let refused = |error| {
        let mut shown: String =
            host.chars().take(MAX_SHOWN).flat_map(char::escape_default).collect();
        if host.chars().nth(MAX_SHOWN).is_some() {
            shown.push('…');
        }
        ParseHostsError { shown, error }
    };
    if host.is_empty() {
        return Err(refused(SecretHostError::Empty));
    }
    if host.contains(char::is_whitespace) {
        return Err(refused(SecretHostError::Space));
    }
    if host.contains("://") {
        return Err(refused(SecretHostError::Url));
    }
    if host.contains('/') {
        return Err(refused(SecretHostError::Path));
    }
    if host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok() {
        return Err(refused(EndpointError::Address.into()));
    }
    let parsed = if host.contains(':') || host.starts_with('[') {
        host.parse::<Endpoint>()
    } else {
        format!("{host}:443").parse()
    };
    let endpoint = parsed.map_err(|error| refused(error.error.into()))?;
    if !host.contains([':', '.']) {
        return Err(refused(SecretHostError::SingleLabel));
    }
    Ok(endpoint)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> SecretHostError {
        split_hosts(text).expect_err(text).error
    }

    #[test]
    fn invalid_host_names_the_broken_rule() {
        use EndpointError::*;
        use SecretHostError::*;
        for (hosts, expected) in [
            ("10.0.0.1", Endpoint(Address)),
            ("10.0.0.1:443", Endpoint(Address)),
            ("[::1]:443", Endpoint(Address)),
            ("::1", Endpoint(Address)),
            ("[::1]", Endpoint(Address)),
            ("https://h", Url),
            ("https://api.test:443/v1", Url),
            ("api.test/v1", Path),
            ("h:99999", Endpoint(InvalidPort)),
            ("api.test:0", Endpoint(InvalidPort)),
            ("api.test:", Endpoint(InvalidPort)),
            ("", Empty),
            ("a.test,", Empty),
            (",a.test", Empty),
            ("*.com", Endpoint(TopLevelDomain)),
            ("*", Endpoint(InvalidLabel)),
            ("a..test", Endpoint(InvalidLabel)),
            ("a.test, b.test", Space),
            ("a.test ", Space),
            ("bad", SingleLabel),
            ("localhost", SingleLabel),
        ] {
            for source in ["env:X", "exec:pass show x ", "vault://kv/app#token"] {
                assert_eq!(error(&format!("{source}@{hosts}")), expected, "{source}@{hosts}");
            }
        }
        for hosts in ["10.0.0.1", "https://h", "h:99999", "", "*.com", "bad"] {
            assert!(split_hosts(&format!("file:/a@{hosts}")).is_err(), "{hosts}");
        }
        assert_eq!(error("env:X@a\u{1b}.test:443"), Endpoint(InvalidLabel));
        let long = split_hosts(&format!("env:X@{}.test", "a".repeat(65_536))).unwrap_err();
        assert!(long.to_string().len() < 400);
    }

    #[test]
    fn sign_inside_a_source_is_not_a_host() {
        for own in [
            "exec:ssh me@box cat key",
            "exec:mail x@y.z w",
            "exec:sh -c 'echo v@api.test'",
            "exec:git show HEAD@{1}",
            "exec:dig @8.8.8.8 name",
            "file:/a@b/c.d",
            "vault://kv/me@corp/x#f",
            "env:A",
        ] {
            assert_eq!(split_hosts(own), Ok((own.into(), None)), "{own}");
        }
    }

    #[test]
    fn doubled_sign_is_a_part_of_the_source() {
        for (text, source) in [
            ("exec:ssh me@@box", "exec:ssh me@box"),
            ("file:/etc/tok@@corp", "file:/etc/tok@corp"),
            ("exec:a@b me@@box", "exec:a@b me@box"),
        ] {
            assert_eq!(split_hosts(text), Ok((source.into(), None)));
        }
    }

    #[test]
    fn hosts_follow_the_last_sign() {
        let (source, hosts) = split_hosts("exec:ssh me@box k@api.test,*.b.test:8443").unwrap();
        assert_eq!(source, "exec:ssh me@box k");
        let hosts: Vec<String> = hosts.unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(hosts, ["api.test:443", "*.b.test:8443"]);
        assert!(split_hosts("env:X@h:8443").is_ok_and(|(_, hosts)| hosts.is_some()));
    }
}
