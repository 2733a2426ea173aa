//! AWS keys: parsed from the spellings of several tools, and written as the document of SDKs.

use std::time::SystemTime;

use serde_json::Value;
use zeroize::Zeroizing;

use crate::secret_value::{SecretValue, SecretValueError};
use crate::vault::{Fields, WipedJson};

/// The spellings of SDKs, of the AWS engine of Vault, and of credentials files.
const ID: [&str; 3] = ["AccessKeyId", "access_key", "aws_access_key_id"];
const SECRET: [&str; 3] = ["SecretAccessKey", "secret_key", "aws_secret_access_key"];
const TOKEN: [&str; 5] =
    ["SessionToken", "Token", "session_token", "security_token", "aws_session_token"];
const EXPIRATION: [&str; 2] = ["Expiration", "expiration"];

/// The reason why a value is not a pair of AWS keys. No message holds a value.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AwsKeysError {
    /// The value is not a JSON object.
    #[error("not a JSON object such as `aws configure export-credentials` prints")]
    NotObject,
    /// A member is missing, empty, or not a string.
    #[error("the keys have no `{0}`")]
    Missing(&'static str),
    /// The time of expiry cannot be parsed.
    #[error("`Expiration` is not a time such as 2026-11-27T17:20:04Z")]
    InvalidExpiration,
    /// The keys cannot be stored.
    #[error(transparent)]
    Store(#[from] SecretValueError),
}

/// A pair of keys, stored as the document that SDKs read, up to its times.
#[derive(Debug)]
pub(crate) struct AwsKeys {
    document: SecretValue,
    /// The expiry that the keys state.
    pub expires_at: Option<SystemTime>,
}

impl AwsKeys {
    /// Parses a JSON object, or its member `Credentials`, which the commands of AWS print.
    pub fn from_json(text: &[u8]) -> Result<AwsKeys, AwsKeysError> {
        let value = WipedJson(serde_json::from_slice(text).map_err(|_| AwsKeysError::NotObject)?);
        let object = value.0.get("Credentials").unwrap_or(&value.0);
        if !object.is_object() {
            return Err(AwsKeysError::NotObject);
        }
        AwsKeys::from_members(|name| object.get(name).and_then(Value::as_str))
    }

    /// Takes the fields of a secret in a vault.
    pub fn from_fields(fields: &Fields) -> Result<AwsKeys, AwsKeysError> {
        AwsKeys::from_members(|name| {
            let (_, value) = fields.iter().find(|(field, _)| field == name)?;
            std::str::from_utf8(value.as_deref()?).ok()
        })
    }

    fn from_members<'a>(member: impl Fn(&str) -> Option<&'a str>) -> Result<AwsKeys, AwsKeysError> {
        let find = |names: &[&str]| {
            names.iter().find_map(|name| member(name)).filter(|value| !value.is_empty())
        };
        let id = find(&ID).ok_or(AwsKeysError::Missing(ID[0]))?;
        let secret = find(&SECRET).ok_or(AwsKeysError::Missing(SECRET[0]))?;
        // The keys of a user have no token. SDKs treat an empty one as none.
        let token = find(&TOKEN).unwrap_or_default();
        let expires_at = find(&EXPIRATION).map(parse_time).transpose()?;

        // Full capacity for the worst case of escapes, because growing leaves copies behind.
        let mut document =
            Zeroizing::new(Vec::with_capacity(128 + 6 * (id.len() + secret.len() + token.len())));
        document.extend_from_slice(br#"{"Code":"Success","Type":"AWS-HMAC""#);
        for (name, value) in [(ID[0], id), (SECRET[0], secret), (TOKEN[1], token)] {
            document.extend_from_slice(format!(",\"{name}\":").as_bytes());
            // Writing to memory cannot fail.
            let _ = serde_json::to_writer(&mut *document, value);
        }
        Ok(AwsKeys { document: SecretValue::new(document, false)?, expires_at })
    }

    /// Returns the JSON document, with its times.
    pub fn document(&self, now: SystemTime, expires_at: SystemTime) -> Zeroizing<Vec<u8>> {
        let times = format!(
            r#","LastUpdated":"{}","Expiration":"{}"}}"#,
            humantime::format_rfc3339_seconds(now),
            humantime::format_rfc3339_seconds(expires_at)
        );
        let stored = self.document.to_bytes();
        let mut document = Zeroizing::new(Vec::with_capacity(stored.expose().len() + times.len()));
        document.extend_from_slice(stored.expose());
        document.extend_from_slice(times.as_bytes());
        document
    }
}

/// Parses a time in UTC, also with the offset `+00:00`.
fn parse_time(text: &str) -> Result<SystemTime, AwsKeysError> {
    let utc = text.strip_suffix("+00:00").map(|text| format!("{text}Z"));
    humantime::parse_rfc3339(utc.as_deref().unwrap_or(text))
        .map_err(|_| AwsKeysError::InvalidExpiration)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn parsed(keys: &AwsKeys) -> Value {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        serde_json::from_slice(&keys.document(now, now + Duration::from_secs(60))).unwrap()
    }

    #[test]
    fn every_spelling_becomes_the_document_of_sdks() {
        let texts = [
            r#"{"Version":1,"AccessKeyId":"AKIA1","SecretAccessKey":"s\"/+ü",
                "SessionToken":"t","Expiration":"2026-11-28T01:00:00+00:00"}"#,
            r#"{"Credentials":{"AccessKeyId":"AKIA1","SecretAccessKey":"s\"/+ü",
                "SessionToken":"t","Expiration":"2026-11-28T01:00:00Z"}}"#,
            r#"{"access_key":"AKIA1","secret_key":"s\"/+ü","security_token":"t",
                "session_token":null,"expiration":"2026-11-28T01:00:00Z"}"#,
        ];
        for text in texts {
            let keys = AwsKeys::from_json(text.as_bytes()).unwrap();
            let document = parsed(&keys);
            assert_eq!(document["AccessKeyId"], "AKIA1", "{text}");
            assert_eq!(document["SecretAccessKey"], "s\"/+ü", "{text}");
            assert_eq!(
                (&document["Token"], &document["Code"]),
                (&"t".into(), &"Success".into()),
                "{text}"
            );
            assert_eq!(document["Expiration"], "2023-11-14T22:14:20Z");
            assert_eq!(document["LastUpdated"], "2023-11-14T22:13:20Z");
            assert_eq!(
                keys.expires_at,
                Some(humantime::parse_rfc3339("2026-11-28T01:00:00Z").unwrap())
            );
        }
        let field = |name: &str, value: Option<&str>| {
            (name.to_owned(), value.map(|value| Zeroizing::new(value.as_bytes().to_vec())))
        };
        // The keys of a user, as the AWS engine of Vault issues them.
        let fields = vec![
            field("access_key", Some("AKIA2")),
            field("secret_key", Some("s")),
            field("security_token", None),
        ];
        let keys = AwsKeys::from_fields(&fields).unwrap();
        assert_eq!((parsed(&keys)["AccessKeyId"].as_str(), keys.expires_at), (Some("AKIA2"), None));
        assert_eq!(parsed(&keys)["Token"], "");
    }

    #[test]
    fn invalid_keys_are_refused_without_their_values() {
        use AwsKeysError::*;
        let refused = |text: &str| {
            let error = AwsKeys::from_json(text.as_bytes()).unwrap_err();
            assert!(!format!("{error} {error:?}").contains("canary"), "{error:?}");
            error
        };
        for text in ["canary", "", "[]", "7", r#"{"Credentials":"canary"}"#, "{\"a\":"] {
            assert!(matches!(refused(text), NotObject), "{text}");
        }
        for (text, missing) in [
            (r#"{"SecretAccessKey":"canary"}"#, "AccessKeyId"),
            (r#"{"AccessKeyId":"a","secret_key":""}"#, "SecretAccessKey"),
            (r#"{"AccessKeyId":["canary"],"secret_key":"s"}"#, "AccessKeyId"),
        ] {
            assert!(matches!(refused(text), Missing(name) if name == missing), "{text}");
        }
        let error = refused(r#"{"AccessKeyId":"a","secret_key":"s","Expiration":"canary"}"#);
        assert!(matches!(error, InvalidExpiration), "{error:?}");
    }
}
