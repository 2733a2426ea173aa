//! Replacement of placeholders in requests. A placeholder in a location where it is not replaced
//! blocks the request.

use bytes::Bytes;
use http::header::{AUTHORIZATION, HeaderMap, HeaderValue, PROXY_AUTHORIZATION};
use http::uri::PathAndQuery;
use http::{Method, Uri};
use zeroize::Zeroizing;

use super::blocked::{BlockReason, Location};
use super::encoding::{decode_base64, encode_base64, percent_encode};
use super::store::Credential;
use super::upstream_context::UpstreamContext;

/// The request in which placeholders are replaced.
pub(super) struct Replacer<'a> {
    pub context: &'a UpstreamContext,
    pub method: &'a Method,
    pub uri: &'a Uri,
}

impl Replacer<'_> {
    /// Returns path and query, with the placeholders of the query replaced.
    pub fn replace_in_path(&self) -> Result<PathAndQuery, BlockReason> {
        let path = self.uri.path();
        let placeholders = &self.context.store.placeholders;
        if let Some((_, credential)) = placeholders.find(path.as_bytes(), 0) {
            return Err(self.context.misplaced(credential, Location::Path));
        }
        let Some(query) = self.uri.query() else {
            return PathAndQuery::try_from(path).map_err(|_| BlockReason::InvalidQuery);
        };
        let replaced = self.replace(
            query.as_bytes(),
            Location::Query,
            |credential| credential.scope.query,
            percent_encode,
        )?;
        let text = [path.as_bytes(), b"?", &replaced].concat();
        PathAndQuery::from_maybe_shared(Bytes::from(text)).map_err(|_| BlockReason::InvalidQuery)
    }

    /// Replaces the placeholders in the values of headers that carry keys.
    pub fn replace_in_headers(&self, headers: &mut HeaderMap) -> Result<(), BlockReason> {
        let placeholders = &self.context.store.placeholders;
        for name in headers.keys() {
            if let Some((_, credential)) = placeholders.find(name.as_str().as_bytes(), 0) {
                return Err(self.context.misplaced(credential, Location::HeaderName));
            }
        }
        for (name, value) in headers.iter_mut() {
            let location = Location::Header(name.clone());
            let replace = |bytes: &[u8]| {
                let allowed =
                    |credential: &Credential| credential.scope.replaces_in_header(name.as_str());
                self.replace(bytes, location.clone(), allowed, <[u8]>::to_vec)
            };
            let replaced = if [AUTHORIZATION, PROXY_AUTHORIZATION].contains(name)
                && let Some((scheme, pair)) = decode_basic(value)
            {
                if placeholders.find(&pair, 0).is_none() {
                    continue;
                }
                let pair = Zeroizing::new(replace(&pair)?);
                [scheme, b" ", &encode_base64(&pair, false)].concat()
            } else {
                if placeholders.find(value.as_bytes(), 0).is_none() {
                    continue;
                }
                replace(value.as_bytes())?
            };
            *value = HeaderValue::from_maybe_shared(Bytes::from(replaced))
                .map_err(|_| BlockReason::InvalidHeader(location))?;
            // Excludes the value from HPACK's dynamic table and from debug output.
            value.set_sensitive(true);
        }
        Ok(())
    }

    /// Returns the body with its placeholders replaced.
    pub fn replace_in_body(&self, body: &[u8]) -> Result<Vec<u8>, BlockReason> {
        self.replace(body, Location::Body, |credential| credential.scope.body, <[u8]>::to_vec)
    }

    /// Replaces every placeholder with its encoded value. Fails if one is not allowed here.
    fn replace(
        &self,
        bytes: &[u8],
        location: Location,
        allowed: impl Fn(&Credential) -> bool,
        encode: impl Fn(&[u8]) -> Vec<u8>,
    ) -> Result<Vec<u8>, BlockReason> {
        let context = self.context;
        let (mut out, mut done) = (Vec::with_capacity(bytes.len()), 0);
        while let Some((start, index)) = context.store.placeholders.find(bytes, done) {
            let credential = &context.store.credentials[index];
            if !context.accepts(credential) || !allowed(credential) {
                return Err(context.misplaced(index, location));
            }
            self.check_request(credential)?;
            let Some(value) = credential.value() else {
                return Err(BlockReason::Revoked { credential: credential.name.clone() });
            };
            out.extend_from_slice(&bytes[done..start]);
            out.extend_from_slice(&encode(value.to_bytes().expose()));
            done = start + credential.placeholder.len();
            context.stats.record_delivery(&credential.name);
        }
        out.extend_from_slice(&bytes[done..]);
        Ok(out)
    }

    /// Checks that a credential is for this method and path.
    fn check_request(&self, credential: &Credential) -> Result<(), BlockReason> {
        let (name, scope) = (&credential.name, &credential.scope);
        if !scope.covers_method(self.method.as_str()) {
            let method = self.method.clone();
            return Err(BlockReason::WrongMethod { credential: name.clone(), method });
        }
        match &scope.path_prefix {
            Some(prefix) if !prefix.covers(self.uri.path()) => {
                let prefix = prefix.to_string();
                Err(BlockReason::WrongPath { credential: name.clone(), prefix })
            }
            _ => Ok(()),
        }
    }
}

/// Returns scheme and decoded credentials of the Basic scheme (RFC 7617).
fn decode_basic(value: &HeaderValue) -> Option<(&[u8], Zeroizing<Vec<u8>>)> {
    let bytes = value.as_bytes();
    let space = bytes.iter().position(|byte| *byte == b' ')?;
    let (scheme, rest) = bytes.split_at(space);
    scheme
        .eq_ignore_ascii_case(b"basic")
        .then(|| Some((scheme, decode_base64(rest.trim_ascii())?)))?
}
