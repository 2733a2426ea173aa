use std::ffi::OsStr;

use super::*;

#[test]
fn a_name_cannot_forge_a_line_or_steer_a_terminal() {
    let cases: [(&[u8], &str); 5] = [
        (b"/plain/na me", "/plain/na me"),
        ("/ünï/日本".as_bytes(), "/ünï/日本"),
        (b"/a\nb\x1b[2J\x7f", "/a\\nb\\u{1b}[2J\\u{7f}"),
        (b"/a\xff\xc3", "/a\\xff\\xc3"),
        ("/a\u{202e}txt.exe\u{2028}".as_bytes(), "/a\\u{202e}txt.exe\\u{2028}"),
    ];
    for (name, shown) in cases {
        assert_eq!(Shown(Path::new(OsStr::from_bytes(name))).to_string(), shown);
    }
}

#[test]
fn errors_read_as_one_line() {
    let refused =
        Error::Refused { path: "/tmp/x.sock".into(), refusal: Refusal::Special(Kind::Socket) };
    assert_eq!(refused.to_string(), "copy /tmp/x.sock: a socket cannot be copied");
    let refusal = Refusal::InTheWay { there: Kind::Directory, comes: Kind::File };
    let refused = Error::Refused { path: "/d".into(), refusal };
    assert_eq!(refused.to_string(), "copy /d: a file does not replace the directory that is there");
    assert_eq!(refused.errno(), Errno::ISDIR.raw_os_error());
    let early = Error::EndedEarly { path: "out/a".into() };
    assert_eq!(early.to_string(), "copy out/a: the copy ended early");
    assert!(early.is_broken_stream() && !refused.is_broken_stream());
}
