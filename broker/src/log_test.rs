//! A proof that no value of a credential is logged, at any level.

use std::io;
use std::sync::{Arc, Mutex};

use chitin_spec::SecretSpec;
use tokio_util::task::TaskTracker;
use tracing::subscriber::DefaultGuard;
use tracing_subscriber::filter::{LevelFilter, filter_fn};
use tracing_subscriber::fmt::format::FmtSpan;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::registry;

use crate::credentials::{CredentialSpec, fetch_credentials};

const CANARY: &str = "canary-2b7f0c91";

/// The log of one test.
pub struct LogCapture {
    buffer: Buffer,
    _guard: DefaultGuard,
}

#[derive(Clone, Default)]
struct Buffer(Arc<Mutex<Vec<u8>>>);

impl io::Write for Buffer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl LogCapture {
    /// Captures everything that Chitin's crates log on this thread, as the CLI prints it.
    pub fn start() -> LogCapture {
        let buffer = Buffer::default();
        let writer = buffer.clone();
        let lines = tracing_subscriber::fmt::layer()
            .with_writer(move || writer.clone())
            .with_span_events(FmtSpan::FULL)
            .with_filter(filter_fn(|event| event.target().starts_with("chitin")))
            .with_filter(LevelFilter::TRACE);
        let guard = tracing::subscriber::set_default(registry().with(lines));
        LogCapture { buffer, _guard: guard }
    }

    /// Asserts that the log has these words, and none of these values.
    #[track_caller]
    pub fn assert(&self, words: &[&str], values: &[&str]) {
        let text = String::from_utf8(self.buffer.0.lock().unwrap().clone()).unwrap();
        for word in words {
            assert!(text.contains(word), "no `{word}` in:\n{text}");
        }
        for value in values {
            assert!(!text.contains(value), "`{value}` in:\n{text}");
        }
    }
}

#[tokio::test]
async fn fetched_values_are_not_logged() {
    let log = LogCapture::start();
    let dir = tempfile::tempdir().unwrap();
    let (value, keys) = (dir.path().join("value"), dir.path().join("keys"));
    std::fs::write(&value, CANARY).unwrap();
    let pair = format!(r#"{{"AccessKeyId":"ASIA-{CANARY}","SecretAccessKey":"{CANARY}"}}"#);
    std::fs::write(&keys, pair).unwrap();
    let file = |name: &str, path: &std::path::Path, hosts: &str| {
        format!("{name}=file:{}{hosts}", path.display()).parse::<SecretSpec>().unwrap()
    };
    let mut secrets = vec![
        file("MEMORY", &value, ""),
        file("ENV", &value, ""),
        file("AWS", &keys, ""),
        file("PROXY", &value, "@api.test"),
        format!("EXEC=exec:echo {CANARY}").parse().unwrap(),
    ];
    secrets[1].delivery = chitin_spec::Delivery::Env;
    secrets[2].delivery = chitin_spec::Delivery::Endpoint;
    let fetched =
        fetch_credentials(&secrets, &CredentialSpec::default(), &TaskTracker::new()).await.unwrap();
    // Three values, a placeholder, and four variables for AWS SDKs.
    assert_eq!(fetched.values.len(), 8);
    fetched.revoke().await;
    let words = ["name=\"PROXY\"", "source=\"exec\"", "delivery=\"endpoint\"", "credentials{"];
    log.assert(&words, &[CANARY]);
}

#[tokio::test]
async fn values_of_a_failed_fetch_are_not_logged() {
    let log = LogCapture::start();
    let secrets = [format!("A=exec:echo {CANARY}; exit 3").parse().unwrap()];
    let spec = CredentialSpec::default();
    assert!(fetch_credentials(&secrets, &spec, &TaskTracker::new()).await.is_err());
    log.assert(&["credentials{"], &[CANARY]);
}
