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
fn launch_survives_the_wire() {
    assert_eq!(Launch::decode(&sample().encode()), Ok(sample()));
}

#[test]
fn launch_cut_anywhere_is_refused() {
    let bytes = sample().encode();
    for len in 0..bytes.len() {
        assert_eq!(Launch::decode(&bytes[..len]), Err(BadLaunch), "{len} bytes");
    }
}

#[test]
fn launch_with_trailing_bytes_or_without_command_is_refused() {
    let mut bytes = sample().encode();
    bytes.push(0);
    assert_eq!(Launch::decode(&bytes), Err(BadLaunch));
    assert_eq!(Launch::decode(&Launch { argv: vec![], ..sample() }.encode()), Err(BadLaunch));
}

#[test]
fn reports_survive_the_wire() {
    for report in [
        Report::Started,
        Report::Exited { code: 137, stdout: 16 << 20, stderr: 0 },
        Report::Failed { code: NOT_FOUND, message: "nosuch: no such command".into() },
    ] {
        assert_eq!(report.to_string().parse(), Ok(report));
    }
}

#[test]
fn a_failure_stays_one_line() {
    let report = Report::Failed { code: 125, message: "a\nb".into() };
    assert_eq!(report.to_string(), "failed 125 a b");
}

#[test]
fn other_lines_are_no_reports() {
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
        assert_eq!(line.parse::<Report>(), Err(BadReport), "{line:?}");
    }
}
