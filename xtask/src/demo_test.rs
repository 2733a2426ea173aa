use super::*;

const KEY: &[u8] = b"Jefe";
const CONTENT: &str = "what do ya want for nothing?";
/// RFC 4231, test case 2.
const MAC: &str = "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843";

fn write_report(json: &str, md: &str, signatures: &str) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for (name, content) in [("report.json", json), ("report.md", md), (SIGNATURES, signatures)] {
        fs::write(directory.path().join(name), content).unwrap();
    }
    directory
}

fn error_of(json: &str, md: &str, signatures: &str) -> String {
    let report = write_report(json, md, signatures);
    format!("{:#}", check_report(report.path(), KEY).expect_err("a bad report"))
}

#[test]
fn report_signed_with_the_token_is_accepted() {
    let good = write_report(CONTENT, CONTENT, &format!("{MAC}  report.json\n{MAC}  report.md\n"));
    check_report(good.path(), KEY).unwrap();
    assert!(check_report(good.path(), b"other").is_err());
}

#[test]
fn unsigned_or_leaking_report_is_refused() {
    let signatures = format!("{MAC}  report.json\n{MAC}  report.md\n");
    assert!(error_of(CONTENT, "changed", &signatures).contains("the signature of report.md"));
    assert!(error_of("Jefe", CONTENT, &signatures).contains("report.json contains the token"));
    assert!(
        error_of(CONTENT, CONTENT, &format!("{signatures}Jefe\n"))
            .contains("report.hmac contains the token")
    );
    for bad in ["", "  report.json", "zz  report.json", "é  report.json", "123  report.json", MAC]
    {
        assert!(check_report(write_report(CONTENT, CONTENT, bad).path(), KEY).is_err(), "{bad:?}");
    }
}

#[test]
fn missing_report_is_named() {
    let empty = tempfile::tempdir().unwrap();
    let error = format!("{:#}", check_report(empty.path(), KEY).expect_err("no report"));
    assert!(error.contains(SIGNATURES), "{error}");
}
