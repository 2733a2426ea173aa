//! A host name, or all names below one, with a port.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use crate::string_type;

/// Longest host name (RFC 1035, 2.3.4, without the final dot).
pub const MAX_HOST: usize = 253;

/// How much of a wrong endpoint is repeated.
const MAX_SHOWN: usize = 80;

/// Something on the network: a name, or all below a name, and a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// The name in lower case, without `*.`.
    pub host: String,
    /// Whether every name below it is meant, and not it.
    pub wildcard: bool,
    /// TCP port.
    pub port: u16,
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Endpoint, String> {
        // What is wrong may be long, or full of what a terminal would obey.
        let shown: String = text.chars().take(MAX_SHOWN).flat_map(char::escape_default).collect();
        let more = if text.chars().nth(MAX_SHOWN).is_some() { "…" } else { "" };
        let wrong = |why: &str| Err(format!("`{shown}{more}` is not HOST:PORT: {why}"));
        let Some((host, port)) = text.rsplit_once(':') else { return wrong("there is no port") };
        let port = match port.parse() {
            Ok(0) | Err(_) => return wrong("the port is a number from 1 to 65535"),
            Ok(port) => port,
        };
        let (host, wildcard) =
            host.strip_prefix("*.").map_or((host, false), |domain| (domain, true));
        if host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok() || is_numeric(host) {
            return wrong("an address is nobody in particular, give a name");
        }
        // Names of other scripts have a form in letters and digits, which is what is looked up.
        let host = match host.is_ascii() {
            true => host.to_ascii_lowercase(),
            false if host.len() > 4 * MAX_HOST => return wrong("a name has at most 253 bytes"),
            false => match idna::domain_to_ascii(host) {
                Ok(host) => host,
                Err(_) => return wrong("no name can be written so"),
            },
        };
        let label = |label: &str| {
            (1..=63).contains(&label.len())
                && label
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        if host.len() > MAX_HOST {
            return wrong("a name has at most 253 bytes");
        }
        if !host.split('.').all(label) {
            return wrong("names are letters, digits, `-` and dots; `*.` may stand in front");
        }
        if wildcard && !host.contains('.') {
            return wrong("a whole top-level domain is nobody in particular");
        }
        Ok(Endpoint { host, wildcard, port })
    }
}

/// Whether resolvers take a name for an address: its last label is a number.
pub fn is_numeric(host: &str) -> bool {
    let last = host.rsplit('.').next().unwrap_or(host);
    let hex = last.strip_prefix("0x").or(last.strip_prefix("0X"));
    !last.is_empty() && last.bytes().all(|byte| byte.is_ascii_digit())
        || hex.is_some_and(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

impl Endpoint {
    /// Whether all that another means is meant by it.
    pub fn covers(&self, other: &Endpoint) -> bool {
        self == other
            || self.wildcard
                && self.port == other.port
                && other.host.strip_suffix(&self.host).is_some_and(|rest| rest.ends_with('.'))
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
    fn endpoints_are_names_and_ports() {
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
        let long = format!("{}:443", "a.".repeat(32_768));
        let label = format!("{}.test:443", "a".repeat(64));
        let name = format!("{}a.test:443", "a.".repeat(125));
        let bad = [
            ("api.example.com", "there is no port"),
            ("a.test:0", "from 1 to 65535"),
            ("a.test:70000", "from 1 to 65535"),
            ("a.test:", "from 1 to 65535"),
            ("a.test:https", "from 1 to 65535"),
            ("a\0.test:443", "letters, digits"),
            ("a\u{1b}[2J.test:443", "letters, digits"),
            (":443", "letters, digits"),
            ("a..test:443", "letters, digits"),
            ("-a.test:443", "letters, digits"),
            ("a.*.test:443", "letters, digits"),
            ("*.com:443", "top-level"),
            ("*:443", "letters, digits"),
            ("127.0.0.1:443", "an address"),
            ("[::1]:443", "an address"),
            ("::1:443", "an address"),
            ("127.1:443", "an address"),
            ("2130706433:443", "an address"),
            ("0x7f000001:443", "an address"),
            ("*.0.0.1:443", "an address"),
            ("\u{fffd}.test:443", "no name"),
            (&long, "at most 253 bytes"),
            (&name, "at most 253 bytes"),
            (&label, "letters, digits"),
        ];
        for (text, words) in bad {
            let error = text.parse::<Endpoint>().unwrap_err();
            assert!(error.contains(words), "{error}");
            assert!(error.len() < 1000 && !error.contains(['\0', '\u{1b}', '\n']), "{error}");
        }
    }
}
