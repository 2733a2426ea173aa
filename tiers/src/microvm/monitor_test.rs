use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;

use super::*;

/// A program that takes the place of a monitor: it reads the specification, and fails.
const FAILING_MONITOR: &str = r#"#!/bin/sh
/bin/dd bs=65536 count=1 >/dev/null 2>&1
printf '{"event":"failed","code":"kvm_permission","error":"open /dev/kvm"}' >&0
"#;

#[tokio::test]
async fn failure_code_of_the_monitor_reaches_the_caller() {
    let dir = tempfile::tempdir().unwrap();
    let monitor = dir.path().join("monitor");
    fs::write(&monitor, FAILING_MONITOR).unwrap();
    fs::set_permissions(&monitor, Permissions::from_mode(0o755)).unwrap();
    let artifacts = Artifacts { kernel: "kernel".into(), root_image: "image".into(), monitor };
    let spec = VmSpec::new("kernel", "image");
    let (mut monitor, _channel) = launch_monitor(&artifacts, &spec, None).unwrap();
    let end = monitor.wait_for_end().await;
    let MonitorEnd::Failed { code, message } = end else { panic!("{end:?}") };
    assert_eq!((code, message.as_str()), (FailureCode::KvmPermission, "open /dev/kvm"));
}
