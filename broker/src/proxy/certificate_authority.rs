//! The certificate authority of one sandbox. Only that sandbox trusts it, and its key never leaves
//! this process.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use rustls::ServerConfig;
use rustls::crypto::ring::sign::any_ecdsa_type;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::ResolvesServerCert;
use rustls::sign::CertifiedKey;

use super::name_constraints::{NAME_CONSTRAINTS, encode_name_constraints};
use crate::tls;

/// Validity of certificates. Clients accept at most 398 days; a sandbox may run for long.
const VALIDITY: Duration = Duration::from_secs(397 * 24 * 3600);

/// Age of a new certificate. The sandbox uses this host's clock, but that of a restored one may lag
/// for a moment.
const BACKDATED: Duration = Duration::from_secs(3600);

/// Cached server certificates. Under a wildcard, the workload can request any number of names.
const MAX_LEAVES: usize = 256;

/// The certificate authority of one sandbox.
pub(super) struct CertificateAuthority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    pem: String,
    /// The key of all server certificates: all of these servers are this process.
    key: KeyPair,
    leaves: Mutex<BTreeMap<String, Arc<CertifiedKey>>>,
}

impl fmt::Debug for CertificateAuthority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CertificateAuthority").finish_non_exhaustive()
    }
}

/// An error of making a certificate.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// The key or the certificate could not be generated.
    #[error("make a certificate: {0}")]
    Generate(#[from] rcgen::Error),
    /// The TLS library rejected the key or the configuration.
    #[error("make a certificate: {0}")]
    Tls(#[from] rustls::Error),
}

impl CertificateAuthority {
    /// Creates a CA that is constrained to these domains and their subdomains.
    pub fn new(
        domains: impl IntoIterator<Item = String>,
    ) -> Result<CertificateAuthority, CertificateError> {
        let key = KeyPair::generate()?;
        let mut params = certificate_params(&[], "Chitin sandbox")?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let constraints = encode_name_constraints(domains);
        let mut extension = CustomExtension::from_oid_content(NAME_CONSTRAINTS, constraints);
        extension.set_criticality(true);
        params.custom_extensions.push(extension);
        let certificate = params.self_signed(&key)?;
        let (pem, der) = (certificate.pem(), certificate.der().clone());
        Ok(CertificateAuthority {
            issuer: Issuer::new(params, key),
            certificate: der,
            pem,
            key: KeyPair::generate()?,
            leaves: Mutex::default(),
        })
    }

    /// Returns the certificate of the CA as PEM.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// Returns the certificate of the CA as DER.
    pub fn certificate(&self) -> CertificateDer<'static> {
        self.certificate.clone()
    }

    /// Returns the configuration of a TLS server with this name, for one protocol of ALPN.
    pub fn server_config(
        &self,
        host: &str,
        protocol: &[u8],
    ) -> Result<ServerConfig, CertificateError> {
        let resolver = Arc::new(FixedCertificate(self.issue_certificate(host)?));
        let mut config = ServerConfig::builder_with_provider(tls::crypto_provider())
            .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])?
            .with_no_client_auth()
            .with_cert_resolver(resolver);
        config.alpn_protocols = vec![protocol.to_vec()];
        // The storage ends with the connection, so that no session outlives it. A ticket is sent
        // nevertheless: it acknowledges the client's last message of the handshake. Without it, the
        // client holds its request back for 40 ms.
        config.session_storage = rustls::server::ServerSessionMemoryCache::new(1);
        config.send_tls13_tickets = 1;
        Ok(config)
    }

    fn issue_certificate(&self, host: &str) -> Result<Arc<CertifiedKey>, CertificateError> {
        let mut leaves = self.leaves.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(leaf) = leaves.get(host) {
            return Ok(leaf.clone());
        }
        let mut params = certificate_params(&[host.to_owned()], "Chitin sandbox server")?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&self.key, &self.issuer)?;
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(self.key.serialize_der()));
        let key = any_ecdsa_type(&key)?;
        let leaf = Arc::new(CertifiedKey::new(vec![certificate.der().clone()], key));
        if leaves.len() >= MAX_LEAVES {
            leaves.clear();
        }
        leaves.insert(host.to_owned(), leaf.clone());
        Ok(leaf)
    }
}

fn certificate_params(
    names: &[String],
    common_name: &str,
) -> Result<CertificateParams, CertificateError> {
    let mut params = CertificateParams::new(names)?;
    let now = SystemTime::now();
    params.not_before = (now - BACKDATED).into();
    params.not_after = (now + VALIDITY).into();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    Ok(params)
}

/// Presents one certificate for every server name: the caller has checked the name.
#[derive(Debug)]
struct FixedCertificate(Arc<CertifiedKey>);

impl ResolvesServerCert for FixedCertificate {
    fn resolve(&self, _: rustls::server::ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }
}

#[cfg(test)]
#[path = "certificate_authority_test.rs"]
mod tests;
