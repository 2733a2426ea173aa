use super::*;

fn sample() -> Launch {
    Launch {
        argv: vec![b"sh".to_vec(), b"-c".to_vec(), b"exit \xff\0 7".to_vec()],
        env: vec![b"A=1".to_vec(), b"B=".to_vec()],
        cwd: b"/work".to_vec(),
        shares: vec![b"/work/target/nested-out".to_vec()],
        preload: vec![],
    }
}

#[test]
fn launch_decodes_to_itself() {
    assert_eq!(Launch::decode(&sample().encode()), Ok(sample()));
}

#[test]
fn truncated_launch_is_refused() {
    let bytes = sample().encode();
    for len in 0..bytes.len() {
        assert_eq!(Launch::decode(&bytes[..len]), Err(InvalidLaunch), "{len} bytes");
    }
}

#[test]
fn launch_with_rest_or_no_command_is_refused() {
    let mut bytes = sample().encode();
    bytes.push(0);
    assert_eq!(Launch::decode(&bytes), Err(InvalidLaunch));
    assert_eq!(Launch::decode(&Launch { argv: vec![], ..sample() }.encode()), Err(InvalidLaunch));
}

#[test]
fn report_parses_to_itself() {
    for report in [
        Report::Started,
        Report::Exited { code: 137, stdout: 16 << 20, stderr: 0 },
        Report::Failed { code: NOT_FOUND, message: "nosuch: no such command".into() },
    ] {
        assert_eq!(report.to_string().parse(), Ok(report));
    }
}

#[test]
fn failure_is_one_line() {
    let report = Report::Failed { code: 125, message: "a\nb".into() };
    assert_eq!(report.to_string(), "failed 125 a b");
}

#[test]
fn other_line_is_not_a_report() {
    for line in [
        "",
        "start",
        "started now",
        "exited",
        "exited 7",
        "exited 256 0 0",
        "exited 1 0 0 0",
        "failed 1",
    ] {
        assert_eq!(line.parse::<Report>(), Err(InvalidReport), "{line:?}");
    }
}
