//! Files in and out: a tree on a stream, written and read by `chitin-tree` at both ends.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use chitin_protocol::{Failure, ToGuest};
use chitin_tree::Summary;
use tokio_util::io::SyncIoBridge;

use crate::Error;
use crate::session::{Answer, Session};

/// The most entries of one copy out. A hostile guest could name empty files for ever; each costs an inode here.
const MAX_ENTRIES: u64 = 1_000_000;

#[tracing::instrument(level = "debug", skip_all, fields(?source, ?target))]
pub(crate) async fn copy_in(
    session: &Session,
    source: &Path,
    target: &Path,
) -> Result<Summary, Error> {
    let stream = session.channel.open_writer().ok_or(Error::TooManyStreams)?;
    let request = session.channel.name();
    let put =
        ToGuest::Put { request, path: target.as_os_str().as_bytes().into(), stream: stream.id() };
    let answer = session.ask(request, &put)?;
    let root = source.to_owned();
    let sending = tokio::task::spawn_blocking(move || {
        let mut bridge = SyncIoBridge::new(stream);
        let sent = chitin_tree::send(&root, &mut bridge, &chitin_tree::SendOptions::host());
        let stream = bridge.into_inner();
        if sent.is_err() {
            // An end would make half a tree look whole.
            stream.abort();
        }
        sent
    });
    let sent = finished(sending).await;
    let answer = answered(session, answer).await?;
    let what = || format!("{} to {}", source.display(), target.display());
    match (sent, answer) {
        // When the agent refuses, sending breaks off too: the agent's reason is the cause.
        (Err(error), Err(_)) if !error.is_broken_stream() => {
            Err(Error::Copy { direction: "in", what: what(), source: error })
        }
        (_, Err(failure)) => Err(Error::Guest(failure)),
        (Err(error), Ok(())) => Err(Error::Copy { direction: "in", what: what(), source: error }),
        (Ok(summary), Ok(())) => Ok(summary),
    }
}

#[tracing::instrument(level = "debug", skip_all, fields(?source, ?target))]
pub(crate) async fn copy_out(
    session: &Session,
    source: &Path,
    target: &Path,
) -> Result<Summary, Error> {
    let stream = session.channel.open_reader().ok_or(Error::TooManyStreams)?;
    let request = session.channel.name();
    let get =
        ToGuest::Get { request, path: source.as_os_str().as_bytes().into(), stream: stream.id() };
    let answer = session.ask(request, &get)?;
    let dest = target.to_owned();
    // A guest's files live in its memory: more than that is a lie told with sparse or endless files.
    let options = chitin_tree::ReceiveOptions::host(session.memory_bytes, MAX_ENTRIES);
    let receiving = tokio::task::spawn_blocking(move || {
        let mut bridge = SyncIoBridge::new(stream);
        chitin_tree::receive(&mut bridge, &dest, &options)
    });
    let received = finished(receiving).await;
    let answer = answered(session, answer).await?;
    let what = || format!("{} to {}", source.display(), target.display());
    match (received, answer) {
        (Err(error), _) if !error.is_broken_stream() => {
            Err(Error::Copy { direction: "out", what: what(), source: error })
        }
        (_, Err(failure)) => Err(Error::Guest(failure)),
        (Err(error), Ok(())) => Err(Error::Copy { direction: "out", what: what(), source: error }),
        (Ok(summary), Ok(())) if summary.refused > 0 => Err(Error::LinksRefused {
            what: what(),
            count: summary.refused,
            examples: summary.refused_examples,
        }),
        (Ok(summary), Ok(())) => Ok(summary),
    }
}

/// What the agent says of a copy; an error is that of the channel.
async fn answered(session: &Session, answer: Answer) -> Result<Result<(), Failure>, Error> {
    match answer.await {
        Ok(answer) => Ok(answer),
        Err(_) => Err(session.why_closed().await),
    }
}

async fn finished(
    copying: tokio::task::JoinHandle<Result<Summary, chitin_tree::Error>>,
) -> Result<Summary, chitin_tree::Error> {
    match copying.await {
        Ok(result) => result,
        // The task is never aborted, so it panicked: so do we, with its message.
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}
