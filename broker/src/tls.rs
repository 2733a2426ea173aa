//! TLS as it is done here: rustls with ring, TLS 1.2 and 1.3.

use std::sync::{Arc, OnceLock};

use rustls::crypto::CryptoProvider;
use rustls::pki_types::CertificateDer;
use rustls::{ClientConfig, RootCertStore};

/// The one provider of cryptography. Named everywhere, so that nothing depends on a process-wide default.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    PROVIDER.get_or_init(|| Arc::new(rustls::crypto::ring::default_provider())).clone()
}

/// What this host trusts, or what `SSL_CERT_FILE` and `SSL_CERT_DIR` say it does. Read once: it takes milliseconds.
pub(crate) fn system_roots() -> Arc<RootCertStore> {
    static ROOTS: OnceLock<Arc<RootCertStore>> = OnceLock::new();
    // What cannot be read is not trusted; a connection then says that nothing is.
    ROOTS.get_or_init(|| Arc::new(roots_of(rustls_native_certs::load_native_certs().certs))).clone()
}

/// A store of these, as far as they are certificates.
pub(crate) fn roots_of(certificates: Vec<CertificateDer<'static>>) -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(certificates);
    roots
}

/// A client that trusts these.
pub(crate) fn client(roots: Arc<RootCertStore>) -> ClientConfig {
    let builder = ClientConfig::builder_with_provider(provider());
    // Fails for a provider that has no suite of either version, and ours has.
    builder
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
        .unwrap_or_else(|error| unreachable!("ring speaks TLS 1.2 and 1.3: {error}"))
        .with_root_certificates(roots)
        .with_no_client_auth()
}
