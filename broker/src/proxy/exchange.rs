//! One request of the sandbox and its response. A request that breaks a rule is answered here, and
//! the endpoint does not receive it.

use std::future::Future;
use std::sync::Arc;

use bytes::Bytes;
use http::header::{CONNECTION, HeaderValue};
use http::{Request, Response, Version};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;

use super::blocked::BlockReason;
use super::body::ProxyBody;
use super::request::{check_upgrade, rebuild_request};
use super::response::rebuild_response;
use super::upstream_context::UpstreamContext;

/// Sends one request to the endpoint, and returns the response for the workload.
pub(super) async fn answer_request<F>(
    context: Arc<UpstreamContext>,
    request: Request<Incoming>,
    send: impl FnOnce(Request<ProxyBody>) -> F,
) -> Response<ProxyBody>
where
    F: Future<Output = hyper::Result<Response<Incoming>>>,
{
    let version = request.version();
    let answered = relay_request(&context, request, send).await;
    answered.unwrap_or_else(|reason| {
        let response = blocked_response(&reason, version);
        context.stats.record_blocked(reason);
        response
    })
}

async fn relay_request<F>(
    context: &Arc<UpstreamContext>,
    mut request: Request<Incoming>,
    send: impl FnOnce(Request<ProxyBody>) -> F,
) -> Result<Response<ProxyBody>, BlockReason>
where
    F: Future<Output = hyper::Result<Response<Incoming>>>,
{
    if context.store.hit_limit_reached() {
        return Err(BlockReason::ScrubLimit);
    }
    // It is refused and does not wait: the headers of waiting requests would take memory, too.
    let reservation = context.budget.try_reserve_request(context.share.as_ref());
    let reservation = reservation.ok_or(BlockReason::Busy)?;
    let is_websocket = check_upgrade(&request)?;
    let upgrade = is_websocket.then(|| hyper::upgrade::on(&mut request));
    let request = rebuild_request(context, request, is_websocket).await?;
    context.stats.count_request();
    let response = send(request).await.map_err(|error| BlockReason::NoResponse(Arc::new(error)))?;
    rebuild_response(context, response, upgrade, reservation)
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
