//! The egress that a sandbox is allowed, and the errors of an invalid one.

use std::io;
use std::path::PathBuf;

use chitin_protocol::MAX_ENDPOINTS;
use chitin_spec::{DeliveryKind, EgressLimits, Endpoint, ParseEndpointError};

use super::notice::{RefusalNotices, RefusalObserver};
use crate::audit_log::AuditLog;

/// The egress that a sandbox is allowed. The default allows none.
#[derive(Debug, Clone, Default)]
pub struct EgressSpec {
    /// Allowed names and ports.
    pub endpoints: Vec<Endpoint>,
    /// Names may resolve to loopback and private addresses.
    pub allow_private: bool,
    /// Path of the audit log.
    pub audit: Option<PathBuf>,
    /// Limits of rate, number and volume.
    pub limits: EgressLimits,
    /// The first requested endpoint that is invalid.
    pub invalid: Option<ParseEndpointError>,
    /// The observer of refused attempts.
    pub observer: Option<RefusalObserver>,
}

/// An error in the requested egress.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message of a variant explains its fields")]
pub enum EgressError {
    /// A requested endpoint is invalid.
    #[error(transparent)]
    InvalidEndpoint(#[from] ParseEndpointError),
    /// There are more endpoints than the protocol supports.
    #[error("{count} endpoints: a sandbox may reach at most {MAX_ENDPOINTS}")]
    TooManyEndpoints { count: usize },
    /// The audit log could not be written.
    #[error("write the audit of connections to {}", path.display())]
    Audit { path: PathBuf, source: io::Error },
}

impl EgressSpec {
    /// Adds endpoints, of a command line or a policy. Duplicates are ignored.
    pub fn allow_endpoints(&mut self, endpoints: impl IntoIterator<Item = Endpoint>) {
        for endpoint in endpoints {
            if !self.endpoints.contains(&endpoint) {
                self.endpoints.push(endpoint);
            }
        }
    }

    /// Checks the endpoints and opens the audit log, before anything is started.
    pub fn validate(&self) -> Result<(), EgressError> {
        if let Some(error) = &self.invalid {
            return Err(error.clone().into());
        }
        if self.endpoints.len() > MAX_ENDPOINTS {
            return Err(EgressError::TooManyEndpoints { count: self.endpoints.len() });
        }
        self.open_audit().map(drop)
    }

    /// Returns true if any endpoint is allowed.
    pub fn is_enabled(&self) -> bool {
        !self.endpoints.is_empty()
    }

    /// Opens the audit log, if one was requested.
    pub fn open_audit(&self) -> Result<AuditLog, EgressError> {
        let audit = AuditLog::open(self.audit.as_deref());
        let audit = audit.map_err(|source| self.audit_error(source))?;
        Ok(audit.with_notices(self.observer.clone().map(RefusalNotices::new)))
    }

    /// Writes a line for each credential before it is delivered.
    pub fn record_deliveries<'a>(
        &self,
        audit: &AuditLog,
        deliveries: impl IntoIterator<Item = (&'a str, DeliveryKind)>,
    ) -> Result<(), EgressError> {
        let mut deliveries = deliveries.into_iter();
        deliveries
            .try_for_each(|(name, kind)| audit.record_delivery(name, kind))
            .map_err(|source| self.audit_error(source))
    }

    fn audit_error(&self, source: io::Error) -> EgressError {
        EgressError::Audit { path: self.audit.clone().unwrap_or_default(), source }
    }
}
