//! The other way: ports of this host that lead into a sandbox.

use std::sync::Arc;
use std::time::Duration;

use chitin_broker::egress::{Allowance, Counts, splice};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};

use crate::session::Session;

/// Connections at once on one port: a quarter of the streams that a sandbox has, so that commands and files find some left.
const MAX_CONNECTIONS: usize = 64;

/// How long to wait when accepting fails, for want of descriptors most likely.
const PAUSE: Duration = Duration::from_millis(100);

/// A port of this host that leads to one of a sandbox. Dropping it closes the port and what goes through it.
#[derive(Debug)]
pub struct Forward {
    task: JoinHandle<()>,
}

impl Forward {
    pub(crate) fn new(session: Arc<Session>, listener: TcpListener, port: u16) -> Forward {
        Forward { task: tokio::spawn(accept(session, listener, port)) }
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept(session: Arc<Session>, listener: TcpListener, port: u16) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    // Dropped with this task, and with it what runs.
    let mut connections = JoinSet::new();
    while let Ok(permit) = room.clone().acquire_owned().await {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = session.channel.closed() => return,
        };
        while connections.try_join_next().is_some() {}
        let Ok((client, _)) = accepted else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let session = session.clone();
        connections.spawn(async move {
            serve(&session, client, port).await;
            drop(permit);
        });
    }
}

async fn serve(session: &Session, mut client: TcpStream, port: u16) {
    let _ = client.set_nodelay(true);
    let spliced = match session.connect(port).await {
        Ok(tunnel) => {
            splice(tunnel, &mut client, &Allowance::default(), &Counts::default()).await.is_ok()
        }
        // Nobody serves the port in the sandbox, or not yet: as on any host, but later.
        Err(_) => false,
    };
    if !spliced {
        let _ = rustix::net::sockopt::set_socket_linger(&client, Some(Duration::ZERO));
    }
}
