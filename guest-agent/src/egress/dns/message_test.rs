use super::*;

const ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 64, 0, 1);

/// Makes a query as resolvers send it, with the root's empty label after `labels`.
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
    assert_eq!(reply[2] & 0x80, 0x80, "a response");
    u16::from(reply[3] & 0xf)
}

fn must_not_look_up(name: &str) -> Lookup {
    panic!("{name} was looked up")
}

#[test]
fn allowed_name_resolves_to_an_ipv4_address_only() {
    let asked = query(&[b"Api", b"Example", b"COM"], TYPE_A);
    let find = |name: &str| {
        assert_eq!(name, "api.example.com");
        Lookup::Address(ADDRESS)
    };
    let reply = answer_query(&asked, find).unwrap();
    assert_eq!(reply[..4], [0xab, 0xcd, 0x81, 0x80]);
    assert_eq!(reply[4..12], [0, 1, 0, 1, 0, 0, 0, 0]);
    // The question keeps its case.
    assert_eq!(reply[12..asked.len()], asked[12..]);
    assert_eq!(reply[asked.len()..], [0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 127, 64, 0, 1]);
    // AAAA, HTTPS, ANY: the name exists without such a record.
    for kind in [28, 65, 255] {
        let reply =
            answer_query(&query(&[b"a", b"b"], kind), |_| Lookup::Address(ADDRESS)).unwrap();
        assert_eq!((code(&reply), &reply[6..8]), (NO_ERROR, [0, 0].as_slice()));
    }
}

#[test]
fn denied_name_does_not_exist() {
    for kind in [TYPE_A, 28] {
        let reply =
            answer_query(&query(&[b"evil", b"example"], kind), |_| Lookup::NoSuchName).unwrap();
        assert_eq!(code(&reply), NAME_ERROR);
    }
    let reply = answer_query(&query(&[b"a"], TYPE_A), |_| Lookup::NoAddressLeft).unwrap();
    assert_eq!(code(&reply), SERVER_FAILURE);
    // A name that no host can have is not looked up.
    for labels in
        [[b"a\0b".as_slice()].as_slice(), &[b"a.b"], &[], &[b"\xc3\xa4"], &[b"a b"], &[b"a", b"\0"]]
    {
        assert_eq!(
            code(&answer_query(&query(labels, TYPE_A), must_not_look_up).unwrap()),
            NAME_ERROR
        );
    }
}

#[test]
fn malformed_query_gets_an_error_code_or_no_answer() {
    let good = query(&[b"a"], TYPE_A);
    let with = |at: usize, byte: u8| {
        let mut changed = good.clone();
        changed[at] = byte;
        changed
    };
    // A response; a truncated header.
    assert_eq!(answer_query(&with(2, 0x81), must_not_look_up), None);
    for length in 0..HEADER_LEN {
        assert_eq!(answer_query(&good[..length], must_not_look_up), None);
    }
    // A status query, an update; two questions, none; a pointer; another class.
    assert_eq!(code(&answer_query(&with(2, 0x10), must_not_look_up).unwrap()), NOT_IMPLEMENTED);
    assert_eq!(code(&answer_query(&with(2, 0x28), must_not_look_up).unwrap()), NOT_IMPLEMENTED);
    assert_eq!(code(&answer_query(&with(5, 2), must_not_look_up).unwrap()), FORMAT_ERROR);
    assert_eq!(code(&answer_query(&with(5, 0), must_not_look_up).unwrap()), FORMAT_ERROR);
    assert_eq!(code(&answer_query(&with(12, 0xc0), must_not_look_up).unwrap()), FORMAT_ERROR);
    assert_eq!(code(&answer_query(&with(18, 3), must_not_look_up).unwrap()), NOT_IMPLEMENTED);
    // A question that is truncated anywhere.
    for length in HEADER_LEN..good.len() {
        assert_eq!(code(&answer_query(&good[..length], must_not_look_up).unwrap()), FORMAT_ERROR);
    }
    // 255 bytes are a name, 256 are not.
    let long = [b'a'; 63];
    let mut labels = vec![long.as_slice(); 3];
    labels.push(&long[..61]);
    let reply = answer_query(&query(&labels, TYPE_A), |name| {
        assert_eq!(name.len(), 253);
        Lookup::Address(ADDRESS)
    });
    assert_eq!(code(&reply.unwrap()), NO_ERROR);
    labels[3] = &long[..62];
    assert_eq!(
        code(&answer_query(&query(&labels, TYPE_A), must_not_look_up).unwrap()),
        FORMAT_ERROR
    );
}

#[test]
fn random_bytes_get_a_short_answer_or_none() {
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
        if bytes.len() > HEADER_LEN {
            // Most of these bytes pass the checks of the header.
            (bytes[2], bytes[4], bytes[5]) = (1, 0, 1);
            bytes[12] %= 8;
        }
        if let Some(reply) = answer_query(&bytes, |_| Lookup::Address(ADDRESS)) {
            assert!(reply.len() <= bytes.len().max(HEADER_LEN) + 16);
        }
    }
}
