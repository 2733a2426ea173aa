//! Which name stands at which address. Policy without I/O.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::rc::Rc;

use chitin_protocol::Endpoint;

use super::dns::message::Found;

/// 127.64.0.0/10: addresses of the loopback interface that nothing else uses.
const FIRST: u32 = u32::from_be_bytes([127, 64, 0, 0]);

/// Names that get an address. Each takes up to 300 bytes here, and only a workload that makes names below a wildcard up
/// needs more. None is taken back: an address that somebody still remembers must not become another host's.
const MAX_NAMES: usize = 4096;

/// Refused names that the host is told of. A workload that tries more is known by then.
const MAX_DENIED: usize = 1024;

/// Names and their addresses.
#[derive(Default)]
pub struct Names {
    endpoints: Vec<Endpoint>,
    names: Vec<Rc<str>>,
    numbers: BTreeMap<Rc<str>, usize>,
    denied: BTreeSet<String>,
}

impl Names {
    /// From now on these are what may be dialled. Addresses stay.
    pub fn allow(&mut self, endpoints: Vec<Endpoint>) {
        self.endpoints = endpoints;
    }

    /// The ports that anything is at, each once.
    pub fn ports(&self) -> BTreeSet<u16> {
        self.endpoints.iter().map(|endpoint| endpoint.port).collect()
    }

    /// Looks a name up, and gives it an address if it has none.
    pub fn find(&mut self, name: &str) -> Found {
        if !self.endpoints.iter().any(|endpoint| endpoint.matches_host(name)) {
            return Found::Nothing;
        }
        let number = match self.numbers.get(name) {
            Some(number) => *number,
            None if self.names.len() >= MAX_NAMES => return Found::NoRoom,
            None => {
                let name: Rc<str> = name.into();
                self.names.push(name.clone());
                self.numbers.insert(name, self.names.len());
                self.names.len()
            }
        };
        u32::try_from(number)
            .map_or(Found::NoRoom, |number| Found::Address(Ipv4Addr::from_bits(FIRST + number)))
    }

    /// Whether the host is to be told that this name was refused: once.
    pub fn denied(&mut self, name: &str) -> bool {
        self.denied.len() < MAX_DENIED && self.denied.insert(name.to_owned())
    }

    /// What a connection to this address is meant for, if that may be.
    pub fn at(&self, address: Ipv4Addr, port: u16) -> Option<&str> {
        let name = match address {
            // Programs do not ask for it: `/etc/hosts` says where it is.
            Ipv4Addr::LOCALHOST => "localhost",
            _ => {
                let number = usize::try_from(address.to_bits().checked_sub(FIRST)?).ok()?;
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

    fn names(endpoints: &[(&str, bool, u16)]) -> Names {
        let mut names = Names::default();
        let endpoint =
            |&(host, wildcard, port): &(&str, _, _)| Endpoint { host: host.into(), wildcard, port };
        names.allow(endpoints.iter().map(endpoint).collect());
        names
    }

    #[test]
    fn a_name_keeps_its_address_and_leads_back_from_it() {
        let mut names =
            names(&[("a.test", false, 443), ("a.test", false, 80), ("b.test", true, 443)]);
        let first = Ipv4Addr::new(127, 64, 0, 1);
        let second = Ipv4Addr::new(127, 64, 0, 2);
        assert_eq!(names.ports().into_iter().collect::<Vec<_>>(), [80, 443]);
        assert_eq!(names.find("a.test"), Found::Address(first));
        assert_eq!(names.find("x.b.test"), Found::Address(second));
        assert_eq!(names.find("a.test"), Found::Address(first));
        assert_eq!(names.find("b.test"), Found::Nothing);
        assert_eq!(names.find(""), Found::Nothing);
        assert_eq!((names.at(first, 80), names.at(first, 443)), (Some("a.test"), Some("a.test")));
        // The right name at another's port; addresses of nobody.
        assert_eq!(names.at(second, 80), None);
        for nobody in
            [[127, 64, 0, 0], [127, 64, 0, 3], [127, 0, 0, 1], [127, 127, 255, 255], [1, 1, 1, 1]]
        {
            assert_eq!(names.at(nobody.into(), 443), None);
        }
        // What is no longer allowed is no longer there, and comes back at the same place.
        names.allow(vec![]);
        assert_eq!(names.at(first, 443), None);
        assert_eq!(names.find("a.test"), Found::Nothing);
    }

    #[test]
    fn localhost_is_where_it_always_is() {
        let names = names(&[("localhost", false, 80), ("a.test", false, 443)]);
        assert_eq!(names.at(Ipv4Addr::LOCALHOST, 80), Some("localhost"));
        assert_eq!(names.at(Ipv4Addr::LOCALHOST, 443), None);
    }

    #[test]
    fn names_end_where_the_table_does() {
        let mut names = names(&[("test", true, 1)]);
        for number in 0..MAX_NAMES {
            assert!(matches!(names.find(&format!("{number}.test")), Found::Address(_)));
        }
        assert_eq!(names.find("one-more.test"), Found::NoRoom);
        assert!(matches!(names.find("0.test"), Found::Address(_)));
    }

    #[test]
    fn a_refused_name_is_told_once_and_not_for_ever() {
        let mut names = names(&[]);
        assert!(names.denied("a") && !names.denied("a"));
        assert_eq!(
            (0..5000).filter(|number| names.denied(&number.to_string())).count(),
            MAX_DENIED - 1
        );
    }
}
