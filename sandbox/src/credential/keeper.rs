//! Keeps what a vault has issued alive as long as its sandbox lives, and gives it back then.
//!
//! ```text
//!   start ──▶ waiting ──two thirds of a term──▶ renewing ──▶ waiting          a failure is tried again until the term is over
//!                ├──── asked ──▶ read again, if the term is nearly over ──▶ waiting
//!                └──── end, drop ──▶ revoking ──▶ ended
//! ```

use std::fmt;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::vault::{Fields, Lease, Read, Session, VaultError};
use crate::policy::VaultSource;
use crate::returning::Returning;

/// How long giving everything back may take. What is not given back by then ends with its term.
const REVOKE_LIMIT: Duration = Duration::from_secs(10);

/// Between two attempts to renew, at least: a vault that is gone is not to be hammered.
const PAUSE: Duration = Duration::from_secs(1);

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

/// A task that renews and revokes. Dropping it has it revoke in the background.
pub(crate) struct Keeper {
    /// Taken when it is to stop.
    stop: Option<oneshot::Sender<Returning>>,
    asks: mpsc::Sender<Ask>,
    task: JoinHandle<Vec<String>>,
}

impl fmt::Debug for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keeper").finish_non_exhaustive()
    }
}

impl Keeper {
    pub fn start(session: Session, issued: Vec<Issued>) -> Keeper {
        let (stop, stopped) = oneshot::channel();
        // Whoever asks waits for the answer.
        let (asks, asked) = mpsc::channel(1);
        Keeper { stop: Some(stop), asks, task: tokio::spawn(keep(session, issued, stopped, asked)) }
    }

    /// For who needs a secret for longer than it is good.
    pub fn reader(&self) -> Reader {
        Reader { asks: self.asks.clone() }
    }

    /// Gives everything back. What went wrong, then or before, a line each.
    pub async fn end(mut self) -> Vec<String> {
        self.stop();
        (&mut self.task).await.unwrap_or_default()
    }

    fn stop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // It is there as long as the task is.
            let _ = stop.send(Returning::begin());
        }
    }
}

impl Drop for Keeper {
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

/// Reads secrets again through the session of a [`Keeper`].
#[derive(Debug, Clone)]
pub(crate) struct Reader {
    asks: mpsc::Sender<Ask>,
}

impl Reader {
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
    next: Instant,
    /// Said once, and again when it has worked in between.
    failing: bool,
    /// Another has taken its place.
    followed: bool,
}

impl Term {
    fn new(lease: Lease) -> Term {
        Term { next: when(&lease), lease, failing: false, followed: false }
    }

    /// What to say of one that was over before it was needed no longer.
    fn over(&self, what: &str) -> Option<String> {
        let since = Instant::now().checked_duration_since(self.lease.until).filter(|_| !self.followed)?;
        Some(format!("{what} was good until {} s before the end, and could not be renewed", since.as_secs()))
    }

    fn due(term: &Option<Term>) -> Option<Instant> {
        term.as_ref().filter(|term| term.lease.renewable).map(|term| term.next)
    }
}

/// When to renew: early enough for a few attempts.
fn when(lease: &Lease) -> Instant {
    lease.until - lease.ttl / 3
}

type Leases = Vec<(Issued, Option<Term>)>;

async fn keep(
    mut session: Session,
    issued: Vec<Issued>,
    mut stopped: oneshot::Receiver<Returning>,
    mut asks: mpsc::Receiver<Ask>,
) -> Vec<String> {
    let mut troubles = Vec::new();
    let mut token = session.lease.map(Term::new);
    let mut leases: Leases = issued
        .into_iter()
        .map(|issued| (Term::new(issued.lease), issued))
        .map(|(term, issued)| (issued, Some(term)))
        .collect();
    let _returning = loop {
        let dues = leases.iter().map(|(_, term)| term).chain([&token]);
        let next = dues.filter_map(Term::due).min();
        let due = async {
            match next {
                Some(next) => tokio::time::sleep_until(next).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            returning = &mut stopped => break returning,
            Some(Ask { source, again, reply }) = asks.recv() => {
                let current = current(&session, &mut leases, &source, again).await;
                // Who has gone meanwhile asks again.
                let _ = reply.send(current);
                continue;
            }
            () = due => {}
        }
        let now = Instant::now();
        if Term::due(&token).is_some_and(|due| due <= now) {
            let renewed = session.renew().await.map(|()| session.lease);
            settle(&mut token, renewed, TOKEN, &mut troubles);
        }
        for (issued, term) in &mut leases {
            if let Some(due) = Term::due(term)
                && due <= now
            {
                let renewed = session.renew_lease(&issued.id, issued.lease).await;
                settle(term, renewed, &issued.what, &mut troubles);
            }
        }
    };
    let terms = leases.iter().map(|(issued, term)| (issued.what.as_str(), term)).chain([(TOKEN, &token)]);
    troubles.extend(terms.filter_map(|(what, term)| term.as_ref()?.over(what)));
    let revoking = async {
        // With a token of ours go the leases that were issued to it.
        if session.is_ours() {
            return session.revoke().await.err().into_iter().collect::<Vec<_>>();
        }
        let mut errors = Vec::new();
        for (issued, _) in &leases {
            errors.extend(session.revoke_lease(&issued.id).await.err());
        }
        errors
    };
    match tokio::time::timeout(REVOKE_LIMIT, revoking).await {
        Ok(errors) => troubles.extend(errors.iter().map(|error| format!("give credentials back: {error}"))),
        Err(_) => {
            let limit = REVOKE_LIMIT.as_secs();
            troubles.push(format!("give credentials back: the vault has not done it within {limit} s"));
        }
    }
    troubles
}

/// A secret as it is now: read again when three quarters of its term are over and it has not been renewed.
async fn current(
    session: &Session,
    leases: &mut Leases,
    source: &VaultSource,
    again: bool,
) -> Result<Current, VaultError> {
    let what = source.place();
    let now = Instant::now();
    let last = leases.iter().rev().find(|(issued, _)| issued.what == what);
    match last.and_then(|(_, term)| term.as_ref()) {
        Some(Term { lease, .. }) if lease.until > now + lease.ttl / 4 => {
            return Ok(Current::Kept(Some(lease.until)));
        }
        None if !again => return Ok(Current::Kept(None)),
        _ => {}
    }
    let Read { fields, lease } = session.read(source).await?;
    // What is over needs no giving back, and what has a successor no renewing.
    leases.retain(|(issued, term)| {
        issued.what != what || term.as_ref().is_none_or(|term| term.lease.until > now)
    });
    for (issued, term) in leases.iter_mut() {
        if let (true, Some(term)) = (issued.what == what, term) {
            (term.lease.renewable, term.followed) = (false, true);
        }
    }
    let until = lease.as_ref().map(|(_, lease)| lease.until);
    if let Some((id, lease)) = lease {
        leases.push((Issued { what, id, lease }, Some(Term::new(lease))));
    }
    Ok(Current::Read(fields, until))
}

/// Takes note of a renewal.
fn settle(
    term: &mut Option<Term>,
    renewed: Result<Option<Lease>, VaultError>,
    what: &str,
    troubles: &mut Vec<String>,
) {
    let Some(current) = term else { return };
    match renewed {
        Ok(Some(lease)) if lease.until > Instant::now() + PAUSE => *current = Term::new(lease),
        // Its longest term is nearly over, and nothing makes it longer.
        Ok(Some(lease)) => {
            *current = Term::new(Lease { renewable: false, ..lease });
        }
        Ok(None) => *term = None,
        Err(error) => {
            let left = current.lease.until.saturating_duration_since(Instant::now());
            if !current.failing && troubles.len() < MAX_TROUBLES {
                current.failing = true;
                troubles.push(format!("renew {what}, which is good for {} s more: {error}", left.as_secs()));
            }
            if left.is_zero() {
                *term = None;
            } else {
                current.next = Instant::now() + (left / 4).max(PAUSE);
            }
        }
    }
}
