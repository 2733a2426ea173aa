//! Credentials that were handed over: each is replaced when another was issued in its place, and taken back when it is over or
//! somebody says so. What is taken back and what is not, delivery by delivery, is in `docs/credentials.md`.

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

use crate::Error;
use crate::session::Session;

/// How long an agent may take to answer. One that does not must not keep the other credentials from what is to become of them.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// The credentials of a running sandbox.
pub(crate) struct DeliveredCredentials {
    session: Arc<Session>,
    /// How each is delivered.
    deliveries: Vec<(String, DeliveryKind)>,
    bound: Vec<RotatingCredential>,
    proxy: Option<Arc<Proxy>>,
    endpoint: Option<Arc<AwsCredentialServer>>,
    audit: Arc<AuditLog>,
    /// Taken back by who runs the sandbox: nothing takes their place.
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
        let deliveries = fetched.deliveries().map(|(name, how)| (name.to_owned(), how)).collect();
        let (bound, proxy, endpoint) =
            (fetched.rotating.clone(), fetched.proxy.clone(), fetched.aws_server.clone());
        DeliveredCredentials {
            session,
            deliveries,
            bound,
            proxy,
            endpoint,
            audit,
            revoked: Mutex::default(),
        }
    }

    /// Takes one back, for good.
    pub async fn revoke(&self, name: &str) -> Result<(), Error> {
        self.revoked.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned());
        self.take_back(name).await
    }

    async fn take_back(&self, name: &str) -> Result<(), Error> {
        let Some(how) = self.how(name) else {
            let reason = "there is no credential of that name in the sandbox".into();
            return Err(Error::Secret { name: name.into(), reason });
        };
        match how {
            DeliveryKind::Endpoint => self.endpoint.iter().for_each(|endpoint| endpoint.revoke()),
            DeliveryKind::Proxy => self.proxy.iter().for_each(|proxy| proxy.revoke(name)),
            DeliveryKind::Memory | DeliveryKind::Env => {
                let request = self.session.channel.name();
                self.ask(name, request, ToGuest::Revoke { request, name: name.into() }).await?;
            }
        }
        // It is taken back all the same, and nothing is dialled any more where lines are lost.
        self.audit.record_revocation(name, how);
        Ok(())
    }

    fn how(&self, name: &str) -> Option<DeliveryKind> {
        self.deliveries.iter().find(|(own, _)| own == name).map(|(_, how)| *how)
    }

    /// Does what the changes say, until there will be no more. What went wrong, a line each.
    pub async fn apply_rotations(
        self: Arc<DeliveredCredentials>,
        mut changes: Changes,
    ) -> Vec<String> {
        let mut troubles = Vec::new();
        while let Some(change) = changes.recv().await {
            for bound in self.bound.iter().filter(|bound| bound.source.location() == change.what) {
                let revoked = self
                    .revoked
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .contains(&bound.name);
                let followed = match revoked {
                    true => Ok(()),
                    false => self.change(bound, &change).await,
                };
                match followed {
                    // There is nothing any more to take it back from.
                    Err(Error::Stopped | Error::Timeout { .. } | Error::GuestEnded(_)) => {
                        return troubles;
                    }
                    Err(error) => troubles.push(error.to_string()),
                    Ok(()) => {}
                }
            }
        }
        troubles
    }

    async fn change(&self, bound: &RotatingCredential, change: &Change) -> Result<(), Error> {
        let name = bound.name.as_str();
        let Some(fields) = &change.fields else { return self.take_back(name).await };
        let value = select_field(&bound.source, fields).map_err(|error| error.to_string());
        let replaced = match value.and_then(|bytes| SecretValue::new(bytes, false)) {
            Ok(value) => self.replace(name, value).await,
            Err(reason) => Err(Error::Secret { name: name.into(), reason }),
        };
        if replaced.is_err() {
            // What it was before is over.
            self.take_back(name).await?;
        }
        replaced
    }

    async fn replace(&self, name: &str, value: SecretValue) -> Result<(), Error> {
        let failed = |reason| Error::Secret { name: name.to_owned(), reason };
        let how = self.how(name).ok_or_else(|| failed("it was not handed over".into()))?;
        // What cannot be written down is not done.
        self.audit
            .record_delivery(name, how)
            .map_err(|error| failed(format!("write the audit: {error}")))?;
        let delivery = match how {
            DeliveryKind::Proxy => {
                let Some(proxy) = &self.proxy else { return Ok(()) };
                return proxy.replace(name, value).map_err(failed);
            }
            // It is read anew each time that the workload asks.
            DeliveryKind::Endpoint => return Ok(()),
            DeliveryKind::Env => chitin_protocol::Delivery::Env,
            DeliveryKind::Memory => chitin_protocol::Delivery::Memory,
        };
        let request = self.session.channel.name();
        let secret = Secret { request, name: name.into(), value: value.to_bytes(), delivery };
        self.ask(name, request, ToGuest::Secret(secret)).await
    }

    async fn ask(&self, name: &str, request: u32, message: ToGuest) -> Result<(), Error> {
        let asking = self.session.request(request, &message);
        tokio::time::timeout(ANSWER_LIMIT, asking).await.unwrap_or_else(|_| {
            let reason = format!("the agent has not answered within {} s", ANSWER_LIMIT.as_secs());
            Err(Error::Secret { name: name.into(), reason })
        })
    }
}
