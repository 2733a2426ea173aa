//! The name constraints of a sandbox's CA (RFC 5280, 4.2.1.10), as DER.
//!
//! A kind of name without a constraint is permitted, whatever it names. DNS names are constrained
//! to the credentials' hosts. All addresses are excluded. URIs and mail addresses are constrained
//! to a domain that does not exist (RFC 2606), because an excluded subtree cannot express all of
//! them. Directory names are left out: Go refuses a critical extension with them, and rustls
//! refuses every certificate below it. No TLS client verifies a server by its directory name.

/// The identifier of the extension.
pub(super) const NAME_CONSTRAINTS: &[u64] = &[2, 5, 29, 30];

const SEQUENCE: u8 = 0x30;

/// Tags of `GeneralName`.
const RFC822_NAME: u8 = 0x81;
const DNS_NAME: u8 = 0x82;
const URI: u8 = 0x86;
const IP_ADDRESS: u8 = 0x87;

/// Tags of `NameConstraints`.
const PERMITTED: u8 = 0xa0;
const EXCLUDED: u8 = 0xa1;

/// A domain without any host.
const NO_DOMAIN: &[u8] = b"invalid";

/// Returns the constraints: these domains with their subdomains, and no other name.
pub(super) fn encode_name_constraints(domains: impl IntoIterator<Item = String>) -> Vec<u8> {
    let mut permitted: Vec<u8> = domains
        .into_iter()
        .flat_map(|domain| encode_subtree(DNS_NAME, domain.as_bytes()))
        .collect();
    // Without a name, every one would be permitted.
    if permitted.is_empty() {
        permitted = encode_subtree(DNS_NAME, NO_DOMAIN);
    }
    permitted.extend(encode_subtree(RFC822_NAME, NO_DOMAIN));
    permitted.extend(encode_subtree(URI, NO_DOMAIN));
    // Address and mask, both zero: all of IPv4, and all of IPv6.
    let excluded = [encode_subtree(IP_ADDRESS, &[0; 8]), encode_subtree(IP_ADDRESS, &[0; 32])];
    let trees = [encode(PERMITTED, &permitted), encode(EXCLUDED, &excluded.concat())];
    encode(SEQUENCE, &trees.concat())
}

fn encode_subtree(tag: u8, name: &[u8]) -> Vec<u8> {
    encode(SEQUENCE, &encode(tag, name))
}

/// Encodes a tag, a length in the fewest bytes, and the content.
fn encode(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = content.len().to_be_bytes();
    let used = &length[length.iter().take_while(|byte| **byte == 0).count()..];
    let mut der = vec![tag];
    match u8::try_from(content.len()) {
        Ok(short @ ..0x80) => der.push(short),
        // At most eight bytes.
        _ => {
            der.push(0x80 | u8::try_from(used.len()).unwrap_or(u8::MAX));
            der.extend_from_slice(used);
        }
    }
    der.extend_from_slice(content);
    der
}
