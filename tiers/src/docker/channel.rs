//! The channel of a container: its standard input and output, through the daemon.

use std::sync::{Arc, Mutex, PoisonError};

use bollard::container::{AttachContainerResults, LogOutput};
use chitin_text::error_chain;
use futures_util::StreamExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::container::Log;

/// Bytes of one read from the channel, the capacity of its socket.
const CHUNK: usize = 64 * 1024;

/// Copies the bytes of the channel until one of its ends has closed.
pub(super) async fn copy_both_ways(
    attached: AttachContainerResults,
    stream: UnixStream,
    log: Log,
    broken: Arc<Mutex<Option<String>>>,
) {
    let AttachContainerResults { mut output, mut input } = attached;
    let (mut from_host, mut to_host) = stream.into_split();
    let to_host_task = async {
        while let Some(message) = output.next().await {
            match message {
                Ok(LogOutput::StdOut { message } | LogOutput::Console { message }) => {
                    if to_host.write_all(&message).await.is_err() {
                        return;
                    }
                }
                Ok(LogOutput::StdErr { message }) => log.push(&message),
                Ok(LogOutput::StdIn { .. }) => {}
                Err(error) => {
                    *broken.lock().unwrap_or_else(PoisonError::into_inner) =
                        Some(error_chain(&error));
                    return;
                }
            }
        }
    };
    let to_container_task = async {
        let mut chunk = vec![0; CHUNK];
        while let Ok(count) = from_host.read(&mut chunk).await
            && count > 0
        {
            if input.write_all(&chunk[..count]).await.is_err() || input.flush().await.is_err() {
                // The other direction may still deliver the cause.
                std::future::pending::<()>().await;
            }
        }
        let _ = input.shutdown().await;
    };
    tokio::select! {
        () = to_host_task => {}
        () = to_container_task => {}
    }
}
