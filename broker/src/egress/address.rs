//! Classification of addresses: a sandbox may reach public ones.
//!
//! The owner of a name decides which addresses it has. It may point the name at the host, at its
//! neighbours, or at the service that issues the host's credentials. Therefore the resolved address
//! is checked, and the checked address is dialled.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A range of addresses that are not public.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AddressRange {
    /// This host.
    Loopback,
    /// A private network, or the shared network of a provider.
    Private,
    /// The hosts of one link.
    LinkLocal,
    /// A cloud's service for credentials and configuration.
    Metadata,
    /// A group of hosts.
    Multicast,
    /// No host: reserved for documentation, benchmarks, the future, and retired tunnels.
    Reserved,
}

impl AddressRange {
    /// Returns the description in the audit log.
    pub fn description(self) -> &'static str {
        match self {
            AddressRange::Loopback => "a loopback address",
            AddressRange::Private => "a private address",
            AddressRange::LinkLocal => "a link-local address",
            AddressRange::Metadata => "a cloud's metadata address",
            AddressRange::Multicast => "a multicast address",
            AddressRange::Reserved => "a reserved address",
        }
    }

    /// Returns true if `allow_private` allows the range: test servers and internal ones use it.
    pub fn is_private(self) -> bool {
        match self {
            AddressRange::Loopback | AddressRange::Private => true,
            AddressRange::LinkLocal
            | AddressRange::Metadata
            | AddressRange::Multicast
            | AddressRange::Reserved => false,
        }
    }
}

/// Metadata services over IPv4: link-local, Alibaba, and Azure, whose address is public.
const METADATA_V4: [[u8; 4]; 3] = [[169, 254, 169, 254], [100, 100, 100, 200], [168, 63, 129, 16]];

/// The first 48 bits of the addresses at which clouds serve metadata, credentials, names and time
/// over IPv6: AWS, Google, Oracle and Scaleway. Each cloud keeps its whole network for such
/// services, so that a service of tomorrow is covered.
const METADATA_V6: [[u16; 3]; 4] =
    [[0xfd00, 0xec2, 0], [0xfd20, 0xce, 0], [0xfd00, 0xc1, 0], [0xfd00, 0x42, 0]];

/// Returns the range of an address that is not public, by IANA's registries of special-purpose
/// addresses (RFC 6890).
pub(super) fn classify_address(address: IpAddr) -> Option<AddressRange> {
    match address {
        IpAddr::V4(address) => classify_v4(address),
        IpAddr::V6(address) => classify_v6(address),
    }
}

fn classify_v4(address: Ipv4Addr) -> Option<AddressRange> {
    if METADATA_V4.contains(&address.octets()) {
        return Some(AddressRange::Metadata);
    }
    Some(match address.octets() {
        // Linux connects to this host at 0.0.0.0.
        [0, ..] => AddressRange::Reserved,
        [127, ..] => AddressRange::Loopback,
        [10, ..] | [172, 16..=31, ..] | [192, 168, ..] => AddressRange::Private,
        // Carrier-grade NAT (RFC 6598), also used by overlay networks.
        [100, 64..=127, ..] => AddressRange::Private,
        [169, 254, ..] => AddressRange::LinkLocal,
        [224..=239, ..] => AddressRange::Multicast,
        [192, 0, 0 | 2, _]
        | [192, 88, 99, _]
        | [198, 18..=19, ..]
        | [198, 51, 100, _]
        | [203, 0, 113, _] => AddressRange::Reserved,
        [240..=255, ..] => AddressRange::Reserved,
        _ => return None,
    })
}

fn classify_v6(address: Ipv6Addr) -> Option<AddressRange> {
    let segments = address.segments();
    let [a, b, c, d, e, f, g, h] = segments;
    let embedded = v4_from(g, h);
    Some(match (a, b) {
        _ if address.is_loopback() => AddressRange::Loopback,
        _ if METADATA_V6.contains(&[a, b, c]) => AddressRange::Metadata,
        // IPv6 forms of IPv4 addresses: mapped, translated (RFC 6052), 6to4. IPv4-compatible and
        // SIIT addresses are reserved, below.
        (0, 0) if (c, d, e, f) == (0, 0, 0, 0xffff) => return classify_v4(embedded),
        (0x64, 0xff9b) if (c, d, e, f) == (0, 0, 0, 0) => return classify_v4(embedded),
        (0x2002, _) => return classify_v4(v4_from(b, c)),
        (0x64, 0xff9b) => classify_local_translation(segments),
        // ISATAP (RFC 5214): the IPv4 address follows 5efe in the identifier of the interface.
        _ if f == 0x5efe && e & 0xfcff == 0 => {
            return stricter(classify_v4(embedded), classify_unicast(segments));
        }
        // A cloud that repeats the address of its IPv4 service in a private network.
        (0xfc00..=0xfdff, _) if classify_v4(embedded) == Some(AddressRange::Metadata) => {
            AddressRange::Metadata
        }
        _ => return classify_unicast(segments),
    })
}

/// Classifies an address by its prefix alone.
fn classify_unicast([a, b, ..]: [u16; 8]) -> Option<AddressRange> {
    Some(match (a, b) {
        (0xfc00..=0xfdff, _) | (0xfec0..=0xfeff, _) => AddressRange::Private,
        (0xfe80..=0xfebf, _) => AddressRange::LinkLocal,
        (0xff00..=0xffff, _) => AddressRange::Multicast,
        // Teredo, benchmarks, ORCHID and documentation.
        (0x2001, 0..=0x1ff | 0xdb8) => AddressRange::Reserved,
        (0x3fff, 0..=0xfff) => AddressRange::Reserved,
        // IANA allocates global unicast from 2000::/3 only.
        (0x2000..=0x3fff, _) => return None,
        _ => AddressRange::Reserved,
    })
}

fn v4_from(high: u16, low: u16) -> Ipv4Addr {
    let [[a, b], [c, d]] = [high.to_be_bytes(), low.to_be_bytes()];
    Ipv4Addr::new(a, b, c, d)
}

/// Classifies an address of 64:ff9b:1::/48, which each network translates on its own (RFC 8215).
///
/// The length of the network's prefix is unknown, and the place of the IPv4 address depends on it
/// (RFC 6052, 2.2). The strictest reading counts, and a public one is private: it leads into the
/// network of this host.
fn classify_local_translation([_, _, _, d, e, f, g, h]: [u16; 8]) -> AddressRange {
    // The bits 64 to 71 are skipped.
    let after_48 = v4_from(d, (e << 8) | (f >> 8));
    let after_56 = v4_from((d << 8) | (e & 0xff), f);
    let after_64 = v4_from((e << 8) | (f >> 8), (f << 8) | (g >> 8));
    let mut range = AddressRange::Private;
    for address in [after_48, after_56, after_64, v4_from(g, h)] {
        // Zeros are the rest of a longer prefix.
        if address.octets()[0] != 0 {
            range = stricter(Some(range), classify_v4(address)).unwrap_or(range);
        }
    }
    range
}

/// Returns the range that allows less: one that `allow_private` does not allow, one that it does,
/// and none.
fn stricter(one: Option<AddressRange>, other: Option<AddressRange>) -> Option<AddressRange> {
    match (one, other) {
        (None, range) => range,
        (Some(range), Some(other)) if range.is_private() && !other.is_private() => Some(other),
        (range, _) => range,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn special_purpose_addresses_are_classified() {
        let cases = [
            ("127.0.0.1", AddressRange::Loopback),
            ("127.255.0.9", AddressRange::Loopback),
            ("0.0.0.0", AddressRange::Reserved),
            ("10.1.2.3", AddressRange::Private),
            ("172.16.0.1", AddressRange::Private),
            ("172.31.255.255", AddressRange::Private),
            ("192.168.1.1", AddressRange::Private),
            ("100.64.0.1", AddressRange::Private),
            ("169.254.1.1", AddressRange::LinkLocal),
            ("169.254.169.254", AddressRange::Metadata),
            ("100.100.100.200", AddressRange::Metadata),
            ("168.63.129.16", AddressRange::Metadata),
            ("224.0.0.251", AddressRange::Multicast),
            ("192.0.2.1", AddressRange::Reserved),
            ("255.255.255.255", AddressRange::Reserved),
            ("::", AddressRange::Reserved),
            ("::1", AddressRange::Loopback),
            ("::7f00:1", AddressRange::Reserved),
            ("::ffff:127.0.0.1", AddressRange::Loopback),
            ("::ffff:169.254.169.254", AddressRange::Metadata),
            ("::ffff:10.0.0.1", AddressRange::Private),
            ("64:ff9b::a00:1", AddressRange::Private),
            ("64:ff9b:1::1", AddressRange::Private),
            ("2002:7f00:1::", AddressRange::Loopback),
            ("64:ff9b::a9fe:a9fe", AddressRange::Metadata),
            ("64:ff9b:1::a9fe:a9fe", AddressRange::Metadata),
            ("64:ff9b:1::a9fe:1", AddressRange::LinkLocal),
            ("64:ff9b:1:a9fe:a9:fe00::", AddressRange::Metadata),
            ("64:ff9b:1:a9:fe:a9fe::", AddressRange::Metadata),
            ("64:ff9b:1:0:a9:fea9:fe00:0", AddressRange::Metadata),
            ("64:ff9b:1::808:808", AddressRange::Private),
            ("2002:a9fe:a9fe::1", AddressRange::Metadata),
            ("2001:0:a9fe:a9fe::1", AddressRange::Reserved),
            ("::a9fe:a9fe", AddressRange::Reserved),
            ("::ffff:0:a9fe:a9fe", AddressRange::Reserved),
            ("2606:4700::5efe:a9fe:a9fe", AddressRange::Metadata),
            ("2606:4700::200:5efe:a00:1", AddressRange::Private),
            ("fd00:ec2::254", AddressRange::Metadata),
            ("fd00:ec2::253", AddressRange::Metadata),
            ("fd00:ec2::23", AddressRange::Metadata),
            ("fd00:ec2:0:1::1", AddressRange::Metadata),
            ("fd20:ce::254", AddressRange::Metadata),
            ("fd00:c1::a9fe:a9fe", AddressRange::Metadata),
            ("fd00:42::42", AddressRange::Metadata),
            ("fd12:3456::a9fe:a9fe", AddressRange::Metadata),
            ("fd12:3456::6464:64c8", AddressRange::Metadata),
            ("fd12:3456::1", AddressRange::Private),
            ("fec0::1", AddressRange::Private),
            ("fe80::1", AddressRange::LinkLocal),
            ("ff02::1", AddressRange::Multicast),
            ("2001::1", AddressRange::Reserved),
            ("2001:db8::1", AddressRange::Reserved),
            ("4000::1", AddressRange::Reserved),
        ];
        for (address, expected) in cases {
            assert_eq!(classify_address(address.parse().unwrap()), Some(expected), "{address}");
        }
    }

    #[test]
    fn other_addresses_are_public() {
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
            "2606:4700::5efe:101:101",
        ];
        for address in public {
            assert_eq!(classify_address(address.parse().unwrap()), None, "{address}");
        }
    }

    #[test]
    fn allow_private_covers_loopback_and_private_only() {
        let allowed =
            |address: &str| classify_address(address.parse().unwrap()).unwrap().is_private();
        assert!(
            allowed("127.0.0.1") && allowed("10.0.0.1") && allowed("::1") && allowed("fd12::1")
        );
        for address in [
            "169.254.169.254",
            "fd00:ec2::254",
            "fd00:ec2::23",
            "fd20:ce::254",
            "fd00:c1::a9fe:a9fe",
            "64:ff9b:1::a9fe:a9fe",
            "2002:a9fe:a9fe::",
            "169.254.0.1",
            "0.0.0.0",
            "224.0.0.1",
            "100.100.100.200",
        ] {
            assert!(!allowed(address), "{address}");
        }
    }
}
