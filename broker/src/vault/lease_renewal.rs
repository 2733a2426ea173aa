//! Keeps what a vault has issued alive as long as its sandbox lives, and gives it back then.
//!
//! ```text
//!   start ──▶ waiting ──two thirds of a term──▶ renewing ──▶ waiting          a failure is tried again until the term is over
//!                │                                 └──no longer renewed──▶ issued anew: a Change ──▶ waiting
//!                │                                                             └──not to be had──▶ over: a Change
//!                ├──── asked ──▶ read again, if the term is nearly over ──▶ waiting
//!                └──── end, drop ──▶ revoking ──▶ ended
//! ```
//!
//! A token that is not renewed any longer is followed by another where there is a role to log in with, and then everything
//! that was issued to the first is issued anew, because it ends with it.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use chitin_spec::VaultSource;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::{Fields, Lease, Read, Session, VaultError};

/// How long giving everything back may take. What is not given back by then ends with its term.
const REVOKE_LIMIT: Duration = Duration::from_secs(10);

/// Between two attempts to renew, at least: a vault that is gone is not to be hammered.
const PAUSE: Duration = Duration::from_secs(1);

/// Between two attempts to get what is over issued anew.
const OVER_PAUSE: Duration = Duration::from_secs(15);

/// In messages, what the session logged in with.
const TOKEN: &str = "the vault's token";

/// Lines about what went wrong: a vault that comes and goes for weeks is one story.
const MAX_TROUBLES: usize = 16;

/// What the vault has made for this sandbox.
#[derive(Debug)]
pub(crate) struct Issued {
    /// Where it was read.
    pub what: String,
    pub id: String,
    pub lease: Lease,
}

/// What has become of a secret that credentials were made of.
pub struct Change {
    /// Where it was read.
    pub what: String,
    /// What was issued in its place; `None`: it is over, and there is nothing in its place.
    pub fields: Option<Fields>,
}

impl fmt::Debug for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Change").field("what", &self.what).finish_non_exhaustive()
    }
}

/// Changes, as they come.
pub type Changes = mpsc::UnboundedReceiver<Change>;

/// A task that renews and revokes. Dropping it has it revoke in the background.
pub struct LeaseRenewer {
    /// Taken when it is to stop.
    stop: Option<oneshot::Sender<TaskTrackerToken>>,
    asks: mpsc::Sender<Ask>,
    changes: Option<Changes>,
    task: JoinHandle<Vec<String>>,
    /// Counts the revoking as a clean-up.
    cleanup: TaskTracker,
}

impl fmt::Debug for LeaseRenewer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LeaseRenewer").finish_non_exhaustive()
    }
}

impl LeaseRenewer {
    /// Begins. What was read at the places of `followed` is issued anew when it cannot be renewed, and told of.
    pub(crate) fn start(
        session: Session,
        issued: Vec<Issued>,
        followed: BTreeMap<String, VaultSource>,
        cleanup: &TaskTracker,
    ) -> LeaseRenewer {
        let (stop, stopped) = oneshot::channel();
        // Whoever asks waits for the answer.
        let (asks, asked) = mpsc::channel(1);
        // As many as terms end.
        let (tell, changes) = mpsc::unbounded_channel();
        let with_term = |issued: Issued| {
            let term = Term::new(issued.lease);
            (issued, Some(term))
        };
        let keeping = RenewalTask {
            token: session.lease.map(Term::new),
            session,
            leases: issued.into_iter().map(with_term).collect(),
            followed,
            tell,
            troubles: Vec::new(),
        };
        let task = tokio::spawn(keeping.run(stopped, asked));
        LeaseRenewer {
            stop: Some(stop),
            asks,
            changes: Some(changes),
            task,
            cleanup: cleanup.clone(),
        }
    }

    /// For who needs a secret for longer than it is good.
    pub(crate) fn reader(&self) -> LeaseReader {
        LeaseReader { asks: self.asks.clone() }
    }

    /// For who has handed credentials over. To be taken once.
    pub(crate) fn changes(&mut self) -> Option<Changes> {
        self.changes.take()
    }

    /// Gives everything back. What went wrong, then or before, a line each.
    pub async fn revoke_all(mut self) -> Vec<String> {
        self.stop();
        (&mut self.task).await.unwrap_or_default()
    }

    fn stop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // It is there as long as the task is.
            let _ = stop.send(self.cleanup.token());
        }
    }
}

impl Drop for LeaseRenewer {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Somebody wants a secret as it is now.
struct Ask {
    source: VaultSource,
    /// Whether it is to be read again if it has no term.
    again: bool,
    reply: oneshot::Sender<Result<Current, VaultError>>,
}

/// A secret as it is now.
pub(crate) enum Current {
    /// As it was, good until then, if that is known.
    Kept(Option<Instant>),
    /// Another one.
    Read(Fields, Option<Instant>),
}

/// Reads secrets again through the session of a [`LeaseRenewer`].
#[derive(Debug, Clone)]
pub(crate) struct LeaseReader {
    asks: mpsc::Sender<Ask>,
}

impl LeaseReader {
    /// A secret that was read before; `again`: also if it has no term, so that nobody knows whether it is still that one.
    pub async fn current(&self, source: &VaultSource, again: bool) -> Result<Current, VaultError> {
        let (reply, answer) = oneshot::channel();
        let ask = Ask { source: source.clone(), again, reply };
        self.asks.send(ask).await.map_err(|_| VaultError::Ended)?;
        answer.await.unwrap_or(Err(VaultError::Ended))
    }
}

/// One thing to be renewed.
#[derive(Debug)]
struct Term {
    lease: Lease,
    /// How long it was good for when it was issued.
    whole: Duration,
    next: Instant,
    /// Said once, and again when it has worked in between.
    failing: bool,
    /// Another has taken its place.
    succeeded: bool,
    /// It is over, and whoever is to know has been told.
    told: bool,
}

impl Term {
    fn new(lease: Lease) -> Term {
        Term {
            next: when(&lease),
            whole: lease.ttl,
            lease,
            failing: false,
            succeeded: false,
            told: false,
        }
    }

    fn renew(&mut self, lease: Lease) {
        *self = Term { whole: self.whole, ..Term::new(lease) };
    }

    /// What to say of one that was over before it was needed no longer.
    fn over(&self, what: &str) -> Option<String> {
        let since =
            Instant::now().checked_duration_since(self.lease.until).filter(|_| !self.succeeded)?;
        Some(format!(
            "{what} was good until {} s before the end, and could not be renewed",
            since.as_secs()
        ))
    }

    /// When there is something to be done; `anew`: whether something can where it is not renewed.
    fn due(term: Option<&Term>, anew: bool) -> Option<Instant> {
        term.filter(|term| !term.succeeded && (term.lease.renewable || anew)).map(|term| term.next)
    }

    /// Whether a renewal is one: near the end of the longest term there is, less and less is given.
    fn is_enough(&self, lease: &Lease, anew: bool) -> bool {
        lease.until > Instant::now() + PAUSE && !(anew && lease.ttl < self.whole / 2)
    }

    /// It goes on as long as it may, and not longer.
    fn is_last(&mut self, lease: Lease) {
        self.lease = Lease { renewable: false, ..lease };
    }

    /// Takes note of a failure. Whether its term is over with that.
    fn fail(&mut self, what: &str, error: &VaultError, troubles: &mut Vec<String>) -> bool {
        let now = Instant::now();
        let left = self.lease.until.saturating_duration_since(now);
        tracing::warn!(what, seconds_left = left.as_secs(), %error, "lease not renewed");
        if !self.failing && troubles.len() < MAX_TROUBLES {
            self.failing = true;
            troubles.push(format!(
                "renew {what}, which is good for {} s more: {error}",
                left.as_secs()
            ));
        }
        self.next = match left.is_zero() {
            true => now + OVER_PAUSE,
            // Once more at the very end.
            false => (now + (left / 4).max(PAUSE)).min(self.lease.until),
        };
        left.is_zero()
    }
}

/// When to renew: early enough for a few attempts.
fn when(lease: &Lease) -> Instant {
    lease.until - lease.ttl / 3
}

/// The task of a [`LeaseRenewer`].
struct RenewalTask {
    session: Session,
    token: Option<Term>,
    leases: Vec<(Issued, Option<Term>)>,
    followed: BTreeMap<String, VaultSource>,
    tell: mpsc::UnboundedSender<Change>,
    troubles: Vec<String>,
}

impl RenewalTask {
    async fn run(
        mut self,
        mut stopped: oneshot::Receiver<TaskTrackerToken>,
        mut asks: mpsc::Receiver<Ask>,
    ) -> Vec<String> {
        let _returning = loop {
            let lives = |term: &Term| !term.succeeded || term.lease.until > Instant::now();
            self.leases.retain(|(_, term)| term.as_ref().is_none_or(lives));
            let next = self.due();
            let due = async {
                match next {
                    Some(next) => tokio::time::sleep_until(next).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                returning = &mut stopped => break returning,
                Some(Ask { source, again, reply }) = asks.recv() => {
                    let current = self.current(&source, again).await;
                    // Who has gone meanwhile asks again.
                    let _ = reply.send(current);
                    continue;
                }
                () = due => {}
            }
            self.tend_token().await;
            // What is issued anew is added behind the others, and is not due yet.
            for at in 0..self.leases.len() {
                self.tend_lease(at).await;
            }
        };
        self.give_back().await
    }

    fn due(&self) -> Option<Instant> {
        let token = Term::due(self.token.as_ref(), self.session.is_ours());
        let lease = |(issued, term): &(Issued, Option<Term>)| {
            Term::due(term.as_ref(), self.followed.contains_key(&issued.what))
        };
        self.leases.iter().filter_map(lease).chain(token).min()
    }

    /// Renews the token, or gets another.
    async fn tend_token(&mut self) {
        let role = self.session.is_ours();
        if Term::due(self.token.as_ref(), role).is_none_or(|due| due > Instant::now()) {
            return;
        }
        let Some(term) = &mut self.token else { return };
        let mut error = VaultError::NoLonger;
        if term.lease.renewable && !term.told {
            match self.session.renew().await.map(|()| self.session.lease) {
                Ok(Some(lease)) if term.is_enough(&lease, role) => return term.renew(lease),
                Ok(Some(lease)) => term.is_last(lease),
                Ok(None) => return self.token = None,
                Err(why) => error = why,
            }
        }
        // One that does not answer does not log in either.
        let there = !matches!(
            error,
            VaultError::Unreachable { .. }
                | VaultError::Sealed { .. }
                | VaultError::Redirect { .. }
        );
        if role && (there || term.told) {
            match self.session.log_in_again().await {
                Ok(()) => return self.take_token(),
                Err(why) => error = why,
            }
        }
        let Some(term) = &mut self.token else { return };
        if !role && error == VaultError::NoLonger {
            // It ends when it ends.
            return;
        }
        if term.fail(TOKEN, &error, &mut self.troubles) && !std::mem::replace(&mut term.told, true)
        {
            // With it is over whatever was issued to it.
            let until = term.lease.until;
            self.ends_by(until);
        }
    }

    /// There is another token. What was issued to the former ends with that one.
    fn take_token(&mut self) {
        let former = self.token.take();
        self.token = self.session.lease.map(Term::new);
        if let Some(former) = former {
            self.ends_by(former.lease.until);
        }
    }

    /// All there is ends then, if not before.
    fn ends_by(&mut self, until: Instant) {
        for term in self.leases.iter_mut().filter_map(|(_, term)| term.as_mut()) {
            term.lease.until = term.lease.until.min(until);
            term.lease.renewable = false;
            term.next = Instant::now();
        }
    }

    /// Renews a lease, or has what it is of issued anew.
    async fn tend_lease(&mut self, at: usize) {
        let Some((Issued { what, id, lease }, Some(term))) = self.leases.get_mut(at) else {
            return;
        };
        let source = self.followed.get(what).cloned();
        if Term::due(Some(term), source.is_some()).is_none_or(|due| due > Instant::now()) {
            return;
        }
        let mut error = VaultError::NoLonger;
        if term.lease.renewable {
            match self.session.renew_lease(id, *lease).await {
                Ok(Some(lease)) if term.is_enough(&lease, source.is_some()) => {
                    tracing::debug!(what, seconds = lease.ttl.as_secs(), "lease renewed");
                    return term.renew(lease);
                }
                Ok(Some(lease)) => term.is_last(lease),
                // The server knows no leases, or this one does not end.
                Ok(None) => {
                    self.leases[at].1 = None;
                    return;
                }
                Err(why) => error = why,
            }
        }
        let what = what.clone();
        if let Some(source) = &source {
            match self.read_again(source).await {
                Ok(_) => return,
                Err(why) if error == VaultError::NoLonger => error = why,
                Err(_) => {}
            }
        }
        let Some((_, Some(term))) = self.leases.get_mut(at) else { return };
        if source.is_none() && error == VaultError::NoLonger {
            return;
        }
        if term.fail(&what, &error, &mut self.troubles) {
            if source.is_none() {
                // That has been said.
                self.leases[at].1 = None;
            } else if !std::mem::replace(&mut term.told, true) {
                // Whoever was to know may have gone.
                let _ = self.tell.send(Change { what, fields: None });
            }
        }
    }

    /// A secret as it is now: read again when three quarters of its term are over and it has not been renewed.
    async fn current(&mut self, source: &VaultSource, again: bool) -> Result<Current, VaultError> {
        let what = source.location();
        let now = Instant::now();
        let last = self.leases.iter().rev().find(|(issued, _)| issued.what == what);
        match last.and_then(|(_, term)| term.as_ref()) {
            Some(Term { lease, .. }) if lease.until > now + lease.ttl / 4 => {
                return Ok(Current::Kept(Some(lease.until)));
            }
            None if !again => return Ok(Current::Kept(None)),
            _ => {}
        }
        let (fields, until) = self.read_again(source).await?;
        Ok(Current::Read(fields, until))
    }

    /// Has a secret issued anew, in place of what was issued before, and tells of it.
    async fn read_again(
        &mut self,
        source: &VaultSource,
    ) -> Result<(Fields, Option<Instant>), VaultError> {
        let Read { fields, lease } = self.session.read(source).await?;
        let what = source.location();
        tracing::info!(what, "secret read again");
        // What is over needs no giving back, and what has a successor no renewing.
        for (_, term) in self.leases.iter_mut().filter(|(issued, _)| issued.what == what) {
            if let Some(term) = term {
                term.succeeded = true;
            }
        }
        let until = lease.as_ref().map(|(_, lease)| lease.until);
        if let Some((id, lease)) = lease {
            self.leases.push((Issued { what: what.clone(), id, lease }, Some(Term::new(lease))));
        }
        if self.followed.contains_key(&what) {
            let _ = self.tell.send(Change { what, fields: Some(fields.clone()) });
        }
        Ok((fields, until))
    }

    async fn give_back(mut self) -> Vec<String> {
        let mut troubles = self.troubles;
        let terms = self.leases.iter().map(|(issued, term)| (issued.what.as_str(), term));
        let terms = terms.chain([(TOKEN, &self.token)]);
        troubles.extend(terms.filter_map(|(what, term)| term.as_ref()?.over(what)));
        let revoking = async {
            // With a token of ours go the leases that were issued to it.
            if self.session.is_ours() {
                return self.session.revoke().await.err().into_iter().collect::<Vec<_>>();
            }
            let mut errors = Vec::new();
            for (issued, _) in &self.leases {
                errors.extend(self.session.revoke_lease(&issued.id).await.err());
            }
            errors
        };
        match tokio::time::timeout(REVOKE_LIMIT, revoking).await {
            Ok(errors) => {
                tracing::info!(errors = errors.len(), "credentials revoked");
                troubles
                    .extend(errors.iter().map(|error| format!("give credentials back: {error}")));
            }
            Err(_) => {
                let limit = REVOKE_LIMIT.as_secs();
                troubles.push(format!(
                    "give credentials back: the vault has not done it within {limit} s"
                ));
            }
        }
        troubles
    }
}
