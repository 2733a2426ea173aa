//! A list of authorities as Java keeps one (JKS), which reads no PEM.

use rustls::pki_types::CertificateDer;

/// First bytes, and the version that has the kind of a certificate by name (`sun.security.provider.JavaKeyStore`).
const MAGIC: u32 = 0xfeed_feed;
const VERSION: u32 = 2;

/// An entry that is trusted, and has no key.
const TRUSTED: u32 = 2;

/// A digest keyed with a password ends the file. Lists of what is trusted are read without one, and then it is not looked at.
const DIGEST: [u8; 20] = [0; 20];

/// The file of these certificates.
pub(crate) fn keystore(certificates: &[CertificateDer<'_>]) -> Vec<u8> {
    let mut file = Vec::new();
    let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX).to_be_bytes();
    file.extend([MAGIC, VERSION].map(u32::to_be_bytes).concat());
    file.extend(number(certificates.len()));
    for (index, certificate) in certificates.iter().enumerate() {
        file.extend(TRUSTED.to_be_bytes());
        text(&mut file, &index.to_string());
        // When it was made, milliseconds since 1970: nobody asks.
        file.extend(0_u64.to_be_bytes());
        text(&mut file, "X.509");
        file.extend(number(certificate.len()));
        file.extend_from_slice(certificate);
    }
    file.extend(DIGEST);
    file
}

/// Its length in two bytes, and an ASCII text.
fn text(file: &mut Vec<u8>, text: &str) {
    file.extend(u16::try_from(text.len()).unwrap_or(u16::MAX).to_be_bytes());
    file.extend_from_slice(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_its_entries_one_after_the_other() {
        let file = keystore(&[CertificateDer::from(vec![1, 2, 3]), CertificateDer::from(vec![4])]);
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
