use super::*;

const ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 64, 0, 1);

/// A query as resolvers send it, with the root's empty label behind `labels`.
fn query(labels: &[&[u8]], kind: u16) -> Vec<u8> {
    let mut query = vec![0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in labels {
        query.push(u8::try_from(label.len()).unwrap());
        query.extend_from_slice(label);
    }
    query.push(0);
    query.extend_from_slice(&kind.to_be_bytes());
    query.extend_from_slice(&[0, 1]);
    query
}

fn code(reply: &[u8]) -> u16 {
    assert_eq!(reply[2] & 0x80, 0x80, "an answer");
    u16::from(reply[3] & 0xf)
}

fn never(name: &str) -> Found {
    panic!("{name} was looked up")
}

#[test]
fn an_allowed_name_has_an_address_and_nothing_else() {
    let asked = query(&[b"Api", b"Example", b"COM"], TYPE_A);
    let find = |name: &str| {
        assert_eq!(name, "api.example.com");
        Found::Address(ADDRESS)
    };
    let reply = answer(&asked, find).unwrap();
    assert_eq!(reply[..4], [0xab, 0xcd, 0x81, 0x80]);
    assert_eq!(reply[4..12], [0, 1, 0, 1, 0, 0, 0, 0]);
    // The case of the question is kept.
    assert_eq!(reply[12..asked.len()], asked[12..]);
    assert_eq!(reply[asked.len()..], [0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 127, 64, 0, 1]);
    // AAAA, HTTPS, ANY: the name is there, that is not.
    for kind in [28, 65, 255] {
        let reply = answer(&query(&[b"a", b"b"], kind), |_| Found::Address(ADDRESS)).unwrap();
        assert_eq!((code(&reply), &reply[6..8]), (NO_ERROR, [0, 0].as_slice()));
    }
}

#[test]
fn other_names_are_not_there() {
    for kind in [TYPE_A, 28] {
        let reply = answer(&query(&[b"evil", b"example"], kind), |_| Found::Nothing).unwrap();
        assert_eq!(code(&reply), NO_SUCH_NAME);
    }
    let reply = answer(&query(&[b"a"], TYPE_A), |_| Found::NoRoom).unwrap();
    assert_eq!(code(&reply), SERVER_FAILURE);
    // What is no host's name is not even looked up.
    for labels in
        [[b"a\0b".as_slice()].as_slice(), &[b"a.b"], &[], &[b"\xc3\xa4"], &[b"a b"], &[b"a", b"\0"]]
    {
        assert_eq!(code(&answer(&query(labels, TYPE_A), never).unwrap()), NO_SUCH_NAME);
    }
}

#[test]
fn what_is_no_question_gets_the_code_for_it_or_silence() {
    let good = query(&[b"a"], TYPE_A);
    let with = |at: usize, byte: u8| {
        let mut changed = good.clone();
        changed[at] = byte;
        changed
    };
    // An answer; a header cut short.
    assert_eq!(answer(&with(2, 0x81), never), None);
    for length in 0..HEADER {
        assert_eq!(answer(&good[..length], never), None);
    }
    // A status query, an update; two questions, none; a pointer; another class.
    assert_eq!(code(&answer(&with(2, 0x10), never).unwrap()), NOT_IMPLEMENTED);
    assert_eq!(code(&answer(&with(2, 0x28), never).unwrap()), NOT_IMPLEMENTED);
    assert_eq!(code(&answer(&with(5, 2), never).unwrap()), FORMAT_ERROR);
    assert_eq!(code(&answer(&with(5, 0), never).unwrap()), FORMAT_ERROR);
    assert_eq!(code(&answer(&with(12, 0xc0), never).unwrap()), FORMAT_ERROR);
    assert_eq!(code(&answer(&with(18, 3), never).unwrap()), NOT_IMPLEMENTED);
    // Cut short anywhere in the question.
    for length in HEADER..good.len() {
        assert_eq!(code(&answer(&good[..length], never).unwrap()), FORMAT_ERROR);
    }
    // 255 bytes are a name, 256 are not.
    let long = [b'a'; 63];
    let mut labels = vec![long.as_slice(); 3];
    labels.push(&long[..61]);
    let reply = answer(&query(&labels, TYPE_A), |name| {
        assert_eq!(name.len(), 253);
        Found::Address(ADDRESS)
    });
    assert_eq!(code(&reply.unwrap()), NO_ERROR);
    labels[3] = &long[..62];
    assert_eq!(code(&answer(&query(&labels, TYPE_A), never).unwrap()), FORMAT_ERROR);
}

#[test]
fn noise_is_answered_briefly_or_not_at_all() {
    // xorshift: the same noise on every run.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[0]
    };
    for round in 0..200_000_usize {
        let mut bytes: Vec<u8> = (0..round % 64).map(|_| random()).collect();
        if bytes.len() > HEADER {
            // Most of it gets past the header.
            (bytes[2], bytes[4], bytes[5]) = (1, 0, 1);
            bytes[12] %= 8;
        }
        if let Some(reply) = answer(&bytes, |_| Found::Address(ADDRESS)) {
            assert!(reply.len() <= bytes.len().max(HEADER) + 16);
        }
    }
}
