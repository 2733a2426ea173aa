//! Errors of a start: one line with the remedy, exit code 125, and nothing left behind.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::process::Command;

use chitin_integration::{chitin, link_artifacts, run, workspace_dir, write_file};

#[test]
fn unknown_option_is_rejected() {
    chitin("run --nosuch -- true").outcome().assert_usage_error("--nosuch");
    chitin("run --memroy 1G -- true").outcome().assert_usage_error("'--memory'");
    chitin("ru -- true").outcome().assert_usage_error("'run'");
    chitin("nosuch").outcome().assert_usage_error("nosuch");
    chitin("run").outcome().assert_usage_error("<CMD>");
}

#[test]
fn invalid_kernel_is_rejected() {
    let dir = tempfile::tempdir().unwrap();
    link_artifacts(dir.path(), &["root.img"]).unwrap();
    run("true").env("CHITIN_ARTIFACTS", dir.path()).outcome().assert_refused("cargo xtask kernel");
    for content in [b"".as_slice(), b"MZ not an ELF", &[0x7f, b'E', b'L', b'F', 2, 1, 1, 0]] {
        write_file(dir.path(), "vmlinux", content).unwrap();
        run("true").env("CHITIN_ARTIFACTS", dir.path()).outcome().assert_refused("vmlinux");
    }
    // Truncated in the middle of a segment.
    let kernel = fs::read(workspace_dir().join("target/artifacts/vmlinux")).unwrap();
    write_file(dir.path(), "vmlinux", &kernel[..kernel.len() / 3]).unwrap();
    run("true").env("CHITIN_ARTIFACTS", dir.path()).outcome().assert_refused("vmlinux");
}

#[test]
fn truncated_root_image_is_rejected() {
    let dir = tempfile::tempdir().unwrap();
    link_artifacts(dir.path(), &["vmlinux"]).unwrap();
    run("true").env("CHITIN_ARTIFACTS", dir.path()).outcome().assert_refused("cargo xtask rootfs");
    let image = fs::read(workspace_dir().join("target/artifacts/root.img")).unwrap();
    for length in [0, 100, 4096, 2 << 20, image.len() - 1, image.len() - (2 << 20)] {
        write_file(dir.path(), "root.img", &image[..length]).unwrap();
        run("true").env("CHITIN_ARTIFACTS", dir.path()).outcome().assert_refused("root.img");
    }
}

#[test]
fn missing_monitor_is_reported() {
    run("true")
        .env("CHITIN_VMM", "/nonexistent/chitin-vmm")
        .outcome()
        .assert_refused("cargo xtask build");
    // Another program in its place.
    run("true").env("CHITIN_VMM", "/bin/true").outcome().assert_refused("the monitor ended");
}

#[test]
fn missing_kvm_permission_is_reported() {
    let kvm = Path::new("/dev/kvm");
    let before = fs::metadata(kvm).unwrap();
    // The device belongs to another user, and the run lacks the capabilities to override that. Runs
    // of other tests have them.
    fs::set_permissions(kvm, fs::Permissions::from_mode(0o600)).unwrap();
    chown(kvm, Some(65534), None).expect("run the tests as root, or in `cargo xtask test`");
    let mut chitin = run("true");
    let path = chitin.command().get_program().to_owned();
    let output = Command::new("setpriv")
        .args([
            "--bounding-set=-dac_override,-dac_read_search",
            "--inh-caps=-dac_override,-dac_read_search",
        ])
        .arg(path)
        .args(["run", "--", "true"])
        .output();
    chown(kvm, Some(before.uid()), Some(before.gid())).unwrap();
    fs::set_permissions(kvm, before.permissions()).unwrap();
    let output = output.unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(125), "{stderr}");
    assert!(stderr.contains("/dev/kvm") && stderr.contains("group"), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
}

#[test]
fn guest_panic_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    link_artifacts(dir.path(), &["vmlinux"]).unwrap();
    // An image without an init program.
    let empty = dir.path().join("empty");
    fs::create_dir_all(empty.join("dev")).unwrap();
    let image = dir.path().join("root.img");
    let made = Command::new("mkfs.erofs").arg(&image).arg(&empty).output().unwrap();
    assert!(made.status.success(), "{made:?}");
    File::options().write(true).open(&image).unwrap().set_len(2 << 20).unwrap();

    let run = chitin("run").env("CHITIN_ARTIFACTS", dir.path());
    let (outcome, report) = run.outcome_with_json("--report", &["--", "true"]);
    assert_eq!((outcome.code, &report["cause"]), (125, &"guest_panic".into()), "{outcome:?}");
    assert!(outcome.stderr.starts_with("chitin: the guest ended"), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("Kernel panic - not syncing"), "{}", outcome.stderr);
}

#[test]
fn unwritable_report_is_an_error() {
    chitin("run --report /nonexistent/r.json -- true")
        .outcome()
        .assert_refused("/nonexistent/r.json");
}
