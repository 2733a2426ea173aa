//! Ports of this host that lead into a sandbox.

use std::sync::Arc;
use std::time::Duration;

use chitin_broker::egress::{TransferCounts, TransferLimits, splice};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};

use crate::session::Session;

/// Most connections at once on one port: a quarter of the streams of a sandbox, so that some are
/// left for commands and files.
const MAX_CONNECTIONS: usize = 64;

/// The delay after a failed accept, which most likely lacked descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// A port of this host that leads to a port of a sandbox. Dropping it closes the port and its
/// connections.
#[derive(Debug)]
pub struct Forward {
    task: JoinHandle<()>,
}

impl Forward {
    pub(crate) fn new(session: Arc<Session>, listener: TcpListener, port: u16) -> Forward {
        Forward { task: tokio::spawn(accept_connections(session, listener, port)) }
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept_connections(session: Arc<Session>, listener: TcpListener, port: u16) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    // Dropped with this task, which ends the connections.
    let mut connections = JoinSet::new();
    while let Ok(permit) = permits.clone().acquire_owned().await {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = session.channel.wait_until_closed() => return,
        };
        while connections.try_join_next().is_some() {}
        let Ok((client, _)) = accepted else {
            tokio::time::sleep(ACCEPT_RETRY).await;
            continue;
        };
        let session = session.clone();
        connections.spawn(async move {
            forward_connection(&session, client, port).await;
            drop(permit);
        });
    }
}

async fn forward_connection(session: &Session, mut client: TcpStream, port: u16) {
    let _ = client.set_nodelay(true);
    let spliced = match session.connect_port(port).await {
        Ok(tunnel) => {
            splice(tunnel, &mut client, &TransferLimits::default(), &TransferCounts::default())
                .await
                .is_ok()
        }
        // No process listens on the port in the sandbox, or not yet: the client is reset, as by any
        // host, but later.
        Err(_) => false,
    };
    if !spliced {
        let _ = rustix::net::sockopt::set_socket_linger(&client, Some(Duration::ZERO));
    }
}
