//! The wire format, byte for byte.
//!
//! A change here is a change of the protocol. It needs a review, a line in `docs/protocol.md`, and
//! a higher `VERSION` once a release has shipped.

use chitin_protocol::{
    Confine, Delivery, Endpoint, Exit, Failure, FileRule, ReachedLimits, Reseed, Secret,
    SecretBytes, Start, StartError, SystemCalls, ToGuest, ToHost, Usage,
};

#[test]
fn wire_format_matches_snapshot() {
    let start = Start {
        process: 1,
        argv: vec![b"sh".to_vec()],
        env: vec![(b"K".to_vec(), b"V".to_vec())],
        cwd: b"/".to_vec(),
        uid: 1000,
        gid: 1000,
        stdin: Some(2),
        stdout: 4,
        stderr: 6,
    };
    let secret = Secret {
        request: 3,
        name: "T".into(),
        value: SecretBytes::new(vec![9]),
        delivery: Delivery::Env,
    };
    let reseed = Reseed {
        request: 7,
        entropy: SecretBytes::new(vec![1, 2]),
        unix_ns: 300,
        instance: [3; 16],
    };
    let confine = Confine {
        request: 8,
        system_calls: SystemCalls::DefaultDeny,
        files: Some(vec![FileRule { path: b"/a".to_vec(), writable: true }]),
        max_tasks: Some(9),
        max_disk: None,
    };
    let endpoints = vec![Endpoint { host: "a.b".into(), wildcard: true, port: 443 }];
    let to_guest = [
        (ToGuest::Start(start), "0001010273680101 4b0156012fe807e807010204 06"),
        (ToGuest::Signal { process: 1, signal: 15 }, "01010f"),
        (ToGuest::Secret(secret), "02030154010901"),
        (ToGuest::Put { request: 4, path: b"/a".to_vec(), stream: 8 }, "0304022f6108"),
        (ToGuest::Get { request: 5, path: b"/a".to_vec(), stream: 10 }, "0405022f610a"),
        (ToGuest::Freeze { request: 6 }, "0506"),
        (ToGuest::Confine(confine), "0708 01 01 01022f6101 0109 00"),
        (ToGuest::Reseed(reseed), "0607 02 0102 ac02 03030303030303030303030303030303"),
        (ToGuest::Egress { request: 8, endpoints }, "0808 01 03612e62 01 bb03"),
        (ToGuest::Connect { request: 9, port: 80, stream: 12 }, "0909 50 0c"),
        (ToGuest::Revoke { request: 10, name: "T".into() }, "0a0a 0154"),
    ];
    let failure = Failure { operation: "open /a".into(), errno: 2 };
    let not_started = Exit::NotStarted { error: StartError::NotFound, failure: failure.clone() };
    let reached = ReachedLimits { oom_kills: 300, refused_tasks: 4, disk_full: true };
    let usage = Usage { user_us: 1, system_us: 2, max_rss_kib: 3, reached };
    let to_host = [
        (ToHost::Ready { started_ns: 1, ready_ns: 300 }, "0001ac02"),
        (ToHost::Exited { process: 1, exit: Exit::Code(7), usage }, "01010007010203 ac02 04 01"),
        (ToHost::Exited { process: 1, exit: Exit::Signal(9), usage }, "01010109010203 ac02 04 01"),
        (
            ToHost::Exited { process: 1, exit: not_started, usage },
            "01010200076f70656e202f6104010203 ac02 04 01",
        ),
        (ToHost::Done { request: 4, result: Ok(()) }, "020400"),
        (ToHost::Done { request: 4, result: Err(failure) }, "020401076f70656e202f6104"),
        (ToHost::Dial { host: "a.b".into(), port: 443, stream: 3 }, "03 03612e62 bb03 03"),
        (ToHost::Denied { host: "c".into() }, "04 0163"),
    ];
    let hex = |bytes: Vec<u8>| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    for (message, wire) in to_guest {
        assert_eq!(
            hex(postcard::to_allocvec(&message).unwrap()),
            wire.replace(' ', ""),
            "{message:?}"
        );
    }
    for (message, wire) in to_host {
        assert_eq!(
            hex(postcard::to_allocvec(&message).unwrap()),
            wire.replace(' ', ""),
            "{message:?}"
        );
    }
}

#[test]
fn wildcard_matches_subdomains_only() {
    let endpoint = |wildcard| Endpoint { host: "example.com".into(), wildcard, port: 443 };
    assert!(
        endpoint(false).matches_host("example.com")
            && !endpoint(false).matches_host("a.example.com")
    );
    for (host, named) in [
        ("a.example.com", true),
        ("a.b.example.com", true),
        ("example.com", false),
        (".example.com", false),
        ("badexample.com", false),
        ("a.example.com.", false),
        ("a.example.co", false),
    ] {
        assert_eq!(endpoint(true).matches_host(host), named, "{host}");
    }
}
