//! An endpoint: a host name, or every name below a domain, with a port.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use crate::string_type;

/// Longest host name (RFC 1035, 2.3.4, without the final dot).
pub const MAX_HOST: usize = 253;

/// Characters of an invalid endpoint that an error repeats.
pub(crate) const MAX_SHOWN: usize = 80;

/// A host name, or every name below a domain, and a TCP port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// The name in lower case, without `*.`.
    pub host: String,
    /// Matches every name below `host`, and not `host` itself.
    pub wildcard: bool,
    /// TCP port.
    pub port: u16,
}

/// A text that is not an [`Endpoint`].
///
/// The text may be long or hold terminal control sequences: Display shows its first 80 characters,
/// escaped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParseEndpointError {
    /// The beginning of the text, escaped.
    pub text: String,
    /// The rule that the text breaks.
    pub error: EndpointError,
}

/// A rule that a text breaks as an [`Endpoint`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    /// There is no `:`.
    #[error("the port is missing")]
    MissingPort,
    /// The part after the last `:` is not a port.
    #[error("the port must be a number from 1 to 65535")]
    InvalidPort,
    /// The host is an IP address, or resolvers would read it as one.
    #[error("an IP address is not accepted: use a host name")]
    Address,
    /// The name has no ASCII form (RFC 5891).
    #[error("the name has no valid ASCII form")]
    NotIdna,
    /// The name is longer than [`MAX_HOST`].
    #[error("a host name has at most {MAX_HOST} bytes")]
    TooLong,
    /// A label is empty, too long or has other characters.
    #[error("a host name has letters, digits, `-` and dots, and may begin with `*.`")]
    InvalidLabel,
    /// A wildcard covers a top-level domain.
    #[error("a wildcard must not cover a top-level domain")]
    TopLevelDomain,
}

impl fmt::Display for ParseEndpointError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` is not HOST:PORT: {}", self.text, self.error)
    }
}

impl std::error::Error for ParseEndpointError {}

impl FromStr for Endpoint {
    type Err = ParseEndpointError;

    fn from_str(text: &str) -> Result<Endpoint, ParseEndpointError> {
        parse_endpoint(text).map_err(|error| {
            let mut shown: String =
                text.chars().take(MAX_SHOWN).flat_map(char::escape_default).collect();
            if text.chars().nth(MAX_SHOWN).is_some() {
                shown.push('…');
            }
            ParseEndpointError { text: shown, error }
        })
    }
}

fn parse_endpoint(text: &str) -> Result<Endpoint, EndpointError> {
    let (host, port) = text.rsplit_once(':').ok_or(EndpointError::MissingPort)?;
    let port = match port.parse() {
        Ok(0) | Err(_) => return Err(EndpointError::InvalidPort),
        Ok(port) => port,
    };
    let (host, wildcard) = host.strip_prefix("*.").map_or((host, false), |domain| (domain, true));
    if host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok() || is_numeric(host) {
        return Err(EndpointError::Address);
    }
    let host = to_ascii(host)?;
    if host.len() > MAX_HOST {
        return Err(EndpointError::TooLong);
    }
    if !host.split('.').all(is_label) {
        return Err(EndpointError::InvalidLabel);
    }
    if wildcard && !host.contains('.') {
        return Err(EndpointError::TopLevelDomain);
    }
    Ok(Endpoint { host, wildcard, port })
}

/// Returns the form that resolvers look up: lower case, and Punycode for other scripts.
fn to_ascii(host: &str) -> Result<String, EndpointError> {
    if host.is_ascii() {
        return Ok(host.to_ascii_lowercase());
    }
    // Bounds the work of the conversion: one byte of ASCII needs at most four of UTF-8.
    if host.len() > 4 * MAX_HOST {
        return Err(EndpointError::TooLong);
    }
    idna::domain_to_ascii(host).map_err(|_| EndpointError::NotIdna)
}

fn is_label(label: &str) -> bool {
    (1..=63).contains(&label.len())
        && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
        && !label.starts_with('-')
        && !label.ends_with('-')
}

/// Returns true if resolvers read a name as an IPv4 address: its last label is a number.
pub fn is_numeric(host: &str) -> bool {
    let last = host.rsplit('.').next().unwrap_or(host);
    let hex = last.strip_prefix("0x").or(last.strip_prefix("0X"));
    !last.is_empty() && last.bytes().all(|byte| byte.is_ascii_digit())
        || hex.is_some_and(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

impl Endpoint {
    /// Returns true if every name that `other` matches is matched by this endpoint, at its port.
    pub fn covers(&self, other: &Endpoint) -> bool {
        self == other
            || self.wildcard
                && self.port == other.port
                && other.host.strip_suffix(&self.host).is_some_and(|rest| rest.ends_with('.'))
    }
}

/// Converts an endpoint to the form in which the agent receives it.
impl From<&Endpoint> for chitin_protocol::Endpoint {
    fn from(endpoint: &Endpoint) -> chitin_protocol::Endpoint {
        let Endpoint { host, wildcard, port } = endpoint.clone();
        chitin_protocol::Endpoint { host, wildcard, port }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}:{}", if self.wildcard { "*." } else { "" }, self.host, self.port)
    }
}

string_type!(
    Endpoint,
    "Endpoint",
    r"^(\*\.)?[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?:[0-9]{1,5}$"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn valid_endpoints_are_normalized() {
        let good = [
            ("api.example.com:443", "api.example.com:443"),
            ("API.Example.COM:443", "api.example.com:443"),
            ("*.example.com:8443", "*.example.com:8443"),
            ("bücher.example:443", "xn--bcher-kva.example:443"),
            ("*.BÜCHER.example:443", "*.xn--bcher-kva.example:443"),
            ("localhost:80", "localhost:80"),
            ("1.a:65535", "1.a:65535"),
        ];
        for (text, endpoint) in good {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), endpoint, "{text}");
        }
    }

    #[test]
    fn invalid_endpoints_name_the_broken_rule() {
        use EndpointError::*;
        let long = format!("{}:443", "a.".repeat(32_768));
        let label = format!("{}.test:443", "a".repeat(64));
        let name = format!("{}a.test:443", "a.".repeat(125));
        let bad = [
            ("api.example.com", MissingPort),
            ("a.test:0", InvalidPort),
            ("a.test:70000", InvalidPort),
            ("a.test:", InvalidPort),
            ("a.test:https", InvalidPort),
            ("a\0.test:443", InvalidLabel),
            ("a\u{1b}[2J.test:443", InvalidLabel),
            (":443", InvalidLabel),
            ("a..test:443", InvalidLabel),
            ("-a.test:443", InvalidLabel),
            ("a.*.test:443", InvalidLabel),
            ("*.com:443", TopLevelDomain),
            ("*:443", InvalidLabel),
            ("127.0.0.1:443", Address),
            ("[::1]:443", Address),
            ("::1:443", Address),
            ("127.1:443", Address),
            ("2130706433:443", Address),
            ("0x7f000001:443", Address),
            ("*.0.0.1:443", Address),
            ("\u{fffd}.test:443", NotIdna),
            (&long, TooLong),
            (&name, TooLong),
            (&label, InvalidLabel),
        ];
        for (text, expected) in bad {
            let error = text.parse::<Endpoint>().unwrap_err();
            assert_eq!(error.error, expected, "{error}");
            let shown = error.to_string();
            assert!(shown.len() < 1000 && !shown.contains(['\0', '\u{1b}', '\n']), "{shown}");
        }
    }
}
