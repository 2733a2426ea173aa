//! The encoder of a Java keystore (JKS) of CA certificates. Java reads no PEM.

use rustls::pki_types::CertificateDer;

/// The magic number, and the version whose entries name the certificate type
/// (`sun.security.provider.JavaKeyStore`).
const MAGIC: u32 = 0xfeed_feed;
const VERSION: u32 = 2;

/// The tag of a trusted certificate entry, which has no key.
const TRUSTED: u32 = 2;

/// The digest at the end of the file, keyed with a password. Java opens trust stores without a
/// password, and then does not verify it.
const DIGEST: [u8; 20] = [0; 20];

/// Returns the content of a keystore with these certificates.
pub(crate) fn encode_keystore(certificates: &[CertificateDer<'_>]) -> Vec<u8> {
    let mut file = Vec::new();
    let length = |count: usize| u32::try_from(count).unwrap_or(u32::MAX).to_be_bytes();
    file.extend([MAGIC, VERSION].map(u32::to_be_bytes).concat());
    file.extend(length(certificates.len()));
    for (index, certificate) in certificates.iter().enumerate() {
        file.extend(TRUSTED.to_be_bytes());
        push_string(&mut file, &index.to_string());
        // The creation date, milliseconds since 1970, which trust managers do not read.
        file.extend(0_u64.to_be_bytes());
        push_string(&mut file, "X.509");
        file.extend(length(certificate.len()));
        file.extend_from_slice(certificate);
    }
    file.extend(DIGEST);
    file
}

/// Appends an ASCII string with its length in two bytes.
fn push_string(file: &mut Vec<u8>, text: &str) {
    file.extend(u16::try_from(text.len()).unwrap_or(u16::MAX).to_be_bytes());
    file.extend_from_slice(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keystore_has_its_entries_in_order() {
        let file =
            encode_keystore(&[CertificateDer::from(vec![1, 2, 3]), CertificateDer::from(vec![4])]);
        let expected = [
            &[0xfe, 0xed, 0xfe, 0xed, 0, 0, 0, 2, 0, 0, 0, 2][..],
            &[
                0, 0, 0, 2, 0, 1, b'0', 0, 0, 0, 0, 0, 0, 0, 0, 0, 5, b'X', b'.', b'5', b'0', b'9',
                0, 0, 0, 3, 1, 2, 3,
            ],
            &[
                0, 0, 0, 2, 0, 1, b'1', 0, 0, 0, 0, 0, 0, 0, 0, 0, 5, b'X', b'.', b'5', b'0', b'9',
                0, 0, 0, 1, 4,
            ],
            &[0; 20],
        ];
        assert_eq!(file, expected.concat());
    }
}
