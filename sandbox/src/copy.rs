//! Copies of files into and out of a sandbox: a tree on a stream, written and read by `chitin-tree`
//! at both ends.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use chitin_protocol::ToGuest;
use chitin_tree::Summary;
use tokio::task::JoinHandle;
use tokio_util::io::SyncIoBridge;

use crate::error::{CopyDirection, Error};
use crate::session::Session;

/// Most entries of one copy out. A hostile guest could send empty files without end; each costs an
/// inode on the host.
const MAX_ENTRIES: u64 = 1_000_000;

#[tracing::instrument(level = "debug", skip_all, fields(?source, ?target))]
pub(crate) async fn copy_in(
    session: &Session,
    source: &Path,
    target: &Path,
) -> Result<Summary, Error> {
    let stream = session.channel.open_writer().ok_or(Error::TooManyStreams)?;
    let request = session.channel.next_id();
    let path = target.as_os_str().as_bytes().into();
    let put = ToGuest::Put { request, path, stream: stream.id() };
    let reply = session.send_request(request, &put)?;
    let root = source.to_owned();
    let sending = tokio::task::spawn_blocking(move || {
        let mut bridge = SyncIoBridge::new(stream);
        let sent = chitin_tree::send(&root, &mut bridge, &chitin_tree::SendOptions::host());
        let stream = bridge.into_inner();
        if sent.is_err() {
            // An end of file would make half a tree look complete.
            stream.reset();
        }
        sent
    });
    let sent = join_copy(sending).await;
    let reply = session.receive_reply(reply).await?;
    let failed = |error| copy_error(CopyDirection::In, source, target, error);
    match (sent, reply) {
        // If the agent refuses, sending breaks off too: the agent's reason is the cause.
        (Err(error), Err(_)) if !error.is_broken_stream() => Err(failed(error)),
        (_, Err(failure)) => Err(Error::Guest(failure)),
        (Err(error), Ok(())) => Err(failed(error)),
        (Ok(summary), Ok(())) => Ok(summary),
    }
}

/// Checks that a file or directory could be copied out to `target`, before a sandbox is started.
///
/// # Errors
/// [`Error::CopyTarget`]: the parent directory is missing or read-only, or the existing entry is
/// neither a file nor a directory.
pub fn check_copy_target(target: impl AsRef<Path>) -> Result<(), Error> {
    let target = target.as_ref();
    chitin_tree::check_target(target)
        .map_err(|source| Error::CopyTarget { target: target.to_owned(), source })
}

#[tracing::instrument(level = "debug", skip_all, fields(?source, ?target))]
pub(crate) async fn copy_out(
    session: &Session,
    source: &Path,
    target: &Path,
) -> Result<Summary, Error> {
    let stream = session.channel.open_reader().ok_or(Error::TooManyStreams)?;
    let request = session.channel.next_id();
    let path = source.as_os_str().as_bytes().into();
    let get = ToGuest::Get { request, path, stream: stream.id() };
    let reply = session.send_request(request, &get)?;
    let root = target.to_owned();
    // A guest's files are in its memory. A larger tree can only be made of sparse or endless files.
    let options = chitin_tree::ReceiveOptions::host(session.memory_bytes, MAX_ENTRIES);
    let receiving = tokio::task::spawn_blocking(move || {
        let mut bridge = SyncIoBridge::new(stream);
        chitin_tree::receive(&mut bridge, &root, &options)
    });
    let received = join_copy(receiving).await;
    let reply = session.receive_reply(reply).await?;
    let failed = |error| copy_error(CopyDirection::Out, source, target, error);
    match (received, reply) {
        (Err(error), _) if !error.is_broken_stream() => Err(failed(error)),
        (_, Err(failure)) => Err(Error::Guest(failure)),
        (Err(error), Ok(())) => Err(failed(error)),
        (Ok(summary), Ok(())) if summary.refused > 0 => Err(Error::LinksRefused {
            from: source.to_owned(),
            to: target.to_owned(),
            summary: Box::new(summary),
        }),
        (Ok(summary), Ok(())) => Ok(summary),
    }
}

fn copy_error(
    direction: CopyDirection,
    from: &Path,
    to: &Path,
    source: chitin_tree::Error,
) -> Error {
    Error::Copy { direction, from: from.to_owned(), to: to.to_owned(), source }
}

async fn join_copy(
    copying: JoinHandle<Result<Summary, chitin_tree::Error>>,
) -> Result<Summary, chitin_tree::Error> {
    match copying.await {
        Ok(result) => result,
        // The task is never aborted, so it panicked: this task panics with the same message.
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}
