//! The headers that describe the length of a message or its connection. They are understood
//! exactly, or refused: two readings of one message let a part of it pass unseen.

use http::header::{
    CONNECTION, CONTENT_LENGTH, HeaderMap, HeaderName, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE,
    TRAILER, TRANSFER_ENCODING, UPGRADE,
};

/// Headers that are about one connection (RFC 9110, 7.6.1). The proxy writes its own.
const CONNECTION_HEADERS: [HeaderName; 8] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    HeaderName::from_static("http2-settings"),
    TE,
    TRAILER,
    TRANSFER_ENCODING,
    UPGRADE,
];

/// Removes the headers that are about the connection, and those that `Connection` lists.
pub(super) fn remove_connection_headers(headers: &mut HeaderMap) {
    let listed: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        // Neither credentials nor the length are about the connection, whatever it lists.
        .filter(|name| ![CONTENT_LENGTH, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION].contains(name))
        .collect();
    for name in listed.iter().chain(&CONNECTION_HEADERS) {
        headers.remove(name);
    }
}

/// Checks that there is at most one length, as digits, and no transfer encoding beside it. Returns
/// the length.
pub(super) fn check_length(headers: &HeaderMap) -> Result<Option<u64>, ()> {
    let mut lengths = headers.get_all(CONTENT_LENGTH).iter();
    let Some(length) = lengths.next() else { return Ok(None) };
    let text = length.to_str().map_err(drop)?;
    let is_digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if lengths.next().is_some() || !is_digits || headers.contains_key(TRANSFER_ENCODING) {
        return Err(());
    }
    text.parse().map(Some).map_err(drop)
}

/// Returns true if the transfer encoding is exactly `chunked`, and false if there is none. Any
/// other is an error.
pub(super) fn is_chunked(headers: &HeaderMap) -> Result<bool, ()> {
    let mut encodings = headers.get_all(TRANSFER_ENCODING).iter();
    match (encodings.next(), encodings.next()) {
        (None, _) => Ok(false),
        (Some(encoding), None) if encoding.as_bytes().eq_ignore_ascii_case(b"chunked") => Ok(true),
        _ => Err(()),
    }
}
