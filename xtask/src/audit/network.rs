//! A network namespace that leads nowhere, with the address of a metadata service in it.

use std::fs;
use std::io;
use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};

use crate::process::{capture_output, new_command};

/// The address of metadata services of clouds. Here it belongs to an interface whose other end is beside it.
const METADATA: &str = "169.254.169.254";

/// The namespace and its server. Dropping it removes both.
pub struct IsolatedNetwork {
    name: String,
    stop: Option<mpsc::Sender<()>>,
    server: Option<JoinHandle<()>>,
}

impl IsolatedNetwork {
    /// Creates the namespace and starts the server.
    pub fn create() -> Result<Self> {
        let name = format!("chitin-audit-{}", std::process::id());
        capture_output(&mut new_command("ip", ["netns", "add", &name]))
            .context("create a network namespace: this needs root and iproute2")?;
        let mut network = Self { name, stop: None, server: None };
        for words in [
            &["link", "set", "lo", "up"][..],
            &["link", "add", "chitin0", "type", "veth", "peer", "name", "chitin1"],
            &["addr", "add", &format!("{METADATA}/32"), "dev", "chitin0"],
            &["link", "set", "chitin0", "up"],
            &["link", "set", "chitin1", "up"],
        ] {
            let all = ["-n", &network.name].into_iter().chain(words.iter().copied());
            capture_output(&mut new_command("ip", all))?;
        }
        network.start_server()?;
        Ok(network)
    }

    /// Returns the file of the namespace.
    pub fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }

    /// Listens in the namespace, on a thread that enters it.
    fn start_server(&mut self) -> Result<()> {
        let namespace = fs::File::open(self.path()).context("open the network namespace")?;
        let (stop, stopped) = mpsc::channel::<()>();
        let (report, bound) = mpsc::channel::<io::Result<()>>();
        self.server = Some(thread::spawn(move || {
            let listening = rustix::thread::move_into_link_name_space(
                std::os::fd::AsFd::as_fd(&namespace),
                Some(rustix::thread::LinkNameSpaceType::Network),
            )
            .map_err(io::Error::from)
            .and_then(|()| TcpListener::bind((METADATA, 80)));
            // The kernel accepts connections as long as the listener exists.
            let (result, listener) = match listening {
                Ok(listener) => (Ok(()), Some(listener)),
                Err(error) => (Err(error), None),
            };
            let _ = report.send(result);
            let _ = stopped.recv();
            drop(listener);
        }));
        self.stop = Some(stop);
        bound.recv().context("start the server")?.context("listen in the network namespace")
    }
}

impl Drop for IsolatedNetwork {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(server) = self.server.take() {
            let _ = server.join();
        }
        let removed = capture_output(&mut new_command("ip", ["netns", "delete", &self.name]));
        if let Err(error) = removed {
            eprintln!("xtask: remove the network namespace {}: {error:#}", self.name);
        }
    }
}
