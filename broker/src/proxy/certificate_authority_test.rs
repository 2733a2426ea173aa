use rcgen::{SanType, string::Ia5String};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::{ServerName, UnixTime};
use rustls::{CertificateError as TlsCertificateError, Error as TlsError};

use super::*;

fn authority(domains: &[&str]) -> CertificateAuthority {
    CertificateAuthority::new(domains.iter().map(|domain| (*domain).to_owned())).unwrap()
}

/// Issues a certificate for a DNS name and one more name, and verifies it for the DNS name.
fn verify(
    authority: &CertificateAuthority,
    host: &str,
    other: Option<SanType>,
) -> Result<(), TlsError> {
    let mut params = certificate_params(&[host.to_owned()], "Chitin sandbox server").unwrap();
    params.subject_alt_names.extend(other);
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let leaf = params.signed_by(&authority.key, &authority.issuer).unwrap();
    verify_leaf(authority, leaf.der(), host)
}

fn verify_leaf(
    authority: &CertificateAuthority,
    leaf: &CertificateDer<'_>,
    name: &str,
) -> Result<(), TlsError> {
    let roots = Arc::new(tls::root_store(vec![authority.certificate()]));
    assert_eq!(roots.len(), 1);
    let verifier =
        WebPkiServerVerifier::builder_with_provider(roots, tls::crypto_provider()).build().unwrap();
    let name = ServerName::try_from(name.to_owned()).unwrap();
    verifier.verify_server_cert(leaf, &[], &name, &[], UnixTime::now()).map(drop)
}

#[test]
fn authority_is_constrained_in_every_kind_of_name() {
    let authority = authority(&["api.test"]);
    assert_eq!(verify(&authority, "api.test", None), Ok(()));
    assert_eq!(verify(&authority, "a.api.test", None), Ok(()));
    assert!(verify(&authority, "evil.test", None).is_err());
    let text = |text: &str| Ia5String::try_from(text).unwrap();
    for other in [
        SanType::DnsName(text("evil.test")),
        SanType::IpAddress("192.0.2.1".parse().unwrap()),
        SanType::IpAddress("0.0.0.0".parse().unwrap()),
        SanType::IpAddress("2001:db8::1".parse().unwrap()),
        SanType::URI(text("https://evil.test/")),
        SanType::Rfc822Name(text("root@evil.test")),
    ] {
        let verified = verify(&authority, "api.test", Some(other.clone()));
        assert!(
            matches!(
                &verified,
                Err(TlsError::InvalidCertificate(TlsCertificateError::Other(error)))
                    if error.to_string().contains("NameConstraintViolation")
            ),
            "{other:?}: {verified:?}"
        );
    }
}

#[test]
fn authority_without_domains_permits_no_name() {
    assert!(verify(&authority(&[]), "api.test", None).is_err());
    // Longer than one byte of length can tell.
    let domains: Vec<String> = (0..64).map(|index| format!("host-{index}.example.test")).collect();
    let domains: Vec<&str> = domains.iter().map(String::as_str).collect();
    assert_eq!(verify(&authority(&domains), "host-63.example.test", None), Ok(()));
}
