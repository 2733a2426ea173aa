use std::ffi::OsStr;

use super::*;

#[test]
fn control_characters_in_path_are_escaped() {
    let cases: [(&[u8], &str); 5] = [
        (b"/plain/na me", "/plain/na me"),
        ("/ünï/日本".as_bytes(), "/ünï/日本"),
        (b"/a\nb\x1b[2J\x7f", "/a\\nb\\u{1b}[2J\\u{7f}"),
        (b"/a\xff\xc3", "/a\\xff\\xc3"),
        ("/a\u{202e}txt.exe\u{2028}".as_bytes(), "/a\\u{202e}txt.exe\\u{2028}"),
    ];
    for (name, shown) in cases {
        assert_eq!(EscapedPath(Path::new(OsStr::from_bytes(name))).to_string(), shown);
    }
}

#[test]
fn errors_display_on_one_line() {
    let refused = Error::Refused {
        path: "/tmp/x.sock".into(),
        refusal: Refusal::UnsupportedKind(FileKind::Socket),
    };
    assert_eq!(refused.to_string(), "copy /tmp/x.sock: a socket cannot be copied");
    let refusal = Refusal::KindMismatch { existing: FileKind::Directory, incoming: FileKind::File };
    let refused = Error::Refused { path: "/d".into(), refusal };
    assert_eq!(refused.to_string(), "copy /d: a file cannot replace the existing directory");
    assert_eq!(refused.errno(), Errno::ISDIR.raw_os_error());
    let early = Error::EndedEarly { path: "out/a".into() };
    assert_eq!(early.to_string(), "copy out/a: the copy ended early");
    assert!(early.is_broken_stream() && !refused.is_broken_stream());
}
