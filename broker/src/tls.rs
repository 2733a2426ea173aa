//! TLS by rustls with ring: versions 1.2 and 1.3.

use std::sync::{Arc, OnceLock};

use rustls::crypto::CryptoProvider;
use rustls::pki_types::CertificateDer;
use rustls::{ClientConfig, RootCertStore};

/// Returns the cryptography provider. It is always passed explicitly, so that nothing depends on a
/// process-wide default.
pub(crate) fn crypto_provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    PROVIDER.get_or_init(|| Arc::new(rustls::crypto::ring::default_provider())).clone()
}

/// Returns the CAs that this host trusts, or those of `SSL_CERT_FILE` and `SSL_CERT_DIR`. They are
/// read once, because reading takes milliseconds.
pub(crate) fn system_roots() -> Arc<RootCertStore> {
    static ROOTS: OnceLock<Arc<RootCertStore>> = OnceLock::new();
    // An unreadable certificate is not trusted; the connections that need it report that.
    let load = || Arc::new(root_store(rustls_native_certs::load_native_certs().certs));
    ROOTS.get_or_init(load).clone()
}

/// Makes a store of these certificates; invalid ones are left out.
pub(crate) fn root_store(certificates: Vec<CertificateDer<'static>>) -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(certificates);
    roots
}

/// Returns the configuration of a client that trusts these CAs.
pub(crate) fn client_config(roots: Arc<RootCertStore>) -> ClientConfig {
    let builder = ClientConfig::builder_with_provider(crypto_provider());
    // Fails only for a provider without a cipher suite of either version.
    builder
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
        .unwrap_or_else(|error| unreachable!("ring supports TLS 1.2 and 1.3: {error}"))
        .with_root_certificates(roots)
        .with_no_client_auth()
}
