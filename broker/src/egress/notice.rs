//! Notices about refused egress, for the user who started the sandbox: inside, a refusal looks like a
//! broken network.

use std::collections::HashSet;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use chitin_text::printable;

use crate::token_bucket::TokenBucket;

/// Notices at once, and seconds until there may be another one: a sandbox must not be able to fill
/// a terminal.
const BURST: f64 = 20.0;
const SECONDS_PER_NOTICE: f64 = 60.0;

/// Maximum number of distinct refusals that are remembered. Further ones are not reported.
const MAX_REFUSALS: usize = 1024;

/// A refusal of egress that has not been reported before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RefusedEgress {
    /// The requested name, which is untrusted text.
    pub host: String,
    /// The port, unless the name was only resolved.
    pub port: Option<u16>,
    /// Cause.
    pub reason: String,
    /// Remedy, if there is one that the cause does not name.
    pub remedy: Option<&'static str>,
    /// The number of distinct refusals since the last report that were too many to report.
    pub omitted: u64,
}

impl fmt::Display for RefusedEgress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "egress to {}", printable(&self.host))?;
        if let Some(port) = self.port {
            write!(f, ":{port}")?;
        }
        write!(f, " was refused: {}", printable(&self.reason))?;
        if let Some(remedy) = self.remedy {
            write!(f, " ({remedy})")?;
        }
        match self.omitted {
            0 => Ok(()),
            omitted => write!(f, "; {omitted} other refusals were not reported"),
        }
    }
}

/// A function that is called for each distinct refusal, at a limited rate. It must not block.
#[derive(Clone)]
pub struct RefusalObserver(Arc<dyn Fn(RefusedEgress) + Send + Sync>);

impl RefusalObserver {
    /// Makes an observer of a function.
    pub fn new(observe: impl Fn(RefusedEgress) + Send + Sync + 'static) -> RefusalObserver {
        RefusalObserver(Arc::new(observe))
    }
}

impl fmt::Debug for RefusalObserver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RefusalObserver")
    }
}

/// Reports the distinct refusals of one sandbox.
#[derive(Debug)]
pub(crate) struct RefusalNotices {
    observer: RefusalObserver,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    known: HashSet<(String, Option<u16>, String)>,
    bucket: TokenBucket,
    omitted: u64,
}

impl RefusalNotices {
    pub fn new(observer: RefusalObserver) -> RefusalNotices {
        let bucket = TokenBucket::new(1.0 / SECONDS_PER_NOTICE, BURST);
        let state = State { known: HashSet::new(), bucket, omitted: 0 };
        RefusalNotices { observer, state: Mutex::new(state) }
    }

    /// Reports a refusal, unless it is known or there are too many.
    pub fn report(
        &self,
        host: &str,
        port: Option<u16>,
        reason: &str,
        remedy: Option<&'static str>,
    ) {
        let omitted = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            let key = (host.to_owned(), port, reason.to_owned());
            if state.known.len() >= MAX_REFUSALS || !state.known.insert(key) {
                return;
            }
            if !state.bucket.try_take() {
                state.omitted += 1;
                return;
            }
            std::mem::take(&mut state.omitted)
        };
        (self.observer.0)(RefusedEgress {
            host: host.to_owned(),
            port,
            reason: reason.to_owned(),
            remedy,
            omitted,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn collect() -> (RefusalNotices, Arc<Mutex<Vec<String>>>) {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let sink = lines.clone();
        let observer =
            RefusalObserver::new(move |refused| sink.lock().unwrap().push(refused.to_string()));
        (RefusalNotices::new(observer), lines)
    }

    #[test]
    fn distinct_refusal_is_reported_once() {
        let (notices, lines) = collect();
        for _ in 0..3 {
            notices.report("a\u{1b}[2J.test", Some(80), "no", Some("say yes"));
        }
        notices.report("a\u{1b}[2J.test", Some(81), "no", None);
        assert_eq!(
            *lines.lock().unwrap(),
            [
                "egress to a\\u{1b}[2J.test:80 was refused: no (say yes)",
                "egress to a\\u{1b}[2J.test:81 was refused: no",
            ]
        );
    }

    #[test]
    fn refusals_beyond_the_burst_are_counted() {
        let (notices, lines) = collect();
        for number in 0..5000 {
            notices.report(&format!("{number}.test"), None, "no", None);
        }
        assert_eq!(lines.lock().unwrap().len(), 20);
        let state = notices.state.lock().unwrap();
        assert_eq!((state.omitted, state.known.len()), (MAX_REFUSALS as u64 - 20, MAX_REFUSALS));
    }
}
