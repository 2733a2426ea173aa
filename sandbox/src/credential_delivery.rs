//! The credentials of a running sandbox after their delivery. Each is replaced when the vault
//! reissues it, and disabled when it has expired or the caller revokes it.
//!
//! The effects of a revocation, and its limits, are in `docs/credentials.md` for each kind of
//! delivery.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use chitin_broker::aws::AwsCredentialServer;
use chitin_broker::credentials::{FetchedCredentials, RotatingCredential};
use chitin_broker::proxy::Proxy;
use chitin_broker::vault::{Change, Changes, select_field};
use chitin_broker::{AuditLog, SecretValue};
use chitin_protocol::{Secret, ToGuest};
use chitin_spec::DeliveryKind;
use chitin_text::error_chain;

use crate::error::{Error, RotationError};
use crate::session::Session;

/// Time for the agent to reply. An agent that does not must not delay the other credentials.
const REPLY_LIMIT: Duration = Duration::from_secs(10);

/// The credentials of a running sandbox.
pub(crate) struct DeliveredCredentials {
    session: Arc<Session>,
    deliveries: Vec<(String, DeliveryKind)>,
    rotating: Vec<RotatingCredential>,
    proxy: Option<Arc<Proxy>>,
    aws_server: Option<Arc<AwsCredentialServer>>,
    audit: Arc<AuditLog>,
    /// Credentials that the caller has revoked: no rotation replaces them.
    revoked: Mutex<BTreeSet<String>>,
}

impl fmt::Debug for DeliveredCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeliveredCredentials")
            .field("deliveries", &self.deliveries)
            .finish_non_exhaustive()
    }
}

impl DeliveredCredentials {
    pub fn new(
        session: Arc<Session>,
        fetched: &FetchedCredentials,
        audit: Arc<AuditLog>,
    ) -> DeliveredCredentials {
        let deliveries = fetched.deliveries().map(|(name, kind)| (name.to_owned(), kind));
        DeliveredCredentials {
            session,
            deliveries: deliveries.collect(),
            rotating: fetched.rotating.clone(),
            proxy: fetched.proxy.clone(),
            aws_server: fetched.aws_server.clone(),
            audit,
            revoked: Mutex::default(),
        }
    }

    /// Revokes a credential permanently.
    pub async fn revoke(&self, name: &str) -> Result<(), Error> {
        self.revoked.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned());
        self.disable_credential(name).await
    }

    /// Makes the AWS endpoint refuse all requests, if there is one.
    pub fn disable_aws_server(&self) {
        if let Some(server) = &self.aws_server {
            server.revoke();
        }
    }

    async fn disable_credential(&self, name: &str) -> Result<(), Error> {
        let kind = self.delivery_kind(name)?;
        match kind {
            DeliveryKind::Endpoint => self.disable_aws_server(),
            DeliveryKind::Proxy => self.proxy.iter().for_each(|proxy| proxy.revoke(name)),
            DeliveryKind::Memory | DeliveryKind::Env => {
                let request = self.session.channel.next_id();
                self.call_agent(name, request, ToGuest::Revoke { request, name: name.into() })
                    .await?;
            }
        }
        // A line that cannot be written does not undo the revocation: the broker then stops
        // dialling.
        self.audit.record_revocation(name, kind);
        Ok(())
    }

    fn delivery_kind(&self, name: &str) -> Result<DeliveryKind, Error> {
        let mut deliveries = self.deliveries.iter();
        match deliveries.find(|(delivered, _)| delivered == name) {
            Some((_, kind)) => Ok(*kind),
            None => Err(Error::UnknownCredential { name: name.into() }),
        }
    }

    /// Applies changes until there will be no more. Returns a warning for each that failed.
    pub async fn apply_rotations(self: Arc<Self>, mut changes: Changes) -> Vec<String> {
        let mut warnings = Vec::new();
        while let Some(change) = changes.recv().await {
            let changed = |one: &&RotatingCredential| one.source.location() == change.location;
            for credential in self.rotating.iter().filter(changed) {
                if self.is_revoked(&credential.name) {
                    continue;
                }
                match self.apply_change(credential, &change).await {
                    Ok(()) => {}
                    // The sandbox has ended, and its credentials with it.
                    Err(Error::Stopped | Error::Timeout { .. } | Error::GuestEnded(_)) => {
                        return warnings;
                    }
                    Err(error) => warnings.push(error_chain(&error)),
                }
            }
        }
        warnings
    }

    fn is_revoked(&self, name: &str) -> bool {
        self.revoked.lock().unwrap_or_else(PoisonError::into_inner).contains(name)
    }

    /// Replaces a credential by its reissued value, or disables it if there is none.
    async fn apply_change(
        &self,
        credential: &RotatingCredential,
        change: &Change,
    ) -> Result<(), Error> {
        let name = credential.name.as_str();
        let Some(fields) = &change.fields else { return self.disable_credential(name).await };
        let value = select_field(&credential.source, fields).map_err(RotationError::Field);
        let value =
            value.and_then(|bytes| SecretValue::new(bytes, false).map_err(RotationError::Value));
        let replaced = match value {
            Ok(value) => self.replace_value(name, value).await,
            Err(error) => Err(rotation_error(name, error)),
        };
        if replaced.is_err() {
            // The former value has expired.
            self.disable_credential(name).await?;
        }
        replaced
    }

    async fn replace_value(&self, name: &str, value: SecretValue) -> Result<(), Error> {
        let kind = self.delivery_kind(name)?;
        // Not delivered unless the audit has its line.
        self.audit
            .record_delivery(name, kind)
            .map_err(|error| rotation_error(name, RotationError::Audit(error)))?;
        let delivery = match kind {
            DeliveryKind::Proxy => {
                let Some(proxy) = &self.proxy else { return Ok(()) };
                return proxy
                    .replace_value(name, value)
                    .map_err(|error| rotation_error(name, RotationError::Proxy(error)));
            }
            // The server reads the secret at each request of the workload.
            DeliveryKind::Endpoint => return Ok(()),
            DeliveryKind::Env => chitin_protocol::Delivery::Env,
            DeliveryKind::Memory => chitin_protocol::Delivery::Memory,
        };
        let request = self.session.channel.next_id();
        let secret = Secret { request, name: name.into(), value: value.to_bytes(), delivery };
        self.call_agent(name, request, ToGuest::Secret(secret)).await
    }

    async fn call_agent(&self, name: &str, request: u32, message: ToGuest) -> Result<(), Error> {
        let calling = self.session.call_agent(request, &message);
        let unanswered = RotationError::Unanswered { limit: REPLY_LIMIT };
        tokio::time::timeout(REPLY_LIMIT, calling)
            .await
            .unwrap_or_else(|_| Err(rotation_error(name, unanswered)))
    }
}

fn rotation_error(name: &str, source: RotationError) -> Error {
    Error::Rotation { name: name.into(), source }
}
