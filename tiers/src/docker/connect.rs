//! The connection to a daemon: a Unix socket, TCP on this host, or TLS with the files of Docker's
//! client.

use std::io::{self, BufReader};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bollard::{API_DEFAULT_VERSION, BollardRequest, Docker};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};

use super::endpoint::{DaemonEndpoint, TlsFiles};

/// Time limit of the head of a response, in seconds. Each call has a shorter one in addition.
const RESPONSE_LIMIT: u64 = 120;

/// The reason why no connection can be set up.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectError {
    #[error(transparent)]
    Client(#[from] bollard::errors::Error),
    #[error("read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}: no PEM certificate or key", path.display())]
    Pem { path: PathBuf },
    #[error("the certificates of Docker's client cannot be used")]
    Certificates(#[from] rustls::Error),
}

/// Returns a client of the daemon. Nothing is connected yet.
pub(super) fn open_client(endpoint: &DaemonEndpoint) -> Result<Docker, ConnectError> {
    Ok(match endpoint {
        DaemonEndpoint::Socket(path) => {
            let path = path.to_string_lossy();
            Docker::connect_with_unix(&path, RESPONSE_LIMIT, API_DEFAULT_VERSION)?
        }
        DaemonEndpoint::Plaintext(authority) => {
            let address = format!("tcp://{authority}");
            Docker::connect_with_http(&address, RESPONSE_LIMIT, API_DEFAULT_VERSION)?
        }
        DaemonEndpoint::Tls(authority, files) => open_tls_client(authority, files)?,
    })
}

fn open_tls_client(authority: &str, files: &TlsFiles) -> Result<Docker, ConnectError> {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    let connector = HttpsConnector::from((tcp, read_tls_config(files)?));
    let mut builder = Client::builder(TokioExecutor::new());
    builder.pool_max_idle_per_host(0);
    let client = Arc::new(builder.build(connector));
    let transport = move |request: BollardRequest| {
        let client = client.clone();
        async move { client.request(request).await.map_err(bollard::errors::Error::from) }
    };
    let address = Some(format!("https://{authority}"));
    let docker = Docker::connect_with_custom_transport(
        transport,
        address,
        RESPONSE_LIMIT,
        API_DEFAULT_VERSION,
    );
    Ok(docker?)
}

/// Reads the files of Docker's client. `ca.pem` replaces the certificate authorities of this host.
fn read_tls_config(files: &TlsFiles) -> Result<ClientConfig, ConnectError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder =
        ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let existing = |name: &str| {
        let path = files.0.as_ref()?.join(name);
        path.exists().then_some(path)
    };
    let mut roots = RootCertStore::empty();
    match (existing("ca.pem"), &files.0) {
        (Some(path), _) => {
            for certificate in read_certificates(&path)? {
                roots.add(certificate)?;
            }
        }
        (None, Some(dir)) => {
            let source = io::ErrorKind::NotFound.into();
            return Err(ConnectError::Read { path: dir.join("ca.pem"), source });
        }
        (None, None) => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    let builder = builder.with_root_certificates(roots);
    Ok(match (existing("cert.pem"), existing("key.pem")) {
        (None, None) => builder.with_no_client_auth(),
        (cert, key) => {
            let dir = files.0.clone().unwrap_or_default();
            let (cert, key) = (
                cert.unwrap_or_else(|| dir.join("cert.pem")),
                key.unwrap_or_else(|| dir.join("key.pem")),
            );
            builder.with_client_auth_cert(read_certificates(&cert)?, read_key(&key)?)?
        }
    })
}

fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, ConnectError> {
    let read = open_file(path)?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_reader_iter(read).collect();
    match certificates {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        _ => Err(ConnectError::Pem { path: path.into() }),
    }
}

fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>, ConnectError> {
    PrivateKeyDer::from_pem_reader(open_file(path)?)
        .map_err(|_| ConnectError::Pem { path: path.into() })
}

fn open_file(path: &Path) -> Result<BufReader<std::fs::File>, ConnectError> {
    let opened = std::fs::File::open(path);
    opened.map(BufReader::new).map_err(|source| ConnectError::Read { path: path.into(), source })
}
