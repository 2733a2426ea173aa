//! Responses of the endpoint, rebuilt from the parts that the proxy understands, and scrubbed.
//! Reason phrases and 1xx responses do not pass: nothing in them is needed.

use std::sync::Arc;

use http::header::{
    ACCEPT_RANGES, ALT_SVC, CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap,
    HeaderName, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_EXTENSIONS, TRANSFER_ENCODING,
    UPGRADE,
};
use http::{Response, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;

use super::blocked::BlockReason;
use super::body::{ProxyBody, ScrubbedBody};
use super::budget::Reservation;
use super::framing::{check_length, is_chunked, remove_connection_headers};
use super::upstream_context::UpstreamContext;
use super::websocket_relay::relay_websocket;

/// The encodings of content, and those of the messages in it. Each may be `identity` only.
const ENCODINGS: [HeaderName; 3] = [
    CONTENT_ENCODING,
    HeaderName::from_static("grpc-encoding"),
    HeaderName::from_static("connect-content-encoding"),
];

/// Character encodings in which printable ASCII is encoded as itself, by their first characters.
const CHARSETS: [&str; 16] = [
    "utf-8",
    "utf8",
    "us-ascii",
    "ascii",
    "iso-8859-",
    "iso8859-",
    "latin1",
    "latin-1",
    "windows-",
    "cp125",
    "koi8-",
    "shift_jis",
    "euc-",
    "gb",
    "big5",
    "binary",
];

/// Rebuilds a response, and relays the connection if the response upgrades it.
pub(super) fn rebuild_response(
    context: &Arc<UpstreamContext>,
    mut response: Response<Incoming>,
    upgrade: Option<OnUpgrade>,
    reservation: Reservation,
) -> Result<Response<ProxyBody>, BlockReason> {
    let status = response.status();
    check_status(status, upgrade.is_some())?;
    let mut headers = std::mem::take(response.headers_mut());
    check_content(&headers)?;
    let length =
        check_length(&headers).map_err(|()| BlockReason::ResponseFraming(CONTENT_LENGTH))?;
    is_chunked(&headers).map_err(|()| BlockReason::TransferEncoding)?;
    let switches = status == StatusCode::SWITCHING_PROTOCOLS;
    if switches {
        check_handshake(&headers)?;
    }
    filter_headers(&mut headers, length);
    let mut headers = context.scrub_headers(headers);
    if let Some(sandbox) = upgrade.filter(|_| switches) {
        headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
        let endpoint = hyper::upgrade::on(&mut response);
        tokio::spawn(relay_websocket(context.clone(), sandbox, endpoint));
    }
    let body = ScrubbedBody::new(response.into_body(), context.clone(), reservation);
    // A new response has no extensions, and so the reason phrase of its status.
    let mut rebuilt = Response::new(body.boxed());
    *rebuilt.status_mut() = status;
    *rebuilt.headers_mut() = headers;
    Ok(rebuilt)
}

/// Checks that the status is one that the request can have. Parts of a document and differences to
/// an earlier one are not requested.
fn check_status(status: StatusCode, is_websocket: bool) -> Result<(), BlockReason> {
    match status {
        StatusCode::SWITCHING_PROTOCOLS if is_websocket => Ok(()),
        StatusCode::PARTIAL_CONTENT | StatusCode::IM_USED => {
            Err(BlockReason::Status(status.as_u16()))
        }
        _ if (200..600).contains(&status.as_u16()) => Ok(()),
        _ => Err(BlockReason::Status(status.as_u16())),
    }
}

/// Checks that the content is neither compressed nor in characters that cannot be scrubbed.
fn check_content(headers: &HeaderMap) -> Result<(), BlockReason> {
    for name in ENCODINGS {
        let mut encodings = headers.get_all(name).iter();
        let first = encodings.next();
        let is_identity =
            first.is_none_or(|encoding| encoding.as_bytes().eq_ignore_ascii_case(b"identity"));
        if !is_identity || encodings.next().is_some() {
            return Err(BlockReason::Compressed);
        }
    }
    let mut types = headers.get_all(CONTENT_TYPE).iter();
    let Some(content_type) = types.next() else { return Ok(()) };
    if types.next().is_some() {
        return Err(BlockReason::ResponseFraming(CONTENT_TYPE));
    }
    let text = String::from_utf8_lossy(content_type.as_bytes()).to_ascii_lowercase();
    if text.trim_start().starts_with("multipart/byteranges") {
        return Err(BlockReason::ResponseFraming(CONTENT_TYPE));
    }
    let mut charsets = text.split("charset").skip(1);
    let is_known = |rest: &str| {
        let value = rest.trim_start_matches([' ', '\t', '=', '"', '\'']);
        CHARSETS.iter().any(|charset| value.starts_with(charset))
    };
    if charsets.all(is_known) { Ok(()) } else { Err(BlockReason::Charset) }
}

/// Checks the answer to a handshake of WebSocket. The client verifies the key.
fn check_handshake(headers: &HeaderMap) -> Result<(), BlockReason> {
    let mut upgrades = headers.get_all(UPGRADE).iter();
    let is_websocket = upgrades
        .next()
        .is_some_and(|upgrade| upgrade.as_bytes().eq_ignore_ascii_case(b"websocket"));
    let has_body = headers.contains_key(CONTENT_LENGTH) || headers.contains_key(TRANSFER_ENCODING);
    let valid = is_websocket
        && upgrades.next().is_none()
        && headers.contains_key(SEC_WEBSOCKET_ACCEPT)
        && !headers.contains_key(SEC_WEBSOCKET_EXTENSIONS)
        && !has_body;
    if valid { Ok(()) } else { Err(BlockReason::Handshake) }
}

/// Removes the headers that are about the connection, and those that name what is not relayed:
/// another service, ranges, the encoding of content that has none.
fn filter_headers(headers: &mut HeaderMap, length: Option<u64>) {
    remove_connection_headers(headers);
    for name in [ALT_SVC, ACCEPT_RANGES].iter().chain(&ENCODINGS) {
        headers.remove(name);
    }
    if let Some(length) = length {
        headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    }
}
