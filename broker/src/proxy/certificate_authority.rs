//! A certificate authority of one sandbox, which nobody but that sandbox trusts. Its key never leaves this process.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    GeneralSubtree, IsCa, Issuer, KeyPair, KeyUsagePurpose, NameConstraints,
};
use rustls::ServerConfig;
use rustls::crypto::ring::sign::any_ecdsa_type;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::ResolvesServerCert;
use rustls::sign::CertifiedKey;

use crate::tls;

/// How long certificates are good for: the longest that clients take (398 days), for sandboxes that run long.
const VALID: Duration = Duration::from_secs(397 * 24 * 3600);

/// The sandbox's clock is this host's, but a copy's may lag for a moment.
const BEFORE: Duration = Duration::from_secs(3600);

/// Certificates that are kept: a wildcard makes as many names as a workload likes.
const MAX_LEAVES: usize = 256;

/// An authority.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    pem: String,
    /// Of all its servers: one key is as good as many, where all of them are us.
    key: KeyPair,
    leaves: Mutex<BTreeMap<String, Arc<CertifiedKey>>>,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").finish_non_exhaustive()
    }
}

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
#[error("make a certificate: {0}")]
pub struct AuthorityError(String);

impl From<rcgen::Error> for AuthorityError {
    fn from(error: rcgen::Error) -> AuthorityError {
        AuthorityError(error.to_string())
    }
}

impl Authority {
    /// One that can vouch for these domains and what is below them, and for nothing else.
    pub fn new(domains: impl IntoIterator<Item = String>) -> Result<Authority, AuthorityError> {
        let key = KeyPair::generate()?;
        let mut params = params(&[], "Chitin sandbox")?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let permitted_subtrees = domains.into_iter().map(GeneralSubtree::DnsName).collect();
        params.name_constraints =
            Some(NameConstraints { permitted_subtrees, excluded_subtrees: Vec::new() });
        let certificate = params.self_signed(&key)?;
        let (pem, der) = (certificate.pem(), certificate.der().clone());
        Ok(Authority {
            issuer: Issuer::new(params, key),
            certificate: der,
            pem,
            key: KeyPair::generate()?,
            leaves: Mutex::default(),
        })
    }

    /// Its certificate, for whoever is to trust it.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// The same.
    pub fn certificate(&self) -> CertificateDer<'static> {
        self.certificate.clone()
    }

    /// A server of this name that speaks this protocol.
    pub fn server(&self, host: &str, protocol: &[u8]) -> Result<ServerConfig, AuthorityError> {
        let failed = |error: rustls::Error| AuthorityError(error.to_string());
        let resolver = Arc::new(Only(self.leaf(host)?));
        let mut config = ServerConfig::builder_with_provider(tls::provider())
            .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
            .map_err(failed)?
            .with_no_client_auth()
            .with_cert_resolver(resolver);
        config.alpn_protocols = vec![protocol.to_vec()];
        // Nothing of a session outlives its connection, with which this storage ends. A ticket is sent all the same: it
        // acknowledges the client's last word of the handshake, without which the client holds its request back for 40 ms.
        config.session_storage = rustls::server::ServerSessionMemoryCache::new(1);
        config.send_tls13_tickets = 1;
        Ok(config)
    }

    fn leaf(&self, host: &str) -> Result<Arc<CertifiedKey>, AuthorityError> {
        let mut leaves = self.leaves.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(leaf) = leaves.get(host) {
            return Ok(leaf.clone());
        }
        let mut params = params(&[host.to_owned()], "Chitin sandbox server")?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&self.key, &self.issuer)?;
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(self.key.serialize_der()));
        let key = any_ecdsa_type(&key).map_err(|error| AuthorityError(error.to_string()))?;
        let leaf = Arc::new(CertifiedKey::new(vec![certificate.der().clone()], key));
        if leaves.len() >= MAX_LEAVES {
            leaves.clear();
        }
        leaves.insert(host.to_owned(), leaf.clone());
        Ok(leaf)
    }
}

fn params(names: &[String], common_name: &str) -> Result<CertificateParams, AuthorityError> {
    let mut params = CertificateParams::new(names)?;
    let now = SystemTime::now();
    params.not_before = (now - BEFORE).into();
    params.not_after = (now + VALID).into();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    Ok(params)
}

/// One certificate, whatever is asked for: the name has been checked before.
#[derive(Debug)]
struct Only(Arc<CertifiedKey>);

impl ResolvesServerCert for Only {
    fn resolve(&self, _: rustls::server::ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }
}
