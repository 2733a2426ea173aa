use super::*;

#[test]
fn uris_are_parsed() {
    let pool = "'http://archive/pool";
    let text = format!(
        "{pool}/a/attr/libattr1_2.5.1-4_amd64.deb' libattr1_1%3a2.5.1-4_amd64.deb 22164 SHA256:ab\n\
         {pool}/p/pcre2/libpcre2-8-0_10.42-1%2bdeb12u2_amd64.deb' \
         libpcre2-8-0_10.42-1+deb12u2_amd64.deb 261628 \n\
         \n\
         {pool}/n/netbase_6.4_all.deb' netbase_6.4_all.deb 12800 MD5Sum:cd\n"
    );
    let found = |name: &str, version: &str, sha256: Option<&str>| Found {
        name: name.into(),
        version: version.into(),
        sha256: sha256.map(Into::into),
    };
    assert_eq!(
        parse_uris(&text).unwrap(),
        [
            found("libattr1", "1:2.5.1-4", Some("ab")),
            found("libpcre2-8-0", "10.42-1+deb12u2", None),
            found("netbase", "6.4", None)
        ]
    );
}

#[test]
fn unknown_line_is_an_error() {
    for line in [
        "dash",
        "'http://archive/dash.deb' dash.deb 5 SHA256:ab",
        "'x' dash_0.5_amd64.tar 5 SHA256:ab",
    ] {
        assert!(parse_uris(line).is_err(), "{line}");
    }
}

#[test]
fn package_without_sha256_is_refused() {
    let found = |sha256: Option<&str>| Found {
        name: "dash".into(),
        version: "0.5".into(),
        sha256: sha256.map(Into::into),
    };
    assert!(found(None).into_pin().is_err());
    assert!(found(Some("ab")).into_pin().is_err());
    assert!(found(Some(&"ab".repeat(32))).into_pin().is_ok());
}

#[test]
fn file_of_a_version_with_epoch_is_found() {
    let directory = tempfile::tempdir().unwrap();
    let pin = Pin { name: "libattr1".into(), version: "1:2.5.1-4".into(), sha256: "ab".repeat(32) };
    assert!(find_package_file(directory.path(), &pin).is_err());
    let file = directory.path().join("libattr1_1%3a2.5.1-4_amd64.deb");
    fs::write(&file, "").unwrap();
    assert_eq!(find_package_file(directory.path(), &pin).unwrap(), file);
}

#[test]
fn release_file_must_be_of_debian_and_the_suite() {
    let release = "Origin: Debian\nLabel: Debian-Security\nCodename: bookworm-security\n";
    assert!(is_release(release, "bookworm-security"));
    assert!(!is_release(release, "bookworm"));
    assert!(!is_release("Origin: Other\nCodename: bookworm\n", "bookworm"));
}
