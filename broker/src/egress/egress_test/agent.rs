//! A test agent: it dials through a broker, with a resolver of fixed answers.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{
    AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf, ReadHalf, WriteHalf,
};
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};

use super::super::resolve::{Lookup, Resolve};
use super::super::{Broker, DialRequest, DialSource, EgressSpec, Ended};

/// Requests queued for the broker, as many as in a channel.
const MAX_WAITING: usize = 256;

/// Bytes in transit in a tunnel, each way.
const WINDOW: usize = 64 * 1024;

/// The sandbox's side of a connection. Like that of a channel, it is reset if it is dropped before
/// its shutdown.
#[derive(Debug)]
pub struct TestTunnel {
    inner: DuplexStream,
    /// The agent has reset it.
    reset: Arc<AtomicBool>,
    /// The broker has shut it down.
    ended: Arc<AtomicBool>,
}

impl AsyncRead for TestTunnel {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.inner).poll_read(cx, buf);
        let nothing = buf.filled().len() == before;
        if read.is_ready() && nothing && self.reset.load(Ordering::Relaxed) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        read
    }
}

impl AsyncWrite for TestTunnel {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.ended.store(true, Ordering::Relaxed);
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// The requests of an [`Agent`].
pub struct TestSource {
    requests: mpsc::Receiver<DialRequest<TestTunnel>>,
    missed: Arc<AtomicU64>,
    ended: watch::Receiver<bool>,
}

impl DialSource for TestSource {
    type Tunnel = TestTunnel;

    async fn next_request(&mut self) -> Option<DialRequest<TestTunnel>> {
        let mut ended = self.ended.clone();
        tokio::select! {
            request = self.requests.recv() => request,
            _ = ended.wait_for(|ended| *ended) => None,
        }
    }

    fn take_missed(&mut self) -> u64 {
        self.missed.swap(0, Ordering::Relaxed)
    }

    fn ended(&self) -> Ended {
        let mut ended = self.ended.clone();
        Box::pin(async move { drop(ended.wait_for(|ended| *ended).await) })
    }
}

/// The data received on a stream.
#[derive(Default)]
pub struct Inbox {
    pub data: Vec<u8>,
    pub ended: bool,
    pub reset: bool,
}

/// Streams by id, and a condition variable that is notified of every event.
#[derive(Default)]
pub struct Inboxes {
    streams: Mutex<HashMap<usize, Inbox>>,
    changed: Condvar,
}

/// The write half of a stream, the task that reads it, and the flag that resets it.
pub type Writer = (WriteHalf<DuplexStream>, tokio::task::JoinHandle<()>, Arc<AtomicBool>);

/// The agent of a guest that the test controls.
pub struct Agent {
    runtime: Handle,
    requests: mpsc::Sender<DialRequest<TestTunnel>>,
    missed: Arc<AtomicU64>,
    inboxes: Arc<Inboxes>,
    writers: HashMap<usize, Writer>,
    last: usize,
}

impl Agent {
    /// Requests a connection; returns the id of its stream.
    pub fn dial(&mut self, host: &str, port: u16) -> usize {
        self.last += 1;
        let stream = self.last;
        let (near, far) = tokio::io::duplex(WINDOW);
        let (reset, ended): (Arc<AtomicBool>, Arc<AtomicBool>) = Default::default();
        let tunnel = TestTunnel { inner: far, reset: reset.clone(), ended: ended.clone() };
        let (reader, writer) = tokio::io::split(near);
        self.inboxes.streams.lock().unwrap().insert(stream, Inbox::default());
        let reading = self.runtime.spawn(receive(reader, stream, self.inboxes.clone(), ended));
        self.writers.insert(stream, (writer, reading, reset));
        self.request(DialRequest::Dial { host: host.into(), port, tunnel });
        stream
    }

    /// Reports a name that the agent did not resolve.
    pub fn deny(&mut self, host: &str) {
        self.request(DialRequest::Denied { host: host.into() });
    }

    pub fn request(&self, request: DialRequest<TestTunnel>) {
        if self.requests.try_send(request).is_err() {
            self.missed.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Sends bytes, unless the stream is closed.
    pub fn write(&mut self, stream: usize, bytes: &[u8]) {
        let (writer, ..) = self.writers.get_mut(&stream).unwrap();
        let _ = self.runtime.block_on(writer.write_all(bytes));
    }

    /// Sends bytes, and shuts the stream down.
    pub fn send(&mut self, stream: usize, bytes: &[u8]) {
        self.write(stream, bytes);
        let (writer, ..) = self.writers.get_mut(&stream).unwrap();
        let _ = self.runtime.block_on(writer.shutdown());
    }

    /// Resets a stream.
    pub fn reset(&mut self, stream: usize) {
        let (writer, reading, reset) = self.writers.remove(&stream).unwrap();
        reset.store(true, Ordering::Relaxed);
        reading.abort();
        drop(writer);
    }

    /// Waits until the closure returns a value.
    pub fn wait_for<T>(&self, mut done: impl FnMut(&mut HashMap<usize, Inbox>) -> Option<T>) -> T {
        let mut streams = self.inboxes.streams.lock().unwrap();
        loop {
            if let Some(done) = done(&mut streams) {
                return done;
            }
            streams = self.inboxes.changed.wait(streams).unwrap();
        }
    }

    /// Waits for the end of a stream, and returns its data; `None` if it was reset.
    pub fn wait_for_end(&mut self, stream: usize) -> Option<Vec<u8>> {
        self.wait_for(|streams| {
            let inbox = streams.get_mut(&stream).unwrap();
            (inbox.ended || inbox.reset)
                .then(|| (!inbox.reset).then(|| std::mem::take(&mut inbox.data)))
        })
    }
}

pub async fn receive(
    mut reader: ReadHalf<DuplexStream>,
    stream: usize,
    inboxes: Arc<Inboxes>,
    ended: Arc<AtomicBool>,
) {
    let mut chunk = vec![0; 32 * 1024];
    loop {
        let count = reader.read(&mut chunk).await.unwrap_or(0);
        let mut streams = inboxes.streams.lock().unwrap();
        let inbox = streams.get_mut(&stream).unwrap();
        inbox.data.extend_from_slice(&chunk[..count]);
        if count == 0 {
            inbox.ended = ended.load(Ordering::Relaxed);
            inbox.reset = !inbox.ended;
        }
        inboxes.changed.notify_all();
        if count == 0 {
            return;
        }
    }
}

/// A resolver with fixed answers: the first lookup of a name returns its first answer, and so on.
#[derive(Debug, Default)]
pub struct FixedResolver {
    names: HashMap<&'static str, Vec<Vec<IpAddr>>>,
    asked: Mutex<HashMap<String, usize>>,
}

impl FixedResolver {
    pub fn new(names: &[(&'static str, &[&[&str]])]) -> Box<FixedResolver> {
        let parse =
            |answer: &&[&str]| answer.iter().map(|address| address.parse().unwrap()).collect();
        let names = names
            .iter()
            .map(|(name, answers)| (*name, answers.iter().map(parse).collect()))
            .collect();
        Box::new(FixedResolver { names, asked: Mutex::default() })
    }
}

impl Resolve for FixedResolver {
    fn resolve(&self, host: &str) -> Lookup<'_> {
        let mut asked = self.asked.lock().unwrap();
        let times = asked.entry(host.to_owned()).or_default();
        let answers = self.names.get(host).cloned();
        let turn = *times;
        *times += 1;
        Box::pin(async move {
            let mut answers = answers.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
            if answers.is_empty() {
                // The lookup never ends.
                std::future::pending::<()>().await;
            }
            Ok(answers.swap_remove(turn.min(answers.len() - 1)))
        })
    }
}

pub fn spec_allowing(endpoints: &[String]) -> EgressSpec {
    let mut spec = EgressSpec { allow_private: true, ..EgressSpec::default() };
    spec.allow_endpoints(endpoints.iter().map(|endpoint| endpoint.parse().unwrap()));
    spec
}

/// Runs the script against a broker; returns its result and the audit log.
pub async fn run_script<T: Send + 'static>(
    mut spec: EgressSpec,
    names: Box<FixedResolver>,
    script: impl FnOnce(&mut Agent) -> T + Send + 'static,
) -> (T, Vec<serde_json::Value>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("audit");
    spec.audit = Some(path.clone());
    let broker = make_broker(&spec, names);
    run_script_with(broker, &path, script).await
}

pub fn make_broker(spec: &EgressSpec, names: Box<FixedResolver>) -> Broker {
    Broker::with_resolver(spec, Arc::new(spec.open_audit().unwrap()), names)
}

pub async fn run_script_with<T: Send + 'static>(
    broker: Broker,
    audit: &Path,
    script: impl FnOnce(&mut Agent) -> T + Send + 'static,
) -> (T, Vec<serde_json::Value>) {
    let (requests, receiver) = mpsc::channel(MAX_WAITING);
    let (end, ended) = watch::channel(false);
    let missed: Arc<AtomicU64> = Arc::default();
    let source = TestSource { requests: receiver, missed: missed.clone(), ended };
    let serving = tokio::spawn(Arc::new(broker).serve(source));
    let runtime = Handle::current();
    let agent = tokio::task::spawn_blocking(move || {
        let (inboxes, writers) = Default::default();
        let mut agent = Agent { runtime, requests, missed, inboxes, writers, last: 0 };
        let outcome = script(&mut agent);
        (outcome, agent)
    });
    let limit = Duration::from_secs(20);
    let agent = tokio::time::timeout(limit, agent).await.expect("in time");
    let (outcome, agent) = agent.unwrap();
    end.send_replace(true);
    tokio::time::timeout(limit, serving).await.expect("in time").unwrap();
    drop(agent);
    (outcome, read_lines(audit))
}

pub fn read_lines(path: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

pub async fn bind_listener() -> (TcpListener, u16) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

/// Starts a server that echoes every connection; returns its port.
pub async fn start_echo_server() -> u16 {
    let (listener, port) = bind_listener().await;
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut from, mut to) = stream.split();
                let _ = tokio::io::copy(&mut from, &mut to).await;
                let _ = to.shutdown().await;
            });
        }
    });
    port
}
