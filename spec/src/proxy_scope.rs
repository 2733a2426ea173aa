//! The requests in which the proxy replaces a credential's placeholder.

use std::fmt;
use std::str::FromStr;

use crate::endpoint::Endpoint;
use crate::string_type;

/// Headers in which a placeholder is replaced unless a policy names others: those that carry keys
/// and nothing else. None of them is stored or published by a service that reads it, as a header of
/// metadata is. `docs/credentials.md` has the service that each belongs to.
pub const KEY_HEADERS: [&str; 19] = [
    "api-key",
    "apikey",
    "authorization",
    "circle-token",
    "dd-api-key",
    "dd-application-key",
    "deploy-token",
    "job-token",
    "ocp-apim-subscription-key",
    "private-token",
    "proxy-authorization",
    "x-api-key",
    "x-auth-key",
    "x-auth-token",
    "x-functions-key",
    "x-goog-api-key",
    "x-shopify-access-token",
    "x-vault-token",
    "xi-api-key",
];

/// Headers that describe the message or the connection: the proxy writes them itself.
const FRAMING_HEADERS: [&str; 24] = [
    "a-im",
    "accept-charset",
    "accept-encoding",
    "connect-accept-encoding",
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "expect",
    "grpc-accept-encoding",
    "grpc-encoding",
    "host",
    "http2-settings",
    "if-range",
    "keep-alive",
    "proxy-connection",
    "range",
    "sec-websocket-extensions",
    "sec-websocket-key",
    "sec-websocket-version",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// Longest name of a header, and longest path prefix.
const MAX_TEXT: usize = 256;

/// The requests in which the proxy replaces a credential's placeholder: those to `hosts`, in
/// [`KEY_HEADERS`] and the parts that are listed here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProxyScope {
    /// The hosts that receive the value, over TLS at these ports.
    pub hosts: Vec<Endpoint>,
    /// Replace it in the query of a URL as well. Servers write queries to their logs.
    pub query: bool,
    /// Replace it in bodies of up to 1 MiB as well.
    pub body: bool,
    /// Replace it in these headers as well.
    pub headers: Vec<HeaderField>,
    /// Replace it only in requests whose path is, or lies below, this one.
    pub path_prefix: Option<PathPrefix>,
    /// Replace it only in requests with one of these methods. Empty: with any.
    pub methods: Vec<RequestMethod>,
}

impl ProxyScope {
    /// Returns true if the placeholder is replaced in this header. The name is in lower case.
    pub fn replaces_in_header(&self, name: &str) -> bool {
        KEY_HEADERS.contains(&name) || self.headers.iter().any(|header| header.0 == name)
    }

    /// Returns true if the placeholder is replaced in requests with this method.
    pub fn covers_method(&self, method: &str) -> bool {
        self.methods.is_empty() || self.methods.iter().any(|listed| listed.0 == method)
    }

    /// Returns true if the placeholder is replaced in requests for this path.
    pub fn covers_path(&self, path: &str) -> bool {
        self.path_prefix.as_ref().is_none_or(|prefix| prefix.covers(path))
    }
}

/// A text that does not describe requests.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseScopeError {
    /// It is not the name of a header.
    #[error("`{0:.80}` is not the name of a header, such as X-My-Key")]
    Header(String),
    /// The header describes the message or the connection.
    #[error("the header {0} cannot carry a credential: it describes the message")]
    Framing(String),
    /// It is not a path.
    #[error(
        "`{0:.80}` is not a path such as /v1/: it begins with / and has no `..`, `//`, `%` or `?`"
    )]
    Path(String),
    /// It is not a method.
    #[error("`{0:.80}` is not an HTTP method such as GET, in capital letters")]
    Method(String),
}

/// The name of a header in which a placeholder may be replaced, in lower case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderField(String);

impl FromStr for HeaderField {
    type Err = ParseScopeError;

    fn from_str(text: &str) -> Result<HeaderField, ParseScopeError> {
        let valid = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
        if text.is_empty() || text.len() > MAX_TEXT || !text.bytes().all(valid) {
            return Err(ParseScopeError::Header(text.into()));
        }
        let name = text.to_ascii_lowercase();
        match FRAMING_HEADERS.contains(&name.as_str()) {
            true => Err(ParseScopeError::Framing(name)),
            false => Ok(HeaderField(name)),
        }
    }
}

impl fmt::Display for HeaderField {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The beginning of the paths for which a placeholder is replaced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathPrefix(String);

impl PathPrefix {
    /// Returns true if the path is this one or lies below it. A path that a server may take for
    /// another one is not.
    pub fn covers(&self, path: &str) -> bool {
        if !is_plain_path(path) {
            return false;
        }
        let rest = path.strip_prefix(self.0.as_str());
        rest.is_some_and(|rest| self.0.ends_with('/') || rest.is_empty() || rest.starts_with('/'))
    }
}

/// Returns true if no server takes the path for another one: it has no empty, `.` or `..` segment,
/// none that ends with parameters, no backslash, and none of these encoded.
fn is_plain_path(path: &str) -> bool {
    let encoded = |code: &str| {
        let code = code.as_bytes();
        path.as_bytes().windows(code.len()).any(|window| window.eq_ignore_ascii_case(code))
    };
    let segments: Vec<&str> = path.split('/').collect();
    let [first, middle @ .., last] = segments.as_slice() else { return false };
    first.is_empty()
        && middle.iter().all(|segment| !segment.is_empty())
        && middle.iter().chain([last]).all(|segment| !matches!(*segment, "." | ".."))
        && !path.contains(['\\', ';'])
        && !["%2e", "%2f", "%5c", "%25", "%3b", "%00"].iter().any(|code| encoded(code))
}

string_type!(PathPrefix, "PathPrefix", r"^/[^?#%]*$");

impl FromStr for PathPrefix {
    type Err = ParseScopeError;

    fn from_str(text: &str) -> Result<PathPrefix, ParseScopeError> {
        let plain = text.bytes().all(|byte| byte.is_ascii_graphic())
            && text.len() <= MAX_TEXT
            && !text.contains(['?', '#', '%'])
            && is_plain_path(text);
        if plain { Ok(PathPrefix(text.into())) } else { Err(ParseScopeError::Path(text.into())) }
    }
}

impl fmt::Display for PathPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An HTTP method.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestMethod(String);

string_type!(RequestMethod, "RequestMethod", r"^[A-Z-]{1,32}$");

impl FromStr for RequestMethod {
    type Err = ParseScopeError;

    fn from_str(text: &str) -> Result<RequestMethod, ParseScopeError> {
        let valid = (1..=32).contains(&text.len())
            && text.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'-');
        if valid {
            Ok(RequestMethod(text.into()))
        } else {
            Err(ParseScopeError::Method(text.into()))
        }
    }
}

impl fmt::Display for RequestMethod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefix_covers_no_path_that_may_be_another() {
        let prefix: PathPrefix = "/v1/items".parse().unwrap();
        for path in ["/v1/items", "/v1/items/", "/v1/items/a%20b", "/v1/items/a.b/..c"] {
            assert!(prefix.covers(path), "{path}");
        }
        for path in [
            "/v1/itemsx",
            "/v1",
            "/V1/items",
            "/v1/items/../keys",
            "/v1/items/..",
            "/v1/items/./",
            "/v1/items//a",
            "/v1/items/%2E%2e/keys",
            "/v1/items/..%2fkeys",
            "/v1/items/..\\keys",
            "/v1/items/..;/keys",
            "/v1/items/%252e",
            "*",
            "",
        ] {
            assert!(!prefix.covers(path), "{path}");
        }
        let all: PathPrefix = "/".parse().unwrap();
        assert!(all.covers("/") && all.covers("/a") && !all.covers("//a"));
        for bad in ["", "v1", "/a/..", "/a//b", "/%61", "/a?b", "/a b", "/ä"] {
            assert_eq!(bad.parse::<PathPrefix>(), Err(ParseScopeError::Path(bad.into())));
        }
    }

    #[test]
    fn header_that_describes_the_message_is_refused() {
        assert_eq!("X-My-Key".parse::<HeaderField>().unwrap().to_string(), "x-my-key");
        for name in ["Host", "transfer-encoding", "Connection", "content-length"] {
            assert!(matches!(name.parse::<HeaderField>(), Err(ParseScopeError::Framing(_))));
        }
        for name in ["", "a b", "a:b", "ä", &"a".repeat(300)] {
            assert!(matches!(name.parse::<HeaderField>(), Err(ParseScopeError::Header(_))));
        }
        assert!("get".parse::<RequestMethod>().is_err() && "GET".parse::<RequestMethod>().is_ok());
    }

    #[test]
    fn key_headers_exclude_those_that_are_published() {
        let scope = ProxyScope::default();
        assert!(scope.replaces_in_header("authorization") && scope.replaces_in_header("x-api-key"));
        for name in ["x-goog-meta-note", "x-amz-meta-a", "cookie", "user-agent", "referer"] {
            assert!(!scope.replaces_in_header(name), "{name}");
        }
        let headers = vec!["X-Custom".parse().unwrap()];
        assert!(ProxyScope { headers, ..scope }.replaces_in_header("x-custom"));
    }
}
