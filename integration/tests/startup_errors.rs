//! What cannot be done is said in one line, with what to do, and exit code 125; nothing is left behind.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::process::Command;

use chitin_integration::{chitin, file, run, workspace};

/// A directory of artifacts in which one has been replaced.
fn artifacts(dir: &Path, replaced: &str) {
    let built = workspace().join("target/artifacts");
    for name in ["vmlinux", "root.img"] {
        if name != replaced {
            std::os::unix::fs::symlink(built.join(name), dir.join(name)).expect("link an artifact");
        }
    }
}

#[test]
fn options_that_do_not_exist() {
    chitin("run --nosuch -- true").outcome().refused("--nosuch");
    chitin("nosuch").outcome().refused("nosuch");
    chitin("run").outcome().refused("<CMD>");
}

#[test]
fn a_kernel_that_is_none() {
    let dir = tempfile::tempdir().unwrap();
    artifacts(dir.path(), "vmlinux");
    run("true").env("CHITIN_ARTIFACTS", dir.path()).outcome().refused("cargo xtask kernel");
    for content in [b"".as_slice(), b"MZ not an ELF", &[0x7f, b'E', b'L', b'F', 2, 1, 1, 0]] {
        file(dir.path(), "vmlinux", content).unwrap();
        run("true").env("CHITIN_ARTIFACTS", dir.path()).outcome().refused("vmlinux");
    }
    // Cut off in the middle of a segment.
    let kernel = fs::read(workspace().join("target/artifacts/vmlinux")).unwrap();
    file(dir.path(), "vmlinux", &kernel[..kernel.len() / 3]).unwrap();
    run("true").env("CHITIN_ARTIFACTS", dir.path()).outcome().refused("vmlinux");
}

#[test]
fn a_root_image_that_is_cut_off() {
    let dir = tempfile::tempdir().unwrap();
    artifacts(dir.path(), "root.img");
    run("true").env("CHITIN_ARTIFACTS", dir.path()).outcome().refused("cargo xtask rootfs");
    let image = fs::read(workspace().join("target/artifacts/root.img")).unwrap();
    for length in [0, 100, 4096, 2 << 20, image.len() - 1, image.len() - (2 << 20)] {
        file(dir.path(), "root.img", &image[..length]).unwrap();
        run("true").env("CHITIN_ARTIFACTS", dir.path()).outcome().refused("root.img");
    }
}

#[test]
fn a_missing_monitor() {
    run("true").env("CHITIN_VMM", "/nonexistent/chitin-vmm").outcome().refused("cargo xtask build");
    // One that is no monitor at all.
    run("true")
        .env("CHITIN_VMM", "/bin/true")
        .outcome()
        .refused("the monitor ended without a word");
}

#[test]
fn no_permission_on_dev_kvm() {
    let kvm = Path::new("/dev/kvm");
    let before = fs::metadata(kvm).unwrap();
    // Somebody else's, and the one who runs may not override that; everybody else does not notice.
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
fn a_guest_that_panics_is_heard() {
    let dir = tempfile::tempdir().unwrap();
    artifacts(dir.path(), "root.img");
    // An image with nothing in it to be started.
    let empty = dir.path().join("empty");
    fs::create_dir_all(empty.join("dev")).unwrap();
    let image = dir.path().join("root.img");
    let made = Command::new("mkfs.erofs").arg(&image).arg(&empty).output().unwrap();
    assert!(made.status.success(), "{made:?}");
    File::options().write(true).open(&image).unwrap().set_len(2 << 20).unwrap();

    let outcome = run("true").env("CHITIN_ARTIFACTS", dir.path()).outcome();
    assert_eq!(outcome.code, 125, "{outcome:?}");
    assert!(
        outcome.stderr.starts_with("chitin: the guest ended before it was told to"),
        "{}",
        outcome.stderr
    );
    assert!(outcome.stderr.contains("Kernel panic - not syncing"), "{}", outcome.stderr);
}

#[test]
fn a_report_that_cannot_be_written() {
    chitin("run --report /nonexistent/r.json -- true")
        .outcome()
        .refused("write /nonexistent/r.json");
}
