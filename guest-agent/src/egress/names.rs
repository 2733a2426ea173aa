//! The table of allowed names and their loopback addresses, without I/O.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::rc::Rc;

use chitin_protocol::Endpoint;

use super::dns::message::Lookup;

/// The first address of 127.64.0.0/10, loopback addresses that nothing else uses.
const FIRST_ADDRESS: u32 = u32::from_be_bytes([127, 64, 0, 0]);

/// The most names that get an address. Each takes up to 300 bytes here, and only a workload that
/// invents names below a wildcard needs more. Addresses are never reused: one that a program still
/// remembers must not become another host's.
const MAX_NAMES: usize = 4096;

/// The most denied names that are reported to the host. A workload that tries more has been noticed
/// by then.
const MAX_DENIED: usize = 1024;

#[derive(Default)]
pub struct NameTable {
    /// The endpoints that may be dialled now.
    endpoints: Vec<Endpoint>,
    /// The names that have an address. The first one has the address after [`FIRST_ADDRESS`].
    names: Vec<Rc<str>>,
    /// The number of a name, from 1: its distance from [`FIRST_ADDRESS`].
    numbers: BTreeMap<Rc<str>, usize>,
    denied: BTreeSet<String>,
}

impl NameTable {
    /// Replaces the endpoints that may be dialled. Names keep their addresses.
    pub fn allow(&mut self, endpoints: Vec<Endpoint>) {
        self.endpoints = endpoints;
    }

    /// Returns the ports of all endpoints.
    pub fn ports(&self) -> BTreeSet<u16> {
        self.endpoints.iter().map(|endpoint| endpoint.port).collect()
    }

    /// Looks up a name, and assigns it an address if it has none.
    pub fn look_up(&mut self, name: &str) -> Lookup {
        if !self.endpoints.iter().any(|endpoint| endpoint.matches_host(name)) {
            return Lookup::NoSuchName;
        }
        let number = match self.numbers.get(name) {
            Some(number) => *number,
            None if self.names.len() >= MAX_NAMES => return Lookup::NoAddressLeft,
            None => {
                let name: Rc<str> = name.into();
                self.names.push(name.clone());
                self.numbers.insert(name, self.names.len());
                self.names.len()
            }
        };
        u32::try_from(number).map_or(Lookup::NoAddressLeft, |number| {
            Lookup::Address(Ipv4Addr::from_bits(FIRST_ADDRESS + number))
        })
    }

    /// Records a denied name, and returns whether to report it to the host, which is done once.
    pub fn record_denied(&mut self, name: &str) -> bool {
        self.denied.len() < MAX_DENIED && self.denied.insert(name.to_owned())
    }

    /// Returns the host that a connection to this address is meant for, if that endpoint is
    /// allowed.
    pub fn find_host(&self, address: Ipv4Addr, port: u16) -> Option<&str> {
        let name = match address {
            // Programs do not query this name, because `/etc/hosts` has it.
            Ipv4Addr::LOCALHOST => "localhost",
            _ => {
                let number = usize::try_from(address.to_bits().checked_sub(FIRST_ADDRESS)?).ok()?;
                self.names.get(number.checked_sub(1)?)?
            }
        };
        self.endpoints
            .iter()
            .any(|endpoint| endpoint.port == port && endpoint.matches_host(name))
            .then_some(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name_table(endpoints: &[(&str, bool, u16)]) -> NameTable {
        let mut names = NameTable::default();
        let endpoint =
            |&(host, wildcard, port): &(&str, _, _)| Endpoint { host: host.into(), wildcard, port };
        names.allow(endpoints.iter().map(endpoint).collect());
        names
    }

    #[test]
    fn name_keeps_its_address_in_both_directions() {
        let mut names =
            name_table(&[("a.test", false, 443), ("a.test", false, 80), ("b.test", true, 443)]);
        let first = Ipv4Addr::new(127, 64, 0, 1);
        let second = Ipv4Addr::new(127, 64, 0, 2);
        assert_eq!(names.ports().into_iter().collect::<Vec<_>>(), [80, 443]);
        assert_eq!(names.look_up("a.test"), Lookup::Address(first));
        assert_eq!(names.look_up("x.b.test"), Lookup::Address(second));
        assert_eq!(names.look_up("a.test"), Lookup::Address(first));
        assert_eq!(names.look_up("b.test"), Lookup::NoSuchName);
        assert_eq!(names.look_up(""), Lookup::NoSuchName);
        assert_eq!(
            (names.find_host(first, 80), names.find_host(first, 443)),
            (Some("a.test"), Some("a.test"))
        );
        // The port of another name; addresses that no name has.
        assert_eq!(names.find_host(second, 80), None);
        for unassigned in
            [[127, 64, 0, 0], [127, 64, 0, 3], [127, 0, 0, 1], [127, 127, 255, 255], [1, 1, 1, 1]]
        {
            assert_eq!(names.find_host(unassigned.into(), 443), None);
        }
        // A name that is not allowed any more does not exist any more.
        names.allow(vec![]);
        assert_eq!(names.find_host(first, 443), None);
        assert_eq!(names.look_up("a.test"), Lookup::NoSuchName);
    }

    #[test]
    fn localhost_keeps_its_usual_address() {
        let names = name_table(&[("localhost", false, 80), ("a.test", false, 443)]);
        assert_eq!(names.find_host(Ipv4Addr::LOCALHOST, 80), Some("localhost"));
        assert_eq!(names.find_host(Ipv4Addr::LOCALHOST, 443), None);
    }

    #[test]
    fn name_beyond_the_table_gets_no_address() {
        let mut names = name_table(&[("test", true, 1)]);
        for number in 0..MAX_NAMES {
            assert!(matches!(names.look_up(&format!("{number}.test")), Lookup::Address(_)));
        }
        assert_eq!(names.look_up("one-more.test"), Lookup::NoAddressLeft);
        assert!(matches!(names.look_up("0.test"), Lookup::Address(_)));
    }

    #[test]
    fn denied_names_are_reported_once_up_to_a_limit() {
        let mut names = name_table(&[]);
        assert!(names.record_denied("a") && !names.record_denied("a"));
        assert_eq!(
            (0..5000).filter(|number| names.record_denied(&number.to_string())).count(),
            MAX_DENIED - 1
        );
    }
}
