//! Keys of AWS: what sources give, in the spellings that are in use, and the document that SDKs ask for.

use std::time::SystemTime;

use serde_json::Value;
use zeroize::Zeroizing;

use crate::secret_value::SecretValue;
use crate::vault::{Fields, Wiped};

/// As SDKs, Vault's AWS engine and credentials files spell it.
const ID: [&str; 3] = ["AccessKeyId", "access_key", "aws_access_key_id"];
const SECRET: [&str; 3] = ["SecretAccessKey", "secret_key", "aws_secret_access_key"];
const TOKEN: [&str; 5] =
    ["SessionToken", "Token", "session_token", "security_token", "aws_session_token"];
const EXPIRATION: [&str; 2] = ["Expiration", "expiration"];

/// Why there are no keys. No message holds a value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum KeysError {
    #[error("it is no JSON object, as `aws configure export-credentials` prints one")]
    NoObject,
    #[error("it has no `{0}`")]
    Missing(&'static str),
    #[error("its `Expiration` is no time such as 2026-11-27T17:20:04Z")]
    Expiration,
    #[error("{0}")]
    Hold(String),
}

/// A pair of keys, as one document but for the moments in it.
#[derive(Debug)]
pub(crate) struct Keys {
    document: SecretValue,
    /// Until when they are good, if they say so themselves.
    pub until: Option<SystemTime>,
}

impl Keys {
    /// Of a JSON object, or of its member `Credentials`, in which AWS's own commands put them.
    pub fn from_json(text: &[u8]) -> Result<Keys, KeysError> {
        let value = Wiped(serde_json::from_slice(text).map_err(|_| KeysError::NoObject)?);
        let object = value.0.get("Credentials").unwrap_or(&value.0);
        if !object.is_object() {
            return Err(KeysError::NoObject);
        }
        Keys::of(|name| object.get(name).and_then(Value::as_str))
    }

    /// Of the fields of a vault's secret.
    pub fn from_fields(fields: &Fields) -> Result<Keys, KeysError> {
        Keys::of(|name| {
            let (_, value) = fields.iter().find(|(field, _)| field == name)?;
            std::str::from_utf8(value.as_deref()?).ok()
        })
    }

    fn of<'a>(find: impl Fn(&str) -> Option<&'a str>) -> Result<Keys, KeysError> {
        let any = |names: &[&str]| {
            names.iter().find_map(|name| find(name)).filter(|value| !value.is_empty())
        };
        let id = any(&ID).ok_or(KeysError::Missing(ID[0]))?;
        let secret = any(&SECRET).ok_or(KeysError::Missing(SECRET[0]))?;
        // Users' own keys have none, and SDKs take an empty one for none.
        let token = any(&TOKEN).unwrap_or_default();
        let until = any(&EXPIRATION).map(moment).transpose()?;

        // Sized at once, for the worst of escapes: growing would leave copies behind.
        let mut document =
            Zeroizing::new(Vec::with_capacity(128 + 6 * (id.len() + secret.len() + token.len())));
        document.extend_from_slice(br#"{"Code":"Success","Type":"AWS-HMAC""#);
        for (name, value) in [(ID[0], id), (SECRET[0], secret), (TOKEN[1], token)] {
            document.extend_from_slice(format!(",\"{name}\":").as_bytes());
            // Writing to memory does not fail.
            let _ = serde_json::to_writer(&mut *document, value);
        }
        let document = SecretValue::new(document, false).map_err(KeysError::Hold)?;
        Ok(Keys { document, until })
    }

    /// The document, JSON, which is good until then.
    pub fn document(&self, now: SystemTime, until: SystemTime) -> Zeroizing<Vec<u8>> {
        let moments = format!(
            r#","LastUpdated":"{}","Expiration":"{}"}}"#,
            humantime::format_rfc3339_seconds(now),
            humantime::format_rfc3339_seconds(until)
        );
        let held = self.document.to_bytes();
        let mut document = Zeroizing::new(Vec::with_capacity(held.expose().len() + moments.len()));
        document.extend_from_slice(held.expose());
        document.extend_from_slice(moments.as_bytes());
        document
    }
}

/// A moment in UTC; some write its offset.
fn moment(text: &str) -> Result<SystemTime, KeysError> {
    let utc = text.strip_suffix("+00:00").map(|text| format!("{text}Z"));
    humantime::parse_rfc3339(utc.as_deref().unwrap_or(text)).map_err(|_| KeysError::Expiration)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn parsed(keys: &Keys) -> Value {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        serde_json::from_slice(&keys.document(now, now + Duration::from_secs(60))).unwrap()
    }

    #[test]
    fn every_spelling_becomes_the_document_that_sdks_read() {
        let texts = [
            r#"{"Version":1,"AccessKeyId":"AKIA1","SecretAccessKey":"s\"/+ü","SessionToken":"t","Expiration":"2026-11-28T01:00:00+00:00"}"#,
            r#"{"Credentials":{"AccessKeyId":"AKIA1","SecretAccessKey":"s\"/+ü","SessionToken":"t","Expiration":"2026-11-28T01:00:00Z"}}"#,
            r#"{"access_key":"AKIA1","secret_key":"s\"/+ü","security_token":"t","session_token":null,"expiration":"2026-11-28T01:00:00Z"}"#,
        ];
        for text in texts {
            let keys = Keys::from_json(text.as_bytes()).unwrap();
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
            assert_eq!(keys.until, Some(humantime::parse_rfc3339("2026-11-28T01:00:00Z").unwrap()));
        }
        let field = |name: &str, value: Option<&str>| {
            (name.to_owned(), value.map(|value| Zeroizing::new(value.as_bytes().to_vec())))
        };
        // A user's own, as Vault's engine gives them.
        let fields = vec![
            field("access_key", Some("AKIA2")),
            field("secret_key", Some("s")),
            field("security_token", None),
        ];
        let keys = Keys::from_fields(&fields).unwrap();
        assert_eq!((parsed(&keys)["AccessKeyId"].as_str(), keys.until), (Some("AKIA2"), None));
        assert_eq!(parsed(&keys)["Token"], "");
    }

    #[test]
    fn what_is_no_pair_of_keys_says_what_is_missing_and_not_what_is_there() {
        let refused = |text: &str| Keys::from_json(text.as_bytes()).unwrap_err().to_string();
        let object = "it is no JSON object, as `aws configure export-credentials` prints one";
        for text in ["canary", "", "[]", "7", r#"{"Credentials":"canary"}"#, "{\"a\":"] {
            assert_eq!(refused(text), object);
        }
        assert_eq!(refused(r#"{"SecretAccessKey":"canary"}"#), "it has no `AccessKeyId`");
        assert_eq!(
            refused(r#"{"AccessKeyId":"a","secret_key":""}"#),
            "it has no `SecretAccessKey`"
        );
        assert_eq!(
            refused(r#"{"AccessKeyId":["canary"],"secret_key":"s"}"#),
            "it has no `AccessKeyId`"
        );
        let error = refused(r#"{"AccessKeyId":"a","secret_key":"s","Expiration":"canary"}"#);
        assert_eq!(error, "its `Expiration` is no time such as 2026-11-27T17:20:04Z");
    }
}
