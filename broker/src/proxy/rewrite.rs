//! Rewriting of intercepted messages: placeholders become values in requests, and values become
//! asterisks in responses. A placeholder in any other location blocks the request.

use std::future::Future;
use std::sync::Arc;

use bytes::Bytes;
use http::header::{
    ACCEPT_ENCODING, AUTHORIZATION, CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, EXPECT, HOST,
    HeaderMap, HeaderValue, PROXY_AUTHORIZATION, TRANSFER_ENCODING, UPGRADE,
};
use http::uri::PathAndQuery;
use http::{Method, Request, Response, StatusCode, Uri, Version};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use zeroize::Zeroizing;

use super::blocked::{BlockReason, Location};
use super::body::{MAX_BODY, ProxyBody, ScanningBody, ScrubbedBody};
use super::encoding::{decode_base64, encode_base64, percent_encode};
use super::store::Credential;
use super::upgrade::relay_upgraded;
use super::upstream_context::UpstreamContext;

/// Sends one request to the endpoint, and returns the response for the workload.
pub(super) async fn answer_request<F>(
    context: Arc<UpstreamContext>,
    mut request: Request<Incoming>,
    send: impl FnOnce(Request<ProxyBody>) -> F,
) -> Response<ProxyBody>
where
    F: Future<Output = hyper::Result<Response<Incoming>>>,
{
    let version = request.version();
    let upgrade = (version == Version::HTTP_11 && request.headers().contains_key(UPGRADE))
        .then(|| hyper::upgrade::on(&mut request));
    let answered = match rewrite_request(&context, request).await {
        Ok(request) => {
            context.stats.count_request();
            match send(request).await {
                Ok(response) => scrub_response(&context, response, upgrade),
                Err(error) => Err(BlockReason::NoResponse(Arc::new(error))),
            }
        }
        Err(reason) => Err(reason),
    };
    answered.unwrap_or_else(|reason| {
        let response = blocked_response(&reason, version);
        context.stats.record_blocked(reason);
        response
    })
}

fn blocked_response(reason: &BlockReason, version: Version) -> Response<ProxyBody> {
    let text = Bytes::from(format!("chitin: {reason}\n"));
    let mut response = Response::new(Full::new(text).map_err(|never| match never {}).boxed());
    *response.status_mut() = reason.status();
    // The unread rest of a request must not be parsed as the next one.
    if version < Version::HTTP_2 {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// Checks a request, and replaces its placeholders.
async fn rewrite_request(
    context: &Arc<UpstreamContext>,
    request: Request<Incoming>,
) -> Result<Request<ProxyBody>, BlockReason> {
    let (mut head, body) = request.into_parts();
    if head.method == Method::CONNECT {
        return Err(BlockReason::Connect);
    }
    check_host(context, &head.uri, &head.headers)?;
    head.uri = rewrite_uri(context, &head.uri)?;
    rewrite_headers(context, &mut head.headers)?;
    // A compressed response could not be scrubbed.
    head.headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    head.headers.remove(EXPECT);
    if head.headers.remove(TRANSFER_ENCODING).is_some() {
        head.headers.remove(CONTENT_LENGTH);
    }
    let replaces = |credential: &Credential| credential.body && context.accepts(credential);
    let body = if context.store.credentials.iter().any(replaces) {
        rewrite_body(context, &mut head.headers, body).await?
    } else {
        ScanningBody::new(body, context.clone()).boxed()
    };
    Ok(Request::from_parts(head, body))
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

fn rewrite_uri(context: &UpstreamContext, uri: &Uri) -> Result<Uri, BlockReason> {
    if let Some((_, credential)) = context.store.placeholders.find(uri.path().as_bytes(), 0) {
        return Err(context.misplaced(credential, Location::Path));
    }
    let Some(query) = uri.query() else { return Ok(uri.clone()) };
    let replaced = replace_placeholders(
        context,
        query.as_bytes(),
        Location::Query,
        |credential| credential.query,
        percent_encode,
    )?;
    let text = [uri.path().as_bytes(), b"?", &replaced].concat();
    let mut parts = uri.clone().into_parts();
    let path_and_query = PathAndQuery::try_from(text).map_err(|_| BlockReason::InvalidQuery)?;
    parts.path_and_query = Some(path_and_query);
    Uri::from_parts(parts).map_err(|_| BlockReason::InvalidQuery)
}

fn rewrite_headers(context: &UpstreamContext, headers: &mut HeaderMap) -> Result<(), BlockReason> {
    let placeholders = &context.store.placeholders;
    for name in headers.keys() {
        if let Some((_, credential)) = placeholders.find(name.as_str().as_bytes(), 0) {
            return Err(context.misplaced(credential, Location::HeaderName));
        }
    }
    for (name, value) in headers.iter_mut() {
        let location = Location::Header(name.clone());
        let replace = |bytes: &[u8]| {
            replace_placeholders(context, bytes, location.clone(), |_| true, |value| value.to_vec())
        };
        let replaced = if [AUTHORIZATION, PROXY_AUTHORIZATION].contains(name)
            && let Some((scheme, pair)) = decode_basic(value)
        {
            if placeholders.find(&pair, 0).is_none() {
                continue;
            }
            let pair = Zeroizing::new(replace(&pair)?);
            [scheme, b" ", &encode_base64(&pair, false)].concat()
        } else {
            if placeholders.find(value.as_bytes(), 0).is_none() {
                continue;
            }
            replace(value.as_bytes())?
        };
        *value = HeaderValue::from_maybe_shared(Bytes::from(replaced))
            .map_err(|_| BlockReason::InvalidHeader(location))?;
        // Excludes the value from HPACK's dynamic table and from debug output.
        value.set_sensitive(true);
    }
    Ok(())
}

/// Returns scheme and decoded credentials of the Basic scheme (RFC 7617).
fn decode_basic(value: &HeaderValue) -> Option<(&[u8], Zeroizing<Vec<u8>>)> {
    let bytes = value.as_bytes();
    let space = bytes.iter().position(|byte| *byte == b' ')?;
    let (scheme, rest) = bytes.split_at(space);
    scheme
        .eq_ignore_ascii_case(b"basic")
        .then(|| Some((scheme, decode_base64(rest.trim_ascii())?)))?
}

/// Buffers a body and replaces its placeholders.
async fn rewrite_body(
    context: &UpstreamContext,
    headers: &mut HeaderMap,
    body: Incoming,
) -> Result<ProxyBody, BlockReason> {
    let permit = context.buffered_bodies.clone().acquire_owned().await;
    let buffered = Limited::new(body, MAX_BODY).collect().await.map_err(|_| BlockReason::Body)?;
    let bytes = Zeroizing::new(buffered.to_bytes().to_vec());
    let bytes = replace_placeholders(
        context,
        &bytes,
        Location::Body,
        |credential| credential.body,
        |value| value.to_vec(),
    )?;
    if headers.contains_key(CONTENT_LENGTH) {
        headers.insert(CONTENT_LENGTH, HeaderValue::from(bytes.len()));
    }
    let body = Full::new(Bytes::from(bytes)).map_frame(move |frame| {
        // The permit lives as long as the body.
        let _ = &permit;
        frame
    });
    Ok(body.map_err(|never| match never {}).boxed())
}

/// Replaces every placeholder with its encoded value. Fails if one is not allowed here.
fn replace_placeholders(
    context: &UpstreamContext,
    bytes: &[u8],
    location: Location,
    allowed: impl Fn(&Credential) -> bool,
    encode: impl Fn(&[u8]) -> Vec<u8>,
) -> Result<Vec<u8>, BlockReason> {
    let (mut out, mut done) = (Vec::with_capacity(bytes.len()), 0);
    while let Some((start, index)) = context.store.placeholders.find(bytes, done) {
        let credential = &context.store.credentials[index];
        if !context.accepts(credential) || !allowed(credential) {
            return Err(context.misplaced(index, location));
        }
        let Some(value) = credential.value() else {
            return Err(BlockReason::Revoked { credential: credential.name.clone() });
        };
        out.extend_from_slice(&bytes[done..start]);
        out.extend_from_slice(&encode(value.to_bytes().expose()));
        done = start + credential.placeholder.len();
        context.stats.record_delivery(&credential.name);
    }
    out.extend_from_slice(&bytes[done..]);
    Ok(out)
}

/// Scrubs a response, and relays the connection if the response upgrades it.
fn scrub_response(
    context: &Arc<UpstreamContext>,
    mut response: Response<Incoming>,
    upgrade: Option<OnUpgrade>,
) -> Result<Response<ProxyBody>, BlockReason> {
    if let Some(encoding) = response.headers().get(CONTENT_ENCODING)
        && !encoding.as_bytes().eq_ignore_ascii_case(b"identity")
    {
        return Err(BlockReason::Compressed);
    }
    context.scrub_headers(response.headers_mut());
    if response.status() == StatusCode::SWITCHING_PROTOCOLS
        && let Some(sandbox) = upgrade
    {
        let endpoint = hyper::upgrade::on(&mut response);
        tokio::spawn(relay_upgraded(context.clone(), sandbox, endpoint));
    }
    Ok(response.map(|body| ScrubbedBody::new(body, context.clone()).boxed()))
}
