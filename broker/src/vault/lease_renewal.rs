//! The task that renews the leases of one sandbox while it runs, and revokes them at its end.
//!
//! ```text
//!   waiting ─┬─ two thirds of a TTL ──▶ renew ──ok──▶ waiting
//!            │                            └─ not renewable ──▶ reissue ──ok──▶ Change, waiting
//!            │                                                    └─ expired ──▶ Change
//!            ├─ LeaseReader ──▶ reissue if less than a quarter of the TTL is left ──▶ waiting
//!            └─ revoke_all, drop ──▶ revoke ──▶ end
//! ```
//!
//! A token that can no longer be renewed is replaced by another login, if there is a role to log in
//! with. Every secret that was issued to the old token is then reissued, because it expires with
//! that token.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use chitin_spec::VaultSource;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::client::VaultSecret;
use super::lease_schedule::{Lease, LeaseSchedule};
use super::{Fields, VaultClient, VaultError};

/// The time limit for revoking everything. A lease that is not revoked by then expires.
const REVOKE_LIMIT: Duration = Duration::from_secs(10);

/// The token of the login in messages.
const TOKEN: &str = "the token of the vault";

/// The maximum number of messages about failed renewals: a server that fails for weeks fills no
/// memory.
const MAX_MESSAGES: usize = 16;

/// A lease that the vault issued for this sandbox.
#[derive(Debug)]
pub(crate) struct IssuedLease {
    /// The location of the secret, see [`VaultSource::location`].
    pub location: String,
    pub id: String,
    pub lease: Lease,
}

/// A change of a secret that credentials are bound to.
pub struct Change {
    /// The location of the secret, see [`VaultSource::location`].
    pub location: String,
    /// The reissued secret. `None`: the secret has expired, and there is no other.
    pub fields: Option<Fields>,
}

impl fmt::Debug for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Change").field("location", &self.location).finish_non_exhaustive()
    }
}

/// The changes of all secrets, in order.
pub type Changes = mpsc::UnboundedReceiver<Change>;

/// A handle to the renewal task. If it is dropped, the task revokes everything in the background.
pub struct LeaseRenewer {
    /// `None` after the task was told to stop.
    stop: Option<oneshot::Sender<TaskTrackerToken>>,
    requests: mpsc::Sender<ReadRequest>,
    changes: Option<Changes>,
    task: JoinHandle<Vec<String>>,
    /// Counts the revocation as a clean-up.
    cleanup: TaskTracker,
}

impl fmt::Debug for LeaseRenewer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LeaseRenewer").finish_non_exhaustive()
    }
}

impl LeaseRenewer {
    /// Starts the task. A secret in `reissuable`, by location, is read again when its lease can no
    /// longer be renewed, and reported as a [`Change`].
    pub(crate) fn start(
        client: VaultClient,
        issued: Vec<IssuedLease>,
        reissuable: BTreeMap<String, VaultSource>,
        cleanup: &TaskTracker,
    ) -> LeaseRenewer {
        let (stop, stopped) = oneshot::channel();
        // One request is enough: its sender waits for the reply.
        let (requests, received) = mpsc::channel(1);
        // Unbounded, as leases bound it: each change follows a lease that ended.
        let (changes_tx, changes) = mpsc::unbounded_channel();
        let scheduled = |issued: IssuedLease| {
            let schedule = LeaseSchedule::new(issued.lease);
            (issued, Some(schedule))
        };
        let renewal = RenewalTask {
            token: client.token_lease.map(LeaseSchedule::new),
            client,
            leases: issued.into_iter().map(scheduled).collect(),
            reissuable,
            changes: changes_tx,
            messages: Vec::new(),
        };
        let task = tokio::spawn(renewal.run(stopped, received));
        LeaseRenewer {
            stop: Some(stop),
            requests,
            changes: Some(changes),
            task,
            cleanup: cleanup.clone(),
        }
    }

    /// Returns a reader for secrets that are used after their leases expire.
    pub(crate) fn reader(&self) -> LeaseReader {
        LeaseReader { requests: self.requests.clone() }
    }

    /// Takes the receiver of changes. Returns `None` at a second call.
    pub(crate) fn take_changes(&mut self) -> Option<Changes> {
        self.changes.take()
    }

    /// Revokes everything. Returns one line for each failure, also of earlier renewals.
    pub async fn revoke_all(mut self) -> Vec<String> {
        self.stop();
        (&mut self.task).await.unwrap_or_default()
    }

    fn stop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // The task receives this as long as it runs.
            let _ = stop.send(self.cleanup.token());
        }
    }
}

impl Drop for LeaseRenewer {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A request for the current state of a secret.
struct ReadRequest {
    source: VaultSource,
    reread_static: bool,
    reply: oneshot::Sender<Result<CurrentSecret, VaultError>>,
}

/// The current state of a secret.
pub(crate) enum CurrentSecret {
    /// The secret is the one that was read before. `expires_at` is `None` for a static secret.
    Unchanged { expires_at: Option<Instant> },
    /// The secret was read again.
    Read { fields: Fields, expires_at: Option<Instant> },
}

/// Reads secrets again through the login of a [`LeaseRenewer`].
#[derive(Debug, Clone)]
pub(crate) struct LeaseReader {
    requests: mpsc::Sender<ReadRequest>,
}

impl LeaseReader {
    /// Returns the current state of a secret that was read before. A secret without a lease may
    /// have changed unnoticed: it is read again if `reread_static`.
    pub async fn read_current(
        &self,
        source: &VaultSource,
        reread_static: bool,
    ) -> Result<CurrentSecret, VaultError> {
        let (reply, response) = oneshot::channel();
        let request = ReadRequest { source: source.clone(), reread_static, reply };
        self.requests.send(request).await.map_err(|_| VaultError::Revoked)?;
        response.await.unwrap_or(Err(VaultError::Revoked))
    }
}

/// The task of a [`LeaseRenewer`].
struct RenewalTask {
    client: VaultClient,
    /// `None` for a token that never expires, or that belongs to the caller.
    token: Option<LeaseSchedule>,
    /// The schedule is `None` for a lease that is revoked at the end, and needs no renewal.
    leases: Vec<(IssuedLease, Option<LeaseSchedule>)>,
    reissuable: BTreeMap<String, VaultSource>,
    changes: mpsc::UnboundedSender<Change>,
    messages: Vec<String>,
}

impl RenewalTask {
    async fn run(
        mut self,
        mut stopped: oneshot::Receiver<TaskTrackerToken>,
        mut requests: mpsc::Receiver<ReadRequest>,
    ) -> Vec<String> {
        let _cleanup = loop {
            self.forget_obsolete_leases();
            let next_attempt = self.next_attempt();
            let due = async {
                match next_attempt {
                    Some(due_at) => tokio::time::sleep_until(due_at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                cleanup = &mut stopped => break cleanup,
                Some(ReadRequest { source, reread_static, reply }) = requests.recv() => {
                    let current = self.read_current(&source, reread_static).await;
                    // A caller that stopped waiting makes the request again.
                    let _ = reply.send(current);
                    continue;
                }
                () = due => {}
            }
            self.renew_token().await;
            // A reissued lease is added at the end, and is not due yet.
            for index in 0..self.leases.len() {
                self.renew_lease(index).await;
            }
        };
        self.revoke_all().await
    }

    fn forget_obsolete_leases(&mut self) {
        let now = Instant::now();
        self.leases.retain(|(_, schedule)| schedule.as_ref().is_none_or(|it| !it.is_obsolete(now)));
    }

    fn next_attempt(&self) -> Option<Instant> {
        let token = self.token.as_ref().and_then(|it| it.due_at(self.client.owns_token()));
        let due_at = |(issued, schedule): &(IssuedLease, Option<LeaseSchedule>)| {
            schedule.as_ref()?.due_at(self.reissuable.contains_key(&issued.location))
        };
        self.leases.iter().filter_map(due_at).chain(token).min()
    }

    /// Renews the token, or logs in again.
    async fn renew_token(&mut self) {
        let owned = self.client.owns_token();
        let Some(schedule) = self.token.as_mut().filter(|it| it.is_due(owned, Instant::now()))
        else {
            return;
        };
        let mut error = VaultError::NotRenewable;
        if schedule.lease.renewable && !schedule.is_expiry_reported() {
            match self.client.renew_token().await.map(|()| self.client.token_lease) {
                Ok(Some(lease)) if schedule.extends_enough(&lease, owned, Instant::now()) => {
                    return schedule.record_renewal(lease);
                }
                Ok(Some(lease)) => schedule.mark_final(lease),
                Ok(None) => return self.token = None,
                Err(failure) => error = failure,
            }
        }
        // While the server is down a login fails as well.
        if owned && (!error.is_outage() || schedule.is_expiry_reported()) {
            match self.client.log_in_again().await {
                Ok(()) => return self.replace_token(),
                Err(failure) => error = failure,
            }
        }
        if !owned && matches!(error, VaultError::NotRenewable) {
            // The token of the caller is used until it expires.
            return;
        }
        let Some(schedule) = &mut self.token else { return };
        let expired = record_failure(schedule, TOKEN, &error, &mut self.messages);
        if expired && schedule.report_expiry() {
            // The leases expire with the token that they were issued to.
            let expires_at = schedule.lease.expires_at;
            self.end_leases_by(expires_at);
        }
    }

    /// Starts the schedule of a new token. The secrets of the old one are reissued.
    fn replace_token(&mut self) {
        let old = self.token.take();
        self.token = self.client.token_lease.map(LeaseSchedule::new);
        if let Some(old) = old {
            self.end_leases_by(old.lease.expires_at);
        }
    }

    fn end_leases_by(&mut self, expires_at: Instant) {
        let now = Instant::now();
        for schedule in self.leases.iter_mut().filter_map(|(_, schedule)| schedule.as_mut()) {
            schedule.end_by(expires_at, now);
        }
    }

    /// Renews a lease, or reissues its secret.
    async fn renew_lease(&mut self, index: usize) {
        let Some((IssuedLease { location, id, lease }, Some(schedule))) =
            self.leases.get_mut(index)
        else {
            return;
        };
        let source = self.reissuable.get(location).cloned();
        if !schedule.is_due(source.is_some(), Instant::now()) {
            return;
        }
        let mut error = VaultError::NotRenewable;
        if schedule.lease.renewable {
            match self.client.renew_lease(id, *lease).await {
                Ok(Some(lease))
                    if schedule.extends_enough(&lease, source.is_some(), Instant::now()) =>
                {
                    tracing::debug!(location, seconds = lease.ttl.as_secs(), "lease renewed");
                    return schedule.record_renewal(lease);
                }
                Ok(Some(lease)) => schedule.mark_final(lease),
                // The server has no leases, or this one never expires.
                Ok(None) => return self.leases[index].1 = None,
                Err(failure) => error = failure,
            }
        }
        if let Some(source) = &source {
            match self.reissue(source).await {
                Ok(_) => return,
                Err(failure) if matches!(error, VaultError::NotRenewable) => error = failure,
                Err(_) => {}
            }
        }
        self.record_lease_failure(index, source.is_some(), &error);
    }

    fn record_lease_failure(&mut self, index: usize, reissuable: bool, error: &VaultError) {
        let Some((IssuedLease { location, .. }, Some(schedule))) = self.leases.get_mut(index)
        else {
            return;
        };
        if !reissuable && matches!(error, VaultError::NotRenewable) {
            // The secret is used until it expires.
            return;
        }
        if !record_failure(schedule, location, error, &mut self.messages) {
            return;
        }
        if reissuable && schedule.report_expiry() {
            let change = Change { location: location.clone(), fields: None };
            // The receiver may have been dropped.
            let _ = self.changes.send(change);
        } else if !reissuable {
            // Its expiry is in the messages.
            self.leases[index].1 = None;
        }
    }

    /// Returns the current state of a secret. It is read again if its lease was not renewed, and a
    /// quarter of the TTL is left.
    async fn read_current(
        &mut self,
        source: &VaultSource,
        reread_static: bool,
    ) -> Result<CurrentSecret, VaultError> {
        let location = source.location();
        let last = self.leases.iter().rev().find(|(issued, _)| issued.location == location);
        match last.and_then(|(_, schedule)| schedule.as_ref()) {
            Some(schedule) if schedule.is_fresh(Instant::now()) => {
                return Ok(CurrentSecret::Unchanged {
                    expires_at: Some(schedule.lease.expires_at),
                });
            }
            None if !reread_static => return Ok(CurrentSecret::Unchanged { expires_at: None }),
            _ => {}
        }
        let (fields, expires_at) = self.reissue(source).await?;
        Ok(CurrentSecret::Read { fields, expires_at })
    }

    /// Reads a secret again, which supersedes its earlier leases, and reports the change.
    async fn reissue(
        &mut self,
        source: &VaultSource,
    ) -> Result<(Fields, Option<Instant>), VaultError> {
        let VaultSecret { fields, lease } = self.client.read_secret(source).await?;
        let location = source.location();
        tracing::info!(location, "secret read again");
        let earlier = self.leases.iter_mut().filter(|(issued, _)| issued.location == location);
        earlier
            .filter_map(|(_, schedule)| schedule.as_mut())
            .for_each(LeaseSchedule::mark_superseded);
        let expires_at = lease.as_ref().map(|(_, lease)| lease.expires_at);
        if let Some((id, lease)) = lease {
            let issued = IssuedLease { location: location.clone(), id, lease };
            self.leases.push((issued, Some(LeaseSchedule::new(lease))));
        }
        if self.reissuable.contains_key(&location) {
            let _ = self.changes.send(Change { location, fields: Some(fields.clone()) });
        }
        Ok((fields, expires_at))
    }

    /// Revokes everything, and returns the messages.
    async fn revoke_all(mut self) -> Vec<String> {
        self.report_expired_leases();
        match tokio::time::timeout(REVOKE_LIMIT, revoke(&mut self.client, &self.leases)).await {
            Ok(errors) => {
                tracing::info!(errors = errors.len(), "credentials revoked");
                let lines = errors.iter().map(|error| format!("revoke credentials: {error}"));
                self.messages.extend(lines);
            }
            Err(_) => {
                let limit = REVOKE_LIMIT.as_secs();
                let line = format!("revoke credentials: the vault needs more than {limit} s");
                self.messages.push(line);
            }
        }
        self.messages
    }

    /// Adds a message for every lease that expired while it was in use.
    fn report_expired_leases(&mut self) {
        let now = Instant::now();
        let leases = self.leases.iter().map(|(issued, it)| (issued.location.as_str(), it));
        for (name, schedule) in leases.chain([(TOKEN, &self.token)]) {
            if let Some(since) = schedule.as_ref().and_then(|it| it.expired_for(now)) {
                let seconds = since.as_secs();
                self.messages.push(format!(
                    "{name} expired {seconds} s before the end, and could not be renewed"
                ));
            }
        }
    }
}

/// Revokes the tokens of this client and so their leases, or each lease of a token of the caller.
async fn revoke(
    client: &mut VaultClient,
    leases: &[(IssuedLease, Option<LeaseSchedule>)],
) -> Vec<VaultError> {
    if client.owns_token() {
        return client.revoke_tokens().await.err().into_iter().collect();
    }
    let mut errors = Vec::new();
    for (issued, _) in leases {
        errors.extend(client.revoke_lease(&issued.id).await.err());
    }
    errors
}

/// Records a failed renewal, with a message for the first in a row. Returns true if the lease has
/// expired.
fn record_failure(
    schedule: &mut LeaseSchedule,
    name: &str,
    error: &VaultError,
    messages: &mut Vec<String>,
) -> bool {
    let failure = schedule.record_failure(Instant::now());
    let seconds = failure.remaining.as_secs();
    tracing::warn!(name, seconds_left = seconds, %error, "lease not renewed");
    if failure.first && messages.len() < MAX_MESSAGES {
        messages.push(format!("renew {name}, which expires in {seconds} s: {error}"));
    }
    failure.remaining.is_zero()
}
