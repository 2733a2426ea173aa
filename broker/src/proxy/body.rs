//! Bodies on their way through the proxy: scanned for placeholders, or scrubbed of values.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::header::HeaderMap;
use http_body_util::combinators::BoxBody;
use hyper::body::{Body, Frame, Incoming, SizeHint};

use super::blocked::Location;
use super::budget::Reservation;
use super::placeholder::PlaceholderScanner;
use super::scrubber::Scrubber;
use super::upstream_context::UpstreamContext;

/// Maximum size of a body in which placeholders are replaced. It is buffered, because its length
/// precedes it.
pub(super) const MAX_BODY: usize = 1024 * 1024;

/// A body whose errors end the message.
pub(super) type ProxyBody = BoxBody<Bytes, BoxError>;
pub(super) type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The body of a request in which placeholders are not replaced. A placeholder ends it, and
/// trailers are not forwarded.
pub(super) struct ScanningBody {
    inner: Incoming,
    scanner: PlaceholderScanner,
    context: Arc<UpstreamContext>,
}

impl ScanningBody {
    pub fn new(inner: Incoming, context: Arc<UpstreamContext>) -> ScanningBody {
        ScanningBody { inner, scanner: PlaceholderScanner::default(), context }
    }

    fn find_placeholder(&mut self, frame: &Frame<Bytes>) -> Option<usize> {
        let placeholders = &self.context.store.placeholders;
        if let Some(bytes) = frame.data_ref() {
            return self.scanner.scan(placeholders, bytes);
        }
        let trailers = frame.trailers_ref()?;
        trailers
            .iter()
            .flat_map(|(name, value)| [name.as_str().as_bytes(), value.as_bytes()])
            .find_map(|text| placeholders.find(text, 0))
            .map(|(_, credential)| credential)
    }
}

impl Body for ScanningBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        loop {
            let Some(frame) = ready!(Pin::new(&mut self.inner).poll_frame(cx)).transpose()? else {
                return Poll::Ready(None);
            };
            if let Some(credential) = self.find_placeholder(&frame) {
                let reason = self.context.misplaced(credential, Location::Body);
                self.context.stats.record_blocked(reason.clone());
                return Poll::Ready(Some(Err(reason.into())));
            }
            if frame.is_data() {
                return Poll::Ready(Some(Ok(frame)));
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// The scrubbed body of a response. Its length does not change. Trailers are forwarded in HTTP/2
/// only, where gRPC has its status.
pub(super) struct ScrubbedBody {
    inner: Incoming,
    scrubber: Scrubber,
    context: Arc<UpstreamContext>,
    _reservation: Reservation,
    trailers: Option<HeaderMap>,
    done: bool,
}

impl ScrubbedBody {
    pub fn new(
        inner: Incoming,
        context: Arc<UpstreamContext>,
        reservation: Reservation,
    ) -> ScrubbedBody {
        ScrubbedBody {
            inner,
            scrubber: Scrubber::default(),
            context,
            _reservation: reservation,
            trailers: None,
            done: false,
        }
    }

    /// Returns the bytes that may be forwarded; the held ones follow at the end or with trailers.
    fn scrub_frame(&mut self, frame: Option<Frame<Bytes>>) -> Vec<u8> {
        let bytes = match frame.map(Frame::into_data) {
            Some(Ok(bytes)) => self.scrubber.scrub(&self.context.store.patterns(), &bytes),
            Some(Err(frame)) => {
                self.done = true;
                let trailers = frame.into_trailers().ok().filter(|_| self.context.is_http2);
                self.trailers = trailers.map(|trailers| self.context.scrub_headers(trailers));
                self.scrubber.finish()
            }
            None => {
                self.done = true;
                self.scrubber.finish()
            }
        };
        if self.done && self.scrubber.take_found() {
            self.context.record_hit();
        }
        bytes
    }
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
            let frame = ready!(Pin::new(&mut self.inner).poll_frame(cx)).transpose()?;
            let bytes = self.scrub_frame(frame);
            if !bytes.is_empty() {
                return Poll::Ready(Some(Ok(Frame::data(bytes.into()))));
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        // Held bytes and trailers are still to be delivered.
        match self.done {
            true => self.trailers.is_none(),
            false => self.scrubber.held_len() == 0 && self.inner.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        let (held, inner) = (self.scrubber.held_len() as u64, self.inner.size_hint());
        let mut hint = SizeHint::new();
        hint.set_lower(inner.lower() + held);
        if let Some(upper) = inner.upper() {
            hint.set_upper(upper + held);
        }
        hint
    }
}

impl Drop for ScrubbedBody {
    fn drop(&mut self) {
        // A body that the sandbox does not read to its end counts as well.
        if self.scrubber.take_found() {
            self.context.record_hit();
        }
    }
}
