//! The instance metadata service of EC2, version 2 (IMDSv2): a token is requested by PUT, and every
//! other request carries it. Version 1, which has no tokens, is not served.
//!
//! A token is the time of its expiry and a MAC over that, so that the server stores none.

use std::time::{SystemTime, UNIX_EPOCH};

use hmac::{Hmac, Mac};
use sha2::Sha256;
use zeroize::Zeroizing;

use crate::proxy::encoding::{decode_base64, encode_base64};

pub(super) const TOKEN_PATH: &str = "/latest/api/token";
/// The path of the name of the role, which is the name of the credential.
pub(super) const ROLE_PATH: &str = "/latest/meta-data/iam/security-credentials";
pub(super) const TOKEN_HEADER: &str = "x-aws-ec2-metadata-token";
pub(super) const TTL_HEADER: &str = "x-aws-ec2-metadata-token-ttl-seconds";

/// The maximum TTL of a token in seconds: 6 hours, as in EC2.
const MAX_TTL: u64 = 21_600;

/// The length of secrets that are made at random, in bytes.
pub(super) const SECRET_LEN: usize = 32;

/// A request of a token whose TTL is not from 1 to [`MAX_TTL`].
#[derive(Debug)]
pub(super) struct InvalidTtl;

/// Issues and verifies tokens.
pub(super) struct TokenKey(Zeroizing<[u8; SECRET_LEN]>);

impl TokenKey {
    pub fn new(key: Zeroizing<[u8; SECRET_LEN]>) -> TokenKey {
        TokenKey(key)
    }

    pub fn authenticate(&self, bytes: &[u8]) -> Option<Hmac<Sha256>> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&*self.0).ok()?;
        mac.update(bytes);
        Some(mac)
    }

    /// Compares two secrets in a time that does not depend on them: by their MACs.
    pub fn is_equal(&self, expected: &[u8], given: &[u8]) -> bool {
        let expected = self.authenticate(expected).map(|mac| mac.finalize().into_bytes());
        expected
            .zip(self.authenticate(given))
            .is_some_and(|(mac, given)| given.verify(&mac).is_ok())
    }

    /// Issues a token that expires at a time in seconds since 1970.
    pub fn issue_until(&self, expires_at: u64) -> Option<Vec<u8>> {
        let expires_at = expires_at.to_be_bytes();
        let mac = self.authenticate(&expires_at)?.finalize().into_bytes();
        Some(encode_base64(&[&expires_at[..], &mac].concat(), false))
    }

    /// Returns true if this key issued the token, and the token has not expired.
    pub fn verify(&self, token: &[u8]) -> bool {
        let Some(token) = decode_base64(token) else { return false };
        let Some((expires_at, mac)) = token.split_first_chunk() else { return false };
        let issued = self.authenticate(expires_at).is_some_and(|own| own.verify_slice(mac).is_ok());
        issued && u64::from_be_bytes(*expires_at) > seconds_since_epoch()
    }
}

/// Parses the TTL that a request for a token asks for.
pub(super) fn parse_ttl(header: &[u8]) -> Result<u64, InvalidTtl> {
    let ttl = std::str::from_utf8(header).ok().and_then(|text| text.parse().ok());
    ttl.filter(|ttl| (1..=MAX_TTL).contains(ttl)).ok_or(InvalidTtl)
}

pub(super) fn seconds_since_epoch() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
