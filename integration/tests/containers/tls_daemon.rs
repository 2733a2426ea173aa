//! Remote daemons: TLS as Docker's client does it, and addresses that are refused.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use chitin::TierKind;
use chitin_integration::{Chitin, TierUnderTest};
use rcgen::CertifiedKey;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection, StreamOwned};
use tempfile::TempDir;

use crate::fake_daemon::{Failure, State, Step};

const TIER: TierUnderTest = TierUnderTest::new(TierKind::Nemoclaw);

/// A daemon on a TCP port of this host that accepts TLS only, with a client certificate.
struct TlsDaemon {
    port: u16,
    /// `ca.pem`, `cert.pem` and `key.pem` for its clients.
    certs: TempDir,
    /// The number of connections with a complete handshake.
    accepted: Arc<AtomicUsize>,
}

fn make_key() -> CertifiedKey<rcgen::KeyPair> {
    rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).unwrap()
}

fn start_tls_daemon() -> TlsDaemon {
    let (server, client) = (make_key(), make_key());
    let certs = tempfile::tempdir().unwrap();
    fs::write(certs.path().join("ca.pem"), server.cert.pem()).unwrap();
    fs::write(certs.path().join("cert.pem"), client.cert.pem()).unwrap();
    fs::write(certs.path().join("key.pem"), client.signing_key.serialize_pem()).unwrap();

    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut clients = RootCertStore::empty();
    clients.add(client.cert.der().clone()).unwrap();
    let verifier = WebPkiClientVerifier::builder_with_provider(clients.into(), provider.clone());
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(server.signing_key.serialize_der()));
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier.build().unwrap())
        .with_single_cert(vec![server.cert.der().clone()], key)
        .unwrap();
    let (config, accepted) = (Arc::new(config), Arc::new(AtomicUsize::new(0)));
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let (state, count) = (Arc::new(State::new(Step::Create, Failure::Reset)), accepted.clone());
    thread::spawn(move || {
        for mut socket in listener.incoming().flatten() {
            let mut connection = ServerConnection::new(config.clone()).unwrap();
            let (state, count) = (state.clone(), count.clone());
            thread::spawn(move || {
                while connection.is_handshaking() {
                    connection.complete_io(&mut socket)?;
                }
                count.fetch_add(1, Ordering::SeqCst);
                state.serve(StreamOwned::new(connection, socket))
            });
        }
    });
    TlsDaemon { port, certs, accepted }
}

impl TlsDaemon {
    fn run(&self) -> Chitin {
        let host = format!("tcp://127.0.0.1:{}", self.port);
        TIER.run("true").env("DOCKER_HOST", host)
    }

    fn accepted(&self) -> usize {
        self.accepted.load(Ordering::SeqCst)
    }
}

mod nemoclaw {
    use super::*;

    #[test]
    fn tls_daemon_is_used_with_its_certificates() {
        let daemon = start_tls_daemon();
        let certs = daemon.certs.path();
        let run = daemon.run().env("DOCKER_TLS_VERIFY", "1").env("DOCKER_CERT_PATH", certs);
        // It follows the API up to the creation of the container.
        run.outcome().assert_refused("start a container with Docker");
        assert!(daemon.accepted() >= 2, "version and create: {}", daemon.accepted());
    }

    #[test]
    fn tls_daemon_is_verified_and_never_plain() {
        let daemon = start_tls_daemon();
        let other = start_tls_daemon();
        // The certificates of another daemon.
        let certs = other.certs.path();
        let run = daemon.run().env("DOCKER_TLS_VERIFY", "1").env("DOCKER_CERT_PATH", certs);
        run.outcome().assert_refused("no Docker daemon answers");
        let incomplete = tempfile::tempdir().unwrap();
        let run = daemon.run().env("DOCKER_TLS_VERIFY", "1");
        run.env("DOCKER_CERT_PATH", incomplete.path()).outcome().assert_refused("ca.pem");
        daemon.run().env("DOCKER_TLS", "1").outcome().assert_refused("without verification");
        // Without TLS, the daemon does not accept the connection.
        daemon.run().outcome().assert_refused("no Docker daemon answers");
        assert_eq!(daemon.accepted(), 0);
    }

    #[test]
    fn plain_or_unknown_address_is_refused() {
        for (host, words) in [
            ("tcp://build.invalid:2375", "DOCKER_TLS_VERIFY"),
            ("http://192.0.2.1:2375", "plain text"),
            ("ssh://me@build.invalid", "ssh -NL"),
            ("fd://", "DOCKER_HOST"),
            ("npipe:////./pipe/docker_engine", "Windows"),
        ] {
            TIER.run("true").env("DOCKER_HOST", host).outcome().assert_refused(words);
        }
        let config = tempfile::tempdir().unwrap();
        fs::write(config.path().join("config.json"), r#"{"currentContext":"gone"}"#).unwrap();
        let run = TIER.run("true").env("DOCKER_HOST", "").env("DOCKER_CONFIG", config.path());
        run.outcome().assert_refused("context gone does not exist");
    }
}
