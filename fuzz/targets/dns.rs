//! The resolver in the sandbox: a query of any program, and the answer to it.
#![no_main]

use std::net::Ipv4Addr;

use chitin_agent::dns::message::{Lookup, MAX_QUERY, answer_query};
use libfuzzer_sys::fuzz_target;

const HEADER_BYTES: usize = 12;

/// A pointer to the name, type, class, TTL, length and address.
const RECORD_BYTES: usize = 16;

fuzz_target!(|data: &[u8]| {
    let Some((found, query)) = data.split_first() else { return };
    // The server passes no more than this.
    let query = &query[..query.len().min(MAX_QUERY)];
    let found = match found % 3 {
        0 => Lookup::Address(Ipv4Addr::new(127, 64, 0, 1)),
        1 => Lookup::NoSuchName,
        _ => Lookup::NoAddressLeft,
    };
    let mut asked = None;
    let answer = answer_query(query, |name| {
        asked = Some(name.to_owned());
        found
    });
    if let Some(name) = &asked {
        assert!((1..=253).contains(&name.len()));
        assert!(name.split('.').all(|label| (1..=63).contains(&label.len())));
        let may_be_in_host = |c: char| matches!(c, 'a'..='z' | '0'..='9' | '-' | '_' | '.');
        assert!(name.chars().all(may_be_in_host), "{name:?}");
    }
    let Some(answer) = answer else {
        assert!(asked.is_none());
        assert!(query.len() < HEADER_BYTES || query[2] & 0x80 != 0);
        return;
    };
    assert_eq!(answer[..2], query[..2], "the identifier");
    assert_eq!(answer[2] & 0x80, 0x80, "a response");
    let records = usize::from(answer[7]);
    let has_address = matches!(found, Lookup::Address(_)) && asked.is_some();
    assert!(records <= usize::from(has_address));
    let question = &answer[HEADER_BYTES..answer.len() - records * RECORD_BYTES];
    assert!(question.is_empty() || query[HEADER_BYTES..].starts_with(question));
    assert_eq!(answer[4..6], [0, u8::from(!question.is_empty())]);
    // Answers are not answered.
    assert_eq!(answer_query(&answer, |_| unreachable!()), None);
});
