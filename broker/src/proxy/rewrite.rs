//! What is done to the messages of a connection that is taken apart: placeholders become values in what goes out, and values
//! become stars in what comes back. In any other place than those it is for, a placeholder stops the message.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::header::{
    ACCEPT_ENCODING, AUTHORIZATION, CONTENT_ENCODING, CONTENT_LENGTH, EXPECT, HOST, HeaderMap,
    HeaderValue, PROXY_AUTHORIZATION, TRANSFER_ENCODING,
};
use http::uri::PathAndQuery;
use http::{Method, Request, Response, StatusCode, Uri, Version};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use zeroize::Zeroizing;

use super::placeholder::{Scrubber, Watch, base64, from_base64, percent_encoded};
use super::{Account, Credential, Proxy};

/// The largest body that a placeholder is replaced in: it is held whole, for its length is told before it.
pub(super) const MAX_BODY: usize = 1024 * 1024;

/// What a body is here: pieces on their way, and an error that ends the message.
pub(super) type Piece = BoxBody<Bytes, BoxError>;
type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// One endpoint, as one connection sees it.
pub(super) struct Place {
    pub proxy: Arc<Proxy>,
    pub host: String,
    pub port: u16,
    pub account: Arc<Account>,
}

/// A request that does not go out: what the workload gets, and what the audit says.
struct Blocked {
    status: StatusCode,
    why: String,
}

impl Blocked {
    fn forbidden(why: String) -> Blocked {
        Blocked { status: StatusCode::FORBIDDEN, why }
    }
}

impl Place {
    /// One request, and what the workload gets for it.
    pub async fn answer<F>(
        self: Arc<Place>,
        mut request: Request<Incoming>,
        send: impl FnOnce(Request<Piece>) -> F,
    ) -> Response<Piece>
    where
        F: Future<Output = hyper::Result<Response<Incoming>>>,
    {
        let version = request.version();
        let upgrade = (version == Version::HTTP_11
            && request.headers().contains_key(http::header::UPGRADE))
        .then(|| hyper::upgrade::on(&mut request));
        let answered = match self.rewrite(request).await {
            Ok(request) => {
                self.account.tally().requests += 1;
                match send(request).await {
                    Ok(response) => self.pass_back(response, upgrade),
                    Err(error) => Err(Blocked {
                        status: StatusCode::BAD_GATEWAY,
                        why: format!("the endpoint did not answer: {error}"),
                    }),
                }
            }
            Err(blocked) => Err(blocked),
        };
        answered.unwrap_or_else(|Blocked { status, why }| {
            let text = format!("chitin: {why}\n");
            self.account.block(why);
            let mut response =
                Response::new(Full::new(Bytes::from(text)).map_err(|never| match never {}).boxed());
            *response.status_mut() = status;
            // What is left of a request that was not read must not be taken for the next one.
            if version < Version::HTTP_2 {
                response
                    .headers_mut()
                    .insert(http::header::CONNECTION, HeaderValue::from_static("close"));
            }
            response
        })
    }

    /// The request as it goes out.
    async fn rewrite(
        self: &Arc<Place>,
        request: Request<Incoming>,
    ) -> Result<Request<Piece>, Blocked> {
        let (mut head, body) = request.into_parts();
        if head.method == Method::CONNECT {
            return Err(Blocked::forbidden(
                "CONNECT is for proxies, and this is an endpoint".into(),
            ));
        }
        self.check_host(&head.uri, &head.headers)?;
        head.uri = self.rewrite_uri(&head.uri)?;
        self.rewrite_headers(&mut head.headers)?;
        // What comes back compressed could not be looked through.
        head.headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        head.headers.remove(EXPECT);
        if head.headers.remove(TRANSFER_ENCODING).is_some() {
            head.headers.remove(CONTENT_LENGTH);
        }
        let replaces =
            |credential: &Credential| credential.body && credential.is_for(&self.host, self.port);
        let body = if self.proxy.credentials.iter().any(replaces) {
            let permit = self.proxy.held.clone().acquire_owned().await;
            let whole = Limited::new(body, MAX_BODY).collect().await.map_err(|_| Blocked {
                status: StatusCode::PAYLOAD_TOO_LARGE,
                why: "a body over 1 MiB, to a host where placeholders are replaced in bodies, or one that broke off".into(),
            })?;
            let bytes = Zeroizing::new(whole.to_bytes().to_vec());
            let bytes = self.replace(
                &bytes,
                "the body",
                |credential| credential.body,
                |value| value.to_vec(),
            )?;
            if head.headers.contains_key(CONTENT_LENGTH) {
                head.headers.insert(CONTENT_LENGTH, HeaderValue::from(bytes.len()));
            }
            let body = Full::new(Bytes::from(bytes)).map_frame(move |frame| {
                // It lives as long as the body does.
                let _ = &permit;
                frame
            });
            body.map_err(|never| match never {}).boxed()
        } else {
            WatchedBody { inner: body, watch: Watch::default(), place: self.clone() }.boxed()
        };
        Ok(Request::from_parts(head, body))
    }

    /// That the request is for the host that the connection is to.
    fn check_host(&self, uri: &Uri, headers: &HeaderMap) -> Result<(), Blocked> {
        let wrong = || {
            let why = "the request was for another host than the connection".to_owned();
            Err(Blocked { status: StatusCode::MISDIRECTED_REQUEST, why })
        };
        let mut hosts = headers.get_all(HOST).iter();
        let named = hosts.next().map(|value| value.to_str().unwrap_or_default());
        if hosts.next().is_some() || uri.authority().is_none() && named.is_none() {
            return wrong();
        }
        let mut names =
            uri.authority().map(|authority| authority.as_str()).into_iter().chain(named);
        let ours = |name: &str| {
            let (host, port) =
                name.split_once(':').map_or((name, None), |(host, port)| (host, Some(port)));
            let port = port.map_or(Some(443), |port| port.parse().ok());
            // A port that is not named is 443, or left out by a client that does so for all.
            host.eq_ignore_ascii_case(&self.host)
                && (port == Some(self.port) || !name.contains(':'))
        };
        if names.all(ours) { Ok(()) } else { wrong() }
    }

    fn rewrite_uri(&self, uri: &Uri) -> Result<Uri, Blocked> {
        if let Some((_, credential)) = self.proxy.placeholders.find(uri.path().as_bytes(), 0) {
            return Err(self.misplaced(credential, "the path"));
        }
        let Some(query) = uri.query() else { return Ok(uri.clone()) };
        let replaced = self.replace(
            query.as_bytes(),
            "the query",
            |credential| credential.query,
            percent_encoded,
        )?;
        let text = [uri.path().as_bytes(), b"?", &replaced].concat();
        let mut parts = uri.clone().into_parts();
        let invalid = |_| Blocked::forbidden("the query does not fit a URL".into());
        parts.path_and_query = Some(PathAndQuery::try_from(text).map_err(invalid)?);
        Uri::from_parts(parts)
            .map_err(|_| Blocked::forbidden("the query does not fit a URL".into()))
    }

    fn rewrite_headers(&self, headers: &mut HeaderMap) -> Result<(), Blocked> {
        for name in headers.keys() {
            if let Some((_, credential)) = self.proxy.placeholders.find(name.as_str().as_bytes(), 0)
            {
                return Err(self.misplaced(credential, "a header's name"));
            }
        }
        for (name, value) in headers.iter_mut() {
            let place = format!("the header {name}");
            let anywhere = |_: &Credential| true;
            let replaced = if [AUTHORIZATION, PROXY_AUTHORIZATION].contains(name)
                && let Some((scheme, pair)) = basic(value)
            {
                if self.proxy.placeholders.find(&pair, 0).is_none() {
                    continue;
                }
                let pair =
                    Zeroizing::new(self.replace(&pair, &place, anywhere, |value| value.to_vec())?);
                [scheme, b" ", &base64(&pair, false)].concat()
            } else {
                if self.proxy.placeholders.find(value.as_bytes(), 0).is_none() {
                    continue;
                }
                self.replace(value.as_bytes(), &place, anywhere, |value| value.to_vec())?
            };
            let invalid = |_| Blocked::forbidden(format!("{place} cannot hold the value"));
            *value = HeaderValue::from_maybe_shared(Bytes::from(replaced)).map_err(invalid)?;
            // Not to be kept in a table of headers, nor shown.
            value.set_sensitive(true);
        }
        Ok(())
    }

    /// Replaces every placeholder, if each may be replaced here.
    fn replace(
        &self,
        bytes: &[u8],
        place: &str,
        allowed: impl Fn(&Credential) -> bool,
        written: impl Fn(&[u8]) -> Vec<u8>,
    ) -> Result<Vec<u8>, Blocked> {
        let (mut out, mut done) = (Vec::with_capacity(bytes.len()), 0);
        while let Some((at, index)) = self.proxy.placeholders.find(bytes, done) {
            let credential = &self.proxy.credentials[index];
            if !credential.is_for(&self.host, self.port) || !allowed(credential) {
                return Err(self.misplaced(index, place));
            }
            let Some(value) = credential.value() else {
                let name = &credential.name;
                return Err(Blocked::forbidden(format!(
                    "the credential {name} was taken back, or is over"
                )));
            };
            out.extend_from_slice(&bytes[done..at]);
            out.extend_from_slice(&written(value.to_bytes().expose()));
            done = at + credential.placeholder.len();
            self.account.tally().delivered.insert(credential.name.clone());
        }
        out.extend_from_slice(&bytes[done..]);
        Ok(out)
    }

    fn misplaced(&self, credential: usize, place: &str) -> Blocked {
        let credential = &self.proxy.credentials[credential];
        let name = &credential.name;
        Blocked::forbidden(match credential.is_for(&self.host, self.port) {
            true => {
                format!("the placeholder of {name} stands in {place}, where it is not replaced")
            }
            false => format!(
                "the placeholder of {name} was sent to a host that it is not for, in {place}"
            ),
        })
    }

    /// The response as the workload gets it.
    fn pass_back(
        self: &Arc<Place>,
        mut response: Response<Incoming>,
        upgrade: Option<hyper::upgrade::OnUpgrade>,
    ) -> Result<Response<Piece>, Blocked> {
        if let Some(encoding) = response.headers().get(CONTENT_ENCODING)
            && !encoding.as_bytes().eq_ignore_ascii_case(b"identity")
        {
            return Err(Blocked {
                status: StatusCode::BAD_GATEWAY,
                why: "the endpoint compressed its response, unasked, so that it cannot be looked through"
                    .into(),
            });
        }
        self.scrub_headers(response.headers_mut());
        if response.status() == StatusCode::SWITCHING_PROTOCOLS
            && let Some(sandbox) = upgrade
        {
            let endpoint = hyper::upgrade::on(&mut response);
            tokio::spawn(self.clone().switch(sandbox, endpoint));
        }
        let place = self.clone();
        Ok(response.map(|inner| {
            ScrubbedBody {
                inner,
                scrubber: Scrubber::default(),
                place,
                trailers: None,
                done: false,
            }
            .boxed()
        }))
    }

    fn scrub_headers(&self, headers: &mut HeaderMap) {
        for value in headers.values_mut() {
            let mut bytes = value.as_bytes().to_vec();
            if self.proxy.needles().scrub(&mut bytes) {
                // Stars for text: it is as valid as it was.
                *value = HeaderValue::from_bytes(&bytes).unwrap_or(HeaderValue::from_static("*"));
            }
        }
    }

    /// A connection that became another protocol, such as a websocket: bytes both ways, still looked through.
    async fn switch(
        self: Arc<Place>,
        sandbox: hyper::upgrade::OnUpgrade,
        endpoint: hyper::upgrade::OnUpgrade,
    ) {
        let (Ok(sandbox), Ok(endpoint)) = tokio::join!(sandbox, endpoint) else { return };
        let (mut from_sandbox, mut to_sandbox) = tokio::io::split(TokioIo::new(sandbox));
        let (mut from_endpoint, mut to_endpoint) = tokio::io::split(TokioIo::new(endpoint));
        let out = async {
            let (mut watch, mut buffer) = (Watch::default(), vec![0; 16 * 1024]);
            loop {
                let count = from_sandbox.read(&mut buffer).await?;
                if count == 0 {
                    return to_endpoint.shutdown().await;
                }
                if let Some(credential) = watch.feed(&self.proxy.placeholders, &buffer[..count]) {
                    self.account.block(self.misplaced(credential, "an upgraded connection").why);
                    return Err(std::io::ErrorKind::PermissionDenied.into());
                }
                to_endpoint.write_all(&buffer[..count]).await?;
                to_endpoint.flush().await?;
            }
        };
        let back = async {
            let (mut scrubber, mut buffer) = (Scrubber::default(), vec![0; 16 * 1024]);
            loop {
                let count = from_endpoint.read(&mut buffer).await?;
                let bytes = match count {
                    0 => scrubber.finish(),
                    _ => scrubber.feed(&self.proxy.needles(), &buffer[..count]).0,
                };
                to_sandbox.write_all(&bytes).await?;
                to_sandbox.flush().await?;
                if count == 0 {
                    return to_sandbox.shutdown().await;
                }
            }
        };
        let _: std::io::Result<((), ())> = tokio::try_join!(out, back);
    }
}

/// Scheme and decoded pair of a `Basic` header.
fn basic(value: &HeaderValue) -> Option<(&[u8], Zeroizing<Vec<u8>>)> {
    let bytes = value.as_bytes();
    let space = bytes.iter().position(|byte| *byte == b' ')?;
    let (scheme, rest) = bytes.split_at(space);
    scheme
        .eq_ignore_ascii_case(b"basic")
        .then(|| Some((scheme, from_base64(rest.trim_ascii())?)))?
}

/// A request's body, in which no placeholder may be.
struct WatchedBody {
    inner: Incoming,
    watch: Watch,
    place: Arc<Place>,
}

impl WatchedBody {
    fn look(&mut self, frame: &Frame<Bytes>) -> Option<usize> {
        let placeholders = &self.place.proxy.placeholders;
        if let Some(bytes) = frame.data_ref() {
            return self.watch.feed(placeholders, bytes);
        }
        let trailers = frame.trailers_ref()?;
        trailers
            .values()
            .find_map(|value| placeholders.find(value.as_bytes(), 0))
            .map(|(_, credential)| credential)
    }
}

impl Body for WatchedBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let Some(frame) = ready!(Pin::new(&mut self.inner).poll_frame(cx)) else {
            return Poll::Ready(None);
        };
        let frame = frame?;
        Poll::Ready(Some(match self.look(&frame) {
            None => Ok(frame),
            Some(credential) => {
                let why = self.place.misplaced(credential, "the body").why;
                self.place.account.block(why.clone());
                Err(why.into())
            }
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// A response's body, without the values. It is as long as it was.
struct ScrubbedBody {
    inner: Incoming,
    scrubber: Scrubber,
    place: Arc<Place>,
    trailers: Option<HeaderMap>,
    done: bool,
}

impl Body for ScrubbedBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        loop {
            if self.done {
                return Poll::Ready(
                    self.trailers.take().map(|trailers| Ok(Frame::trailers(trailers))),
                );
            }
            let this = &mut *self;
            let bytes = match ready!(Pin::new(&mut this.inner).poll_frame(cx)) {
                Some(Err(error)) => return Poll::Ready(Some(Err(error.into()))),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(bytes) => this.scrubber.feed(&this.place.proxy.needles(), &bytes).0,
                    Err(frame) => {
                        let mut trailers = frame.into_trailers().unwrap_or_default();
                        this.place.scrub_headers(&mut trailers);
                        this.trailers = Some(trailers);
                        this.done = true;
                        this.scrubber.finish()
                    }
                },
                None => {
                    this.done = true;
                    this.scrubber.finish()
                }
            };
            if !bytes.is_empty() {
                return Poll::Ready(Some(Ok(Frame::data(bytes.into()))));
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        // What is held back is still to come.
        self.done && self.trailers.is_none()
            || self.scrubber.is_empty() && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let (held, inner) = (self.scrubber.held() as u64, self.inner.size_hint());
        let mut hint = SizeHint::new();
        hint.set_lower(inner.lower() + held);
        if let Some(upper) = inner.upper() {
            hint.set_upper(upper + held);
        }
        hint
    }
}

/// A connection out of the sandbox to a host that no credential is for: it breaks at a placeholder.
pub(crate) struct Watched<S> {
    inner: S,
    watch: Watch,
    proxy: Arc<Proxy>,
    account: Arc<Account>,
}

impl<S> Watched<S> {
    pub fn new(inner: S, proxy: Arc<Proxy>, account: Arc<Account>) -> Watched<S> {
        Watched { inner, watch: Watch::default(), proxy, account }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut tokio::io::ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let before = buf.filled().len();
        let this = &mut *self;
        ready!(Pin::new(&mut this.inner).poll_read(cx, buf))?;
        match this.watch.feed(&this.proxy.placeholders, &buf.filled()[before..]) {
            None => Poll::Ready(Ok(())),
            Some(credential) => {
                let name = &this.proxy.credentials[credential].name;
                this.account.block(format!(
                    "the placeholder of {name} was sent to a host that it is not for"
                ));
                buf.set_filled(before);
                Poll::Ready(Err(std::io::ErrorKind::PermissionDenied.into()))
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
