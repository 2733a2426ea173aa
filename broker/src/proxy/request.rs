//! Requests of the sandbox, rebuilt from the parts that the proxy understands. The rest is removed
//! or refused, so that an endpoint is never asked for a response that could not be scrubbed.

use std::sync::Arc;

use bytes::Bytes;
use http::header::{
    ACCEPT_CHARSET, ACCEPT_ENCODING, CONNECTION, CONTENT_LENGTH, EXPECT, HOST, HeaderMap,
    HeaderName, HeaderValue, IF_RANGE, RANGE, SEC_WEBSOCKET_EXTENSIONS, SEC_WEBSOCKET_KEY,
    SEC_WEBSOCKET_VERSION, TE, TRANSFER_ENCODING, UPGRADE,
};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{Method, Request, Uri, Version};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use zeroize::Zeroizing;

use super::blocked::BlockReason;
use super::body::{MAX_BODY, ProxyBody, ScanningBody};
use super::encoding::decode_base64;
use super::framing::{check_length, is_chunked, remove_connection_headers};
use super::replace::Replacer;
use super::upstream_context::UpstreamContext;

/// The methods that are forwarded: those of HTTP, WebDAV and common APIs. TRACE, which returns the
/// headers of a request as the endpoint received them, is not one of them.
const METHODS: [&str; 27] = [
    "GET",
    "HEAD",
    "POST",
    "PUT",
    "DELETE",
    "OPTIONS",
    "PATCH",
    "QUERY",
    "SEARCH",
    "REPORT",
    "LIST",
    "PURGE",
    "LINK",
    "UNLINK",
    "COPY",
    "MOVE",
    "LOCK",
    "UNLOCK",
    "MKCOL",
    "MKCALENDAR",
    "PROPFIND",
    "PROPPATCH",
    "ACL",
    "BIND",
    "UNBIND",
    "REBIND",
    "CHECKOUT",
];

/// Headers that ask for a part of a response, or for one in another encoding: compressed, as
/// differences or in other characters.
const REMOVED: [HeaderName; 6] = [
    RANGE,
    IF_RANGE,
    ACCEPT_CHARSET,
    EXPECT,
    SEC_WEBSOCKET_EXTENSIONS,
    HeaderName::from_static("a-im"),
];

/// Headers of protocols on HTTP that list the accepted encodings of messages.
const MESSAGE_ENCODINGS: [HeaderName; 2] = [
    HeaderName::from_static("grpc-accept-encoding"),
    HeaderName::from_static("connect-accept-encoding"),
];

const IDENTITY: HeaderValue = HeaderValue::from_static("identity");

/// Returns true if a request asks for a WebSocket (RFC 6455, 4.1). Any other upgrade is refused.
pub(super) fn check_upgrade<B>(request: &Request<B>) -> Result<bool, BlockReason> {
    let headers = request.headers();
    if !headers.contains_key(UPGRADE) {
        return Ok(false);
    }
    let is = |name: HeaderName, expected: &str| {
        let mut values = headers.get_all(name).iter();
        let first = values.next().map(HeaderValue::as_bytes);
        first.is_some_and(|it| it.eq_ignore_ascii_case(expected.as_bytes()))
            && values.next().is_none()
    };
    let mut keys = headers.get_all(SEC_WEBSOCKET_KEY).iter();
    let has_key = match (keys.next(), keys.next()) {
        (Some(key), None) => decode_base64(key.as_bytes()).is_some_and(|key| key.len() == 16),
        _ => false,
    };
    let names_upgrade = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|option| option.trim().eq_ignore_ascii_case("upgrade"));
    let has_body = headers.contains_key(TRANSFER_ENCODING)
        || headers.get(CONTENT_LENGTH).is_some_and(|length| length != "0");
    let valid = request.version() == Version::HTTP_11
        && request.method() == Method::GET
        && is(UPGRADE, "websocket")
        && is(SEC_WEBSOCKET_VERSION, "13")
        && has_key
        && names_upgrade
        && !has_body;
    if valid { Ok(true) } else { Err(BlockReason::Upgrade) }
}

/// Checks a request, replaces its placeholders, and rebuilds it for the endpoint.
pub(super) async fn rebuild_request(
    context: &Arc<UpstreamContext>,
    request: Request<Incoming>,
    is_websocket: bool,
) -> Result<Request<ProxyBody>, BlockReason> {
    let (head, body) = request.into_parts();
    if head.method == Method::CONNECT {
        return Err(BlockReason::Connect);
    }
    if !METHODS.contains(&head.method.as_str()) {
        return Err(BlockReason::Method(head.method));
    }
    check_host(context, &head.uri, &head.headers)?;
    let mut headers = head.headers;
    check_request_framing(&headers)?;
    let replacer = Replacer { context, method: &head.method, uri: &head.uri };
    let path = replacer.replace_in_path()?;
    // Before any is removed: a placeholder is refused in a header that is not forwarded, too.
    replacer.replace_in_headers(&mut headers)?;
    filter_headers(context, &mut headers, is_websocket);
    let replaces = context
        .store
        .credentials
        .iter()
        .any(|credential| credential.scope.body && context.accepts(credential));
    let body = match replaces {
        true => replace_body(&replacer, &mut headers, body).await?,
        false => ScanningBody::new(body, context.clone()).boxed(),
    };
    let mut rebuilt = Request::new(body);
    *rebuilt.method_mut() = head.method;
    *rebuilt.uri_mut() = context.build_uri(path)?;
    *rebuilt.version_mut() = match context.is_http2 {
        true => Version::HTTP_2,
        false => Version::HTTP_11,
    };
    *rebuilt.headers_mut() = headers;
    Ok(rebuilt)
}

/// Checks that a request is for the host of the connection.
fn check_host(
    context: &UpstreamContext,
    uri: &Uri,
    headers: &HeaderMap,
) -> Result<(), BlockReason> {
    let mut hosts = headers.get_all(HOST).iter();
    let named = hosts.next().map(|value| value.to_str().unwrap_or_default());
    if hosts.next().is_some() || uri.authority().is_none() && named.is_none() {
        return Err(BlockReason::OtherHost);
    }
    let mut names = uri.authority().map(|authority| authority.as_str()).into_iter().chain(named);
    let matches = |name: &str| {
        let (host, port) =
            name.split_once(':').map_or((name, None), |(host, port)| (host, Some(port)));
        let port = port.map_or(Some(443), |port| port.parse().ok());
        // An omitted port is 443, or omitted by a client that never sends one.
        host.eq_ignore_ascii_case(&context.host)
            && (port == Some(context.port) || !name.contains(':'))
    };
    if names.all(matches) { Ok(()) } else { Err(BlockReason::OtherHost) }
}

/// Checks that the length of a request is stated once, in a way that both sides understand alike.
fn check_request_framing(headers: &HeaderMap) -> Result<(), BlockReason> {
    check_length(headers).map_err(|()| BlockReason::RequestFraming(CONTENT_LENGTH))?;
    is_chunked(headers).map_err(|()| BlockReason::RequestFraming(TRANSFER_ENCODING))?;
    Ok(())
}

/// Removes the headers that are about the connection or ask for what cannot be scrubbed.
fn filter_headers(context: &UpstreamContext, headers: &mut HeaderMap, is_websocket: bool) {
    // The one value that HTTP/2 permits (RFC 9113, 8.2.2), which gRPC requires.
    let accepts_trailers = context.is_http2 && headers.get(TE).is_some_and(|te| te == "trailers");
    remove_connection_headers(headers);
    for name in REMOVED {
        headers.remove(name);
    }
    for name in MESSAGE_ENCODINGS {
        if headers.contains_key(&name) {
            headers.insert(name, IDENTITY);
        }
    }
    headers.insert(ACCEPT_ENCODING, IDENTITY);
    if accepts_trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
    headers.remove(HOST);
    if !context.is_http2
        && let Ok(host) = HeaderValue::from_str(&context.authority())
    {
        headers.insert(HOST, host);
    }
    if is_websocket {
        headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    }
}

/// Buffers a body and replaces its placeholders.
async fn replace_body(
    replacer: &Replacer<'_>,
    headers: &mut HeaderMap,
    body: Incoming,
) -> Result<ProxyBody, BlockReason> {
    let reservation = replacer.context.budget.reserve_body().await;
    let buffered = Limited::new(body, MAX_BODY).collect().await.map_err(|_| BlockReason::Body)?;
    let bytes = Zeroizing::new(buffered.to_bytes().to_vec());
    let bytes = replacer.replace_in_body(&bytes)?;
    if headers.contains_key(CONTENT_LENGTH) {
        headers.insert(CONTENT_LENGTH, HeaderValue::from(bytes.len()));
    }
    let body = Full::new(Bytes::from(bytes)).map_frame(move |frame| {
        // The reservation lives as long as the body.
        let _ = &reservation;
        frame
    });
    Ok(body.map_err(|never| match never {}).boxed())
}

impl UpstreamContext {
    /// Returns the host of the connection, with its port if that is not the default one.
    fn authority(&self) -> String {
        match self.port {
            443 => self.host.clone(),
            port => format!("{}:{port}", self.host),
        }
    }

    /// Returns the target of a request: with the authority in HTTP/2, without in HTTP/1.
    fn build_uri(&self, path: PathAndQuery) -> Result<Uri, BlockReason> {
        if !self.is_http2 {
            return Ok(Uri::from(path));
        }
        let authority = Authority::try_from(self.authority());
        let mut parts = http::uri::Parts::default();
        parts.scheme = Some(Scheme::HTTPS);
        parts.authority = Some(authority.map_err(|_| BlockReason::OtherHost)?);
        parts.path_and_query = Some(path);
        Uri::from_parts(parts).map_err(|_| BlockReason::InvalidQuery)
    }
}
