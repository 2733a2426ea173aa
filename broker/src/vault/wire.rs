//! Responses of the Vault API. Their secrets are wiped when they are dropped.

use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Map, Value};
use zeroize::{Zeroize, Zeroizing};

/// The fields of a secret with their values. `None` is a value that is not a string, number or
/// boolean.
pub type Fields = Vec<(String, Option<Zeroizing<Vec<u8>>>)>;

/// The members of a response. A member that the server leaves out is empty: servers that implement
/// a part of the API leave out more than Vault does.
#[derive(Deserialize, Default)]
#[serde(default)]
pub(super) struct Response {
    pub auth: Option<Auth>,
    pub data: WipedJson,
    pub lease_id: String,
    pub lease_duration: u64,
    pub renewable: bool,
}

/// The token that a login returns.
#[derive(Deserialize)]
pub(super) struct Auth {
    pub client_token: String,
    #[serde(default)]
    pub lease_duration: u64,
    #[serde(default)]
    pub renewable: bool,
}

impl Drop for Auth {
    fn drop(&mut self) {
        self.client_token.zeroize();
    }
}

impl Response {
    /// Parses the body of a response, and wipes it. An empty body (status 204) is an empty
    /// response.
    pub fn parse(body: Bytes) -> Result<Response, serde_json::Error> {
        let response = match body.is_empty() {
            true => Ok(Response::default()),
            false => serde_json::from_slice(&body),
        };
        wipe_body(body);
        response
    }
}

/// Wipes a body, unless the connection still shares its buffer.
fn wipe_body(body: Bytes) {
    if let Ok(mut body) = body.try_into_mut() {
        body.as_mut().zeroize();
    }
}

/// A JSON value whose strings are wiped when it is dropped.
#[derive(Deserialize, Default)]
#[serde(transparent)]
pub(crate) struct WipedJson(pub(crate) Value);

impl Drop for WipedJson {
    fn drop(&mut self) {
        wipe_strings(&mut self.0);
    }
}

fn wipe_strings(value: &mut Value) {
    match value {
        Value::String(string) => string.zeroize(),
        Value::Array(values) => values.iter_mut().for_each(wipe_strings),
        Value::Object(fields) => fields.values_mut().for_each(wipe_strings),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// Converts the data of a secret to bytes.
pub(super) fn fields_from_json(data: &Map<String, Value>) -> Fields {
    let bytes = |value: &Value| match value {
        Value::String(string) => Some(string.clone().into_bytes()),
        Value::Number(number) => Some(number.to_string().into_bytes()),
        Value::Bool(boolean) => Some(boolean.to_string().into_bytes()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    };
    data.iter().map(|(name, value)| (name.clone(), bytes(value).map(Zeroizing::new))).collect()
}

/// Returns true if a server reports that it does not support a path. Servers differ in the status
/// that they send with it.
pub(super) fn is_unsupported_path(body: &[u8]) -> bool {
    let text = String::from_utf8_lossy(body).to_ascii_lowercase();
    text.contains("unsupported path")
        || text.contains("path is not supported")
        || text.contains("path not supported")
}
