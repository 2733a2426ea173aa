//! Keeps what a vault has issued alive as long as its sandbox lives, and gives it back then.
//!
//! ```text
//!   start ──▶ waiting ──two thirds of a term──▶ renewing ──▶ waiting          a failure is tried again until the term is over
//!                └──── end, drop ──▶ revoking ──▶ ended
//! ```

use std::fmt;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::vault::{Lease, Session, VaultError};

/// How long giving everything back may take. What is not given back by then ends with its term.
const REVOKE_LIMIT: Duration = Duration::from_secs(10);

/// Between two attempts to renew, at least: a vault that is gone is not to be hammered.
const PAUSE: Duration = Duration::from_secs(1);

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
    stop: oneshot::Sender<()>,
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
        Keeper { stop, task: tokio::spawn(keep(session, issued, stopped)) }
    }

    /// Gives everything back. What went wrong, then or before, a line each.
    pub async fn end(self) -> Vec<String> {
        drop(self.stop);
        self.task.await.unwrap_or_default()
    }
}

/// One thing to be renewed.
#[derive(Debug)]
struct Term {
    lease: Lease,
    next: Instant,
    /// Said once, and again when it has worked in between.
    failing: bool,
}

impl Term {
    fn new(lease: Lease) -> Term {
        Term { next: when(&lease), lease, failing: false }
    }

    fn due(term: &Option<Term>) -> Option<Instant> {
        term.as_ref().filter(|term| term.lease.renewable).map(|term| term.next)
    }
}

/// When to renew: early enough for a few attempts.
fn when(lease: &Lease) -> Instant {
    lease.until - lease.ttl / 3
}

async fn keep(mut session: Session, issued: Vec<Issued>, mut stopped: oneshot::Receiver<()>) -> Vec<String> {
    let mut troubles = Vec::new();
    let mut token = session.lease.map(Term::new);
    let mut leases: Vec<(Issued, Option<Term>)> = issued
        .into_iter()
        .map(|issued| (Term::new(issued.lease), issued))
        .map(|(term, issued)| (issued, Some(term)))
        .collect();
    loop {
        let dues = leases.iter().map(|(_, term)| term).chain([&token]);
        let Some(next) = dues.filter_map(Term::due).min() else {
            let _ = (&mut stopped).await;
            break;
        };
        tokio::select! {
            _ = &mut stopped => break,
            () = tokio::time::sleep_until(next) => {}
        }
        let now = Instant::now();
        if Term::due(&token).is_some_and(|due| due <= now) {
            let renewed = session.renew().await.map(|()| session.lease);
            settle(&mut token, renewed, "the vault's token", &mut troubles);
        }
        for (issued, term) in &mut leases {
            if let Some(due) = Term::due(term)
                && due <= now
            {
                let renewed = session.renew_lease(&issued.id, issued.lease).await;
                settle(term, renewed, &issued.what, &mut troubles);
            }
        }
    }
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
            *current = Term { lease: Lease { renewable: false, ..lease }, next: lease.until, failing: false }
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
