//! The broker of one sandbox: it serves each request for a connection, and records its outcome.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use chitin_text::error_chain;
use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::dial::{Dialer, Dialled};
use super::dial_source::{DialRequest, DialSource, Ended};
use super::refusal::Refusal;
use super::resolve::{Resolve, SystemResolver};
use super::spec::EgressSpec;
use super::splice::{SpliceError, TransferCounts, splice};
use crate::audit_log::{AuditLog, ConnectionRecord, Verdict, truncate_name};
use crate::aws::{AwsCredentialServer, Outcome};
use crate::proxy::{Proxy, ProxyError, ProxyStats};

/// Bytes in transit between a sandbox and its proxy, each way: one stream window.
const PROXY_BUFFER: usize = 64 * 1024;

/// Dials the allowed endpoints for one sandbox.
#[derive(Debug)]
pub struct Broker {
    pub(super) dialer: Dialer,
    pub(super) audit: Arc<AuditLog>,
    pub(super) proxy: Option<Arc<Proxy>>,
    /// Serves requests to its endpoint here: these are not dialled.
    pub(super) aws_server: Option<Arc<AwsCredentialServer>>,
}

/// An error that ended a connection. Its text is the reason in the audit log.
#[derive(Debug, thiserror::Error)]
enum ConnectionError {
    #[error(transparent)]
    Splice(#[from] SpliceError),
    #[error(transparent)]
    Proxy(#[from] ProxyError),
}

impl ConnectionError {
    /// Returns the verdict on a connection whose address was connected before this error.
    fn verdict(&self) -> Verdict {
        match self {
            ConnectionError::Splice(_) => Verdict::Allowed,
            ConnectionError::Proxy(error) => match error {
                // The proxy refuses what it cannot check.
                ProxyError::NotTls | ProxyError::OtherServerName => Verdict::Refused,
                // No byte of the sandbox has reached the endpoint.
                ProxyError::SandboxHandshake(_)
                | ProxyError::EndpointHandshake(_)
                | ProxyError::HandshakeTimedOut
                | ProxyError::Certificate(_) => Verdict::Failed,
                ProxyError::Http(_) => Verdict::Allowed,
            },
        }
    }
}

/// Sets the verdict of an intercepted connection of which every request was blocked.
fn refuse_if_all_blocked(record: &mut ConnectionRecord<'_>, stats: &ProxyStats) {
    if stats.request_count() == 0
        && let Some(first) = stats.blocked_requests().0.first()
    {
        record.set_refusal(Verdict::Refused, first.to_string());
    }
}

/// Sets verdict, reason and remedy.
fn record_refusal(record: &mut ConnectionRecord<'_>, refusal: &Refusal) {
    record.set_refusal(refusal.verdict(), refusal.to_string());
    record.remedy = refusal.remedy();
}

impl Broker {
    /// Makes a broker for the egress that a sandbox is allowed.
    pub fn new(
        spec: &EgressSpec,
        audit: Arc<AuditLog>,
        proxy: Option<Arc<Proxy>>,
        aws_server: Option<Arc<AwsCredentialServer>>,
    ) -> Broker {
        let resolver = Box::new(SystemResolver::default());
        Broker { proxy, aws_server, ..Broker::with_resolver(spec, audit, resolver) }
    }

    pub(super) fn with_resolver(
        spec: &EgressSpec,
        audit: Arc<AuditLog>,
        resolver: Box<dyn Resolve>,
    ) -> Broker {
        let dialer = Dialer::new(spec, audit.clone(), resolver);
        Broker { dialer, audit, proxy: None, aws_server: None }
    }

    /// Returns the endpoints for which the agent accepts connections.
    pub fn wire_endpoints(&self) -> Vec<chitin_protocol::Endpoint> {
        let aws = self.aws_server.as_ref().map(|_| AwsCredentialServer::wire());
        self.dialer.endpoints.iter().cloned().chain(aws).collect()
    }

    /// Serves a sandbox until it has ended and every attempt is recorded.
    pub async fn serve<S: DialSource>(self: Arc<Broker>, mut source: S) {
        let mut attempts = JoinSet::new();
        loop {
            tokio::select! {
                request = source.next_request() => match request {
                    None => break,
                    Some(DialRequest::Denied { host }) => self.record_denied_name(&host),
                    Some(DialRequest::Dial { host, port, tunnel }) => {
                        let broker = self.clone();
                        attempts.spawn(broker.serve_dial(source.ended(), tunnel, host, port));
                    }
                },
                Some(_) = attempts.join_next() => {}
            }
            self.audit.add_omitted(source.take_missed());
        }
        while attempts.join_next().await.is_some() {}
    }

    fn record_denied_name(&self, host: &str) {
        let mut record = ConnectionRecord::new(host, None, Verdict::Refused, None);
        record_refusal(&mut record, &Refusal::Policy);
        self.audit.record_connection(record);
    }

    /// Serves one request for a connection, and records it.
    #[tracing::instrument(
        name = "egress",
        level = "debug",
        skip_all,
        fields(host = truncate_name(&host), port)
    )]
    async fn serve_dial<T>(self: Arc<Broker>, ended: Ended, tunnel: T, host: String, port: u16)
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let started = Instant::now();
        let record = ConnectionRecord::new(&host, Some(port), Verdict::Allowed, None);
        let at_aws = |_: &&Arc<_>| AwsCredentialServer::is_at(&host, port);
        let record = match self.aws_server.as_ref().filter(at_aws) {
            Some(server) => self.serve_aws_request(server, ended, tunnel, record).await,
            None => Some(self.connect_endpoint(ended, tunnel, (&host, port), record).await),
        };
        if let Some(mut record) = record {
            record.set_duration(started.elapsed());
            self.audit.record_connection(record);
        }
    }

    /// Serves one connection to the AWS credential server. Returns no record if the client did not
    /// request a credential.
    async fn serve_aws_request<'a, T>(
        &self,
        server: &Arc<AwsCredentialServer>,
        ended: Ended,
        tunnel: T,
        mut record: ConnectionRecord<'a>,
    ) -> Option<ConnectionRecord<'a>>
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let _permit = match self.dialer.admit_connection() {
            Ok(permit) => permit,
            Err(refusal) => {
                record_refusal(&mut record, &refusal);
                return Some(record);
            }
        };
        let outcome = tokio::select! {
            outcome = server.serve(tunnel) => outcome,
            () = ended => None,
        };
        match outcome? {
            Outcome::Served { refresh_error } => {
                record.reason = refresh_error.map(|error| error_chain(&error));
                record.credentials.push(server.name().into());
            }
            Outcome::Refused(refusal) => {
                record.set_refusal(Verdict::Refused, refusal.to_string());
            }
            Outcome::Failed(error) => record.set_refusal(Verdict::Failed, error_chain(&error)),
        }
        Some(record)
    }

    /// Dials an endpoint, and relays the connection until either side or the sandbox ends.
    async fn connect_endpoint<'a, T>(
        &self,
        mut ended: Ended,
        tunnel: T,
        (host, port): (&str, u16),
        mut record: ConnectionRecord<'a>,
    ) -> ConnectionRecord<'a>
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let dialled = tokio::select! {
            dialled = self.dialer.dial(host, port) => dialled,
            () = &mut ended => Err(Refusal::SandboxEnded),
        };
        let Dialled { stream, address, permit } = match dialled {
            Ok(dialled) => dialled,
            Err(refusal) => {
                // Dropping the tunnel resets it.
                drop(tunnel);
                record_refusal(&mut record, &refusal);
                return record;
            }
        };
        record.address = Some(address);
        let (counts, stats) = (TransferCounts::default(), Arc::new(ProxyStats::default()));
        let outcome = match &self.proxy {
            Some(proxy) if proxy.intercepts(host, port) => {
                let relaying =
                    self.relay_intercepted(proxy, tunnel, stream, (host, port), &counts, &stats);
                tokio::select! {
                    outcome = relaying => outcome,
                    () = &mut ended => Err(SpliceError::Sandbox.into()),
                }
            }
            Some(proxy) => {
                let tunnel = proxy.scan_stream(tunnel, &stats);
                self.splice_connection(tunnel, stream, &counts, ended).await
            }
            None => self.splice_connection(tunnel, stream, &counts, ended).await,
        };
        if let Err(error) = outcome {
            record.verdict = error.verdict();
            record.reason = Some(error.to_string());
        }
        if self.proxy.as_ref().is_some_and(|proxy| proxy.intercepts(host, port)) {
            refuse_if_all_blocked(&mut record, &stats);
        }
        self.record_requests(&mut record, &stats);
        drop(permit);
        record.sent = counts.sent.load(Ordering::Relaxed);
        record.received = counts.received.load(Ordering::Relaxed);
        record
    }

    /// Relays bytes unchanged. If either side breaks off, the endpoint's connection is reset.
    async fn splice_connection(
        &self,
        tunnel: impl AsyncRead + AsyncWrite,
        mut stream: TcpStream,
        counts: &TransferCounts,
        ended: Ended,
    ) -> Result<(), ConnectionError> {
        let outcome = tokio::select! {
            outcome = splice(tunnel, &mut stream, &self.dialer.transfers, counts) => outcome,
            () = ended => Err(SpliceError::Sandbox),
        };
        if outcome.is_err() {
            // A reset, so that the endpoint does not take a truncated stream for a complete one.
            let _ = sockopt::set_socket_linger(&stream, Some(Duration::ZERO));
        }
        Ok(outcome?)
    }

    /// Relays a connection through the proxy, which intercepts its TLS.
    async fn relay_intercepted(
        &self,
        proxy: &Proxy,
        tunnel: impl AsyncRead + AsyncWrite,
        stream: TcpStream,
        (host, port): (&str, u16),
        counts: &TransferCounts,
        stats: &Arc<ProxyStats>,
    ) -> Result<(), ConnectionError> {
        // Limits and counts apply to the sandbox's bytes: they lie between it and the proxy.
        let (near, far) = tokio::io::duplex(PROXY_BUFFER);
        let relaying = proxy.relay_connection(far, stream, host, port, stats);
        let (spliced, relayed) =
            tokio::join!(splice(tunnel, near, &self.dialer.transfers, counts), relaying);
        match spliced {
            Err(error @ (SpliceError::ConnectionLimit(_) | SpliceError::TotalLimit(_))) => {
                Err(error.into())
            }
            // The proxy's error is the cause; other errors of the splice follow from it.
            _ => Ok(relayed?),
        }
    }

    /// Adds the outcome of the requests to the record of their connection, and records each
    /// blocked request.
    fn record_requests(&self, record: &mut ConnectionRecord<'_>, stats: &ProxyStats) {
        record.requests = stats.request_count();
        record.scrubbed = stats.scrubbed_count();
        record.credentials = stats.delivered_credentials();
        let (blocked, more) = stats.blocked_requests();
        for reason in blocked {
            let reason = Some(reason.to_string());
            let mut blocked =
                ConnectionRecord::new(record.host, record.port, Verdict::Refused, reason);
            blocked.address = record.address;
            self.audit.record_connection(blocked);
        }
        self.audit.add_omitted(more);
    }
}
