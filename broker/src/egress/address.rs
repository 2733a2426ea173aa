//! Which addresses a sandbox may reach by a name: those of the public internet.
//!
//! A name is whoever its owner says it is, and may say it is the host, its neighbours, or the service that hands out the
//! host's own credentials. So what a name resolves to is checked, and what has been checked is what is dialled.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// What an address belongs to, if not to the public internet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Range {
    /// This host.
    Loopback,
    /// A network of whoever runs this host.
    Private,
    /// The neighbours on one wire.
    LinkLocal,
    /// Where clouds hand out credentials and configuration.
    Metadata,
    /// Many at once.
    Multicast,
    /// Nobody, by decree: documentation, benchmarks, the future, tunnels that ended.
    Reserved,
}

impl Range {
    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Range::Loopback => "a loopback address",
            Range::Private => "a private address",
            Range::LinkLocal => "a link-local address",
            Range::Metadata => "a cloud's metadata address",
            Range::Multicast => "a multicast address",
            Range::Reserved => "a reserved address",
        }
    }

    /// Whether `allow_private` lets it pass: only what a test server or an internal one can be at.
    pub fn is_private(self) -> bool {
        match self {
            Range::Loopback | Range::Private => true,
            Range::LinkLocal | Range::Metadata | Range::Multicast | Range::Reserved => false,
        }
    }
}

/// Metadata services at addresses of other ranges: AWS's of IPv6, Alibaba's, Azure's, which is a public one.
const METADATA_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);
const METADATA_V4: [[u8; 4]; 3] = [[169, 254, 169, 254], [100, 100, 100, 200], [168, 63, 129, 16]];

/// The range of an address that is not public. By the registries of special-purpose addresses (RFC 6890) of IANA.
pub(crate) fn range(address: IpAddr) -> Option<Range> {
    match address {
        IpAddr::V4(address) => range_v4(address),
        IpAddr::V6(address) => range_v6(address),
    }
}

fn range_v4(address: Ipv4Addr) -> Option<Range> {
    if METADATA_V4.contains(&address.octets()) {
        return Some(Range::Metadata);
    }
    Some(match address.octets() {
        // To Linux, 0.0.0.0 is this host.
        [0, ..] => Range::Reserved,
        [127, ..] => Range::Loopback,
        [10, ..] | [172, 16..=31, ..] | [192, 168, ..] => Range::Private,
        // Shared by a provider's customers (RFC 6598), and by overlay networks.
        [100, 64..=127, ..] => Range::Private,
        [169, 254, ..] => Range::LinkLocal,
        [224..=239, ..] => Range::Multicast,
        [192, 0, 0 | 2, _]
        | [192, 88, 99, _]
        | [198, 18..=19, ..]
        | [198, 51, 100, _]
        | [203, 0, 113, _] => Range::Reserved,
        [240..=255, ..] => Range::Reserved,
        _ => return None,
    })
}

fn range_v6(address: Ipv6Addr) -> Option<Range> {
    if address == METADATA_V6 {
        return Some(Range::Metadata);
    }
    let [a, b, c, d, e, f, g, h] = address.segments();
    let v4 = |high: u16, low: u16| {
        let [[a, b], [c, d]] = [high.to_be_bytes(), low.to_be_bytes()];
        range_v4(Ipv4Addr::new(a, b, c, d))
    };
    Some(match (a, b) {
        _ if address.is_loopback() => Range::Loopback,
        // Addresses of IPv4 in another dress: mapped, translated (RFC 6052), 6to4.
        (0, 0) if (c, d, e, f) == (0, 0, 0, 0xffff) => return v4(g, h),
        (0x64, 0xff9b) if (c, d, e, f) == (0, 0, 0, 0) => return v4(g, h),
        (0x2002, _) => return v4(b, c),
        (0x64, 0xff9b) => Range::Private,
        (0xfc00..=0xfdff, _) | (0xfec0..=0xfeff, _) => Range::Private,
        (0xfe80..=0xfebf, _) => Range::LinkLocal,
        (0xff00..=0xffff, _) => Range::Multicast,
        // Teredo, benchmarks, ORCHID and documentation.
        (0x2001, 0..=0x1ff | 0xdb8) => Range::Reserved,
        (0x3fff, 0..=0xfff) => Range::Reserved,
        // All that is given out is of 2000::/3.
        (0x2000..=0x3fff, _) => return None,
        _ => Range::Reserved,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_public_is_told_apart() {
        let cases = [
            ("127.0.0.1", Range::Loopback),
            ("127.255.0.9", Range::Loopback),
            ("0.0.0.0", Range::Reserved),
            ("10.1.2.3", Range::Private),
            ("172.16.0.1", Range::Private),
            ("172.31.255.255", Range::Private),
            ("192.168.1.1", Range::Private),
            ("100.64.0.1", Range::Private),
            ("169.254.1.1", Range::LinkLocal),
            ("169.254.169.254", Range::Metadata),
            ("100.100.100.200", Range::Metadata),
            ("168.63.129.16", Range::Metadata),
            ("224.0.0.251", Range::Multicast),
            ("192.0.2.1", Range::Reserved),
            ("255.255.255.255", Range::Reserved),
            ("::", Range::Reserved),
            ("::1", Range::Loopback),
            ("::7f00:1", Range::Reserved),
            ("::ffff:127.0.0.1", Range::Loopback),
            ("::ffff:169.254.169.254", Range::Metadata),
            ("::ffff:10.0.0.1", Range::Private),
            ("64:ff9b::a00:1", Range::Private),
            ("64:ff9b:1::1", Range::Private),
            ("2002:7f00:1::", Range::Loopback),
            ("fd00:ec2::254", Range::Metadata),
            ("fd12:3456::1", Range::Private),
            ("fec0::1", Range::Private),
            ("fe80::1", Range::LinkLocal),
            ("ff02::1", Range::Multicast),
            ("2001::1", Range::Reserved),
            ("2001:db8::1", Range::Reserved),
            ("4000::1", Range::Reserved),
        ];
        for (address, expected) in cases {
            assert_eq!(range(address.parse().unwrap()), Some(expected), "{address}");
        }
    }

    #[test]
    fn the_rest_is_public() {
        let public = [
            "1.1.1.1",
            "172.15.0.1",
            "172.32.0.1",
            "100.63.0.1",
            "100.128.0.1",
            "192.0.1.1",
            "223.255.255.255",
            "2606:4700:4700::1111",
            "2001:4860:4860::8888",
            "::ffff:1.1.1.1",
            "64:ff9b::101:101",
            "2002:101:101::",
        ];
        for address in public {
            assert_eq!(range(address.parse().unwrap()), None, "{address}");
        }
    }

    #[test]
    fn only_what_a_server_of_ones_own_is_at_can_be_let_through() {
        let through = |address: &str| range(address.parse().unwrap()).unwrap().is_private();
        assert!(
            through("127.0.0.1") && through("10.0.0.1") && through("::1") && through("fd12::1")
        );
        for address in [
            "169.254.169.254",
            "fd00:ec2::254",
            "169.254.0.1",
            "0.0.0.0",
            "224.0.0.1",
            "100.100.100.200",
        ] {
            assert!(!through(address), "{address}");
        }
    }
}
