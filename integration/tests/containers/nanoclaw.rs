//! Failures of a runtime, and of images that it runs.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use chitin::TierKind;
use chitin_integration::{Chitin, TierUnderTest, write_file, write_script};
use serde_json::Value;
use tempfile::TempDir;

use crate::{create_empty_root, create_impostor_root};

const TIER: TierUnderTest = TierUnderTest::new(TierKind::Nanoclaw);

/// The directory that the archive of some artifacts is unpacked to. Dropping it removes the
/// directory.
struct UnpackedRoot(PathBuf);

impl UnpackedRoot {
    fn of(artifacts: &TempDir) -> UnpackedRoot {
        let manifest = fs::read(artifacts.path().join("root.json")).unwrap();
        let manifest: Value = serde_json::from_slice(&manifest).unwrap();
        let digest = manifest["tar_sha256"].as_str().unwrap();
        UnpackedRoot(Path::new("/var/cache/chitin/images").join(digest))
    }
}

impl Drop for UnpackedRoot {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Writes a program `runsc` into a new directory. The path differs in each test, so that cached
/// results of another probe do not apply.
fn write_runsc(script: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    write_script(dir.path(), "runsc", script).unwrap();
    dir
}

/// Searches a directory with a `runsc` first.
fn with_runsc(runsc: &TempDir, chitin: Chitin) -> Chitin {
    chitin.env("CHITIN_RUNTIME_PATH", runsc.path())
}

/// Runs a command with a `runsc` that does not work, and returns exit code and report.
fn run_with_fallback(runsc: &TempDir) -> (i32, Value) {
    let run = with_runsc(runsc, TIER.run_with(""));
    let (outcome, report) = run.outcome_with_json("--report", &["--", "true"]);
    assert!(outcome.stderr.starts_with("chitin: running as nanoclaw/"), "{outcome:?}");
    assert!(outcome.stderr.contains("runsc/ptrace"), "{outcome:?}");
    (outcome.code, report)
}

#[test]
fn hanging_runtime_is_skipped_and_fallback_reported() {
    TIER.run_case(|_| {
        let started = Instant::now();
        // The program prints its version, and hangs otherwise.
        let hanging = write_runsc(
            "case $* in *--version*) echo runsc version hanging;; *) exec sleep 1000;; esac",
        );
        let (code, report) = run_with_fallback(&hanging);
        assert_eq!(code, 0, "{report}");
        let tier = report["tier"].as_str().unwrap();
        assert!(["nanoclaw/crun", "nanoclaw/runc"].contains(&tier), "{report}");
        assert!(report["isolation"]["why"].as_str().unwrap().contains("10 s"), "{report}");
        // Two limits of 10 s, and a start, next to other tests.
        assert!(started.elapsed() < Duration::from_secs(40), "{:?}", started.elapsed());
    });
}

#[test]
fn failing_runtime_is_skipped() {
    TIER.run_case(|_| {
        let broken = write_runsc("echo no such luck >&2; exit 1");
        let (code, report) = run_with_fallback(&broken);
        let tier = report["tier"].as_str().unwrap();
        assert!(code == 0 && ["nanoclaw/crun", "nanoclaw/runc"].contains(&tier), "{report}");
    });
}

#[test]
fn policy_files_are_mounted_without_gvisor() {
    TIER.run_case(|tier| {
        let broken = write_runsc("exit 1");
        let policy = tier.write_policy("");
        let dir = policy.dir.path();
        write_file(dir, "config", "settings").unwrap();
        let config = |path: &str| {
            let source = dir.join("config");
            format!("{{access: read-only, path: {path}, source: {}}}", source.display())
        };
        let files = [config("/shared/config"), config("/etc/app/config")].join(", ");
        policy.rewrite(&format!("sandbox: {{filesystem: [{files}]}}\n"));
        let script = "cat /shared/config /etc/app/config; grep -c . /etc/passwd; ls /shared; \
                      echo x >/shared/config; chmod u+w /shared/config; \
                      echo x >/shared/config; touch /etc/x; touch /x";
        let outcome = with_runsc(&broken, policy.run_sh(script)).outcome();
        assert!(outcome.stdout_text().starts_with("settingssettings"), "{outcome:?}");
        assert!(outcome.stdout_text().len() > "settingssettings".len(), "{outcome:?}");
        let lines = outcome.stderr.lines().filter(|line| !line.starts_with("chitin: "));
        let errors: Vec<&str> = lines.filter_map(|line| line.rsplit(": ").next()).collect();
        let (denied, read_only) = ("Permission denied", "Read-only file system");
        assert_eq!(errors, [denied, denied, denied, read_only, read_only], "{outcome:?}");
        // A killed run leaves its root, which the next start removes.
        let script = "echo up; exec sleep 600";
        let mut running = with_runsc(&broken, policy.run_sh(script)).spawn();
        assert_eq!(running.read_line(), "up");
        running.child.kill().unwrap();
        running.wait();
        with_runsc(&broken, tier.run("true")).outcome().assert_success();
        running.assert_no_process_left();
    });
}

#[test]
fn runtime_hanging_after_probe_times_out() {
    TIER.run_case(|tier| {
        let real = fs::canonicalize("/usr/bin/runsc").unwrap();
        let hanging = write_runsc(&format!(
            "case $* in *--version*|*delete*) exec {0} \"$@\";; esac\n\
             test -e {1} && exec sleep 1000\nexec {0} \"$@\"",
            real.display(),
            "$(dirname $0)/hang"
        ));
        // The probe succeeds.
        with_runsc(&hanging, tier.run("true")).outcome().assert_success();
        write_file(hanging.path(), "hang", "").unwrap();
        with_runsc(&hanging, tier.run("true")).outcome().assert_refused("has not answered");
        let limited = with_runsc(&hanging, tier.run_with("--timeout 3s -- true")).outcome();
        assert_eq!(limited.code, 124, "{limited:?}");
        let mut killed = with_runsc(&hanging, tier.run("true")).spawn();
        thread::sleep(Duration::from_secs(1));
        killed.child.kill().unwrap();
        killed.wait();
        fs::remove_file(hanging.path().join("hang")).unwrap();
        // The next start cleans up after the killed run.
        with_runsc(&hanging, tier.run("true")).outcome().assert_success();
        killed.assert_no_process_left();
    });
}

#[test]
fn image_without_agent_is_rejected() {
    TIER.run_case(|tier| {
        let artifacts = create_empty_root();
        let _unpacked = UnpackedRoot::of(&artifacts);
        let outcome = tier.run("true").env("CHITIN_ARTIFACTS", artifacts.path()).outcome();
        outcome.assert_refused("/init");
    });
}

#[test]
fn impostor_agent_is_rejected() {
    TIER.run_case(|tier| {
        let artifacts = create_impostor_root();
        let _unpacked = UnpackedRoot::of(&artifacts);
        tier.run("true")
            .env("CHITIN_ARTIFACTS", artifacts.path())
            .outcome()
            .assert_refused("broke the protocol");
    });
}

#[test]
fn missing_or_damaged_archive_is_reported() {
    TIER.run_case(crate::missing_or_damaged_archive_is_reported);
    TIER.run_case(|tier| {
        let artifacts = create_empty_root();
        let unpacked = UnpackedRoot::of(&artifacts);
        let archive = artifacts.path().join("root.tar");
        let mut bytes = fs::read(&archive).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs::write(&archive, bytes).unwrap();
        let run = || tier.run("true").env("CHITIN_ARTIFACTS", artifacts.path()).outcome();
        run().assert_refused("SHA-256");
        assert!(!unpacked.0.exists());
        // A truncated archive.
        fs::write(&archive, [0; 100]).unwrap();
        run().assert_refused("unpacked");
        let left: Vec<_> = fs::read_dir("/var/cache/chitin/images").unwrap().flatten().collect();
        let left =
            left.iter().filter(|entry| entry.file_name().to_string_lossy().contains(".partial-"));
        assert_eq!(left.count(), 0);
    });
}

#[test]
fn runtime_in_inherited_path_is_not_run() {
    TIER.run_case(|tier| {
        let user = write_runsc(&format!("touch {}", "$(dirname $0)/ran"));
        let path = format!("{}:{}", user.path().display(), std::env::var("PATH").unwrap());
        tier.run("true").env("PATH", path).outcome().assert_success();
        assert!(!user.path().join("ran").exists());
        // A program that others can replace is refused, and the next one is run.
        fs::set_permissions(user.path(), fs::Permissions::from_mode(0o777)).unwrap();
        with_runsc(&user, tier.run("true")).outcome().assert_success();
        assert!(!user.path().join("ran").exists());
    });
}

#[test]
fn root_is_closed_to_other_users_and_nosuid() {
    TIER.run_case(|tier| {
        let broken = write_runsc("exit 1");
        let script = "grep -E '^([^ ]+ ){4}/ ' /proc/self/mountinfo; exec sleep 600";
        let mut running = with_runsc(&broken, tier.run_sh(script)).spawn();
        let mount = running.read_line();
        for flag in ["ro", "nosuid", "nodev"] {
            assert!(mount.split([' ', ',']).any(|found| found == flag), "{mount}");
        }
        for path in ["/var/cache/chitin/images/", "/run/chitin/bundles/", "/run/chitin/mounts/"] {
            let list = ["--reuid", "1000", "--regid", "1000", "--clear-groups", "ls", path];
            let listed = Command::new("setpriv").args(list).output().unwrap();
            let stderr = String::from_utf8_lossy(&listed.stderr);
            assert!(stderr.contains("Permission denied"), "{path}: {listed:?}");
        }
        running.child.kill().unwrap();
        running.wait();
        with_runsc(&broken, tier.run("true")).outcome().assert_success();
    });
}

#[test]
fn concurrent_containers_have_distinct_users() {
    TIER.run_case(|tier| {
        let broken = write_runsc("exit 1");
        let script = "cat /proc/self/uid_map; read line";
        let mut running: Vec<_> = (0..3)
            .map(|_| {
                let mut run = with_runsc(&broken, tier.run_sh(script));
                run.command().stdin(std::process::Stdio::piped());
                run.spawn()
            })
            .collect();
        let maps: BTreeSet<String> = running.iter_mut().map(|run| run.read_line()).collect();
        assert_eq!(maps.len(), 3, "{maps:?}");
        for run in &mut running {
            drop(run.child.stdin.take());
            run.wait();
        }
    });
}

#[test]
fn unprivileged_user_is_rejected() {
    let mut run = TIER.run("true");
    let program = run.command().get_program().to_owned();
    let output = Command::new("setpriv")
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
        .arg(program)
        .args(["run", "--tier", "nanoclaw", "--", "true"])
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{stderr}");
    assert!(stderr.contains("as root"), "{stderr}");
}
