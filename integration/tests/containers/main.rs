//! What can be wrong with a container tier: with its daemon, its runtime, the image. Each is a clear error, exit code 125, and
//! nothing is left behind.
#![allow(
    clippy::unwrap_used,
    reason = "a test ends at the first thing that is not as it should be"
)]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use chitin::TierKind;
use chitin_integration::{Chitin, Dockerd, On, Running, file, workspace};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

/// Artifacts whose root has nothing in it to be started.
fn empty_root() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["dev", "dev/shm", "proc", "sys", "work", "tmp"] {
        fs::create_dir_all(dir.path().join("root").join(name)).unwrap();
    }
    sealed(dir)
}

/// Artifacts like the real ones, but for an agent that greets in a language of its own.
fn impostor_for_an_agent() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    fs::create_dir(&root).unwrap();
    let archive = workspace().join("target/artifacts/root.tar");
    let unpacked =
        Command::new("tar").arg("-C").arg(&root).arg("-xf").arg(archive).status().unwrap();
    assert!(unpacked.success());
    let agent = root.join("init");
    fs::remove_file(&agent).unwrap();
    fs::write(&agent, "#!/bin/sh\nwhile echo I am your agent, believe me; do :; done\n").unwrap();
    fs::set_permissions(&agent, fs::Permissions::from_mode(0o755)).unwrap();
    sealed(dir)
}

/// Packs the root in there.
fn sealed(dir: TempDir) -> TempDir {
    let archive = dir.path().join("root.tar");
    let root = dir.path().join("root");
    let made = Command::new("tar")
        .arg("-C")
        .arg(&root)
        .arg("-cf")
        .arg(&archive)
        .arg(".")
        .status()
        .unwrap();
    assert!(made.success());
    let digest = format!("{:x}", Sha256::digest(fs::read(&archive).unwrap()));
    fs::write(dir.path().join("root.json"), format!("{{\"tar_sha256\": \"{digest}\"}}")).unwrap();
    dir
}

/// The directory that the archive of these artifacts is unpacked to; dropping it removes that.
struct Unpacked(PathBuf);

impl Unpacked {
    fn of(artifacts: &TempDir) -> Unpacked {
        let manifest = fs::read(artifacts.path().join("root.json")).unwrap();
        let manifest: Value = serde_json::from_slice(&manifest).unwrap();
        Unpacked(
            Path::new("/var/cache/chitin/roots").join(manifest["tar_sha256"].as_str().unwrap()),
        )
    }
}

impl Drop for Unpacked {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn linked_artifacts(dir: &Path, without: &str) {
    let built = workspace().join("target/artifacts");
    for name in ["root.tar", "root.json", "root.img", "vmlinux"] {
        if name != without {
            symlink(built.join(name), dir.join(name)).unwrap();
        }
    }
}

fn an_archive_that_is_missing_or_damaged_is_named(on: On) {
    for name in ["root.tar", "root.json"] {
        let dir = tempfile::tempdir().unwrap();
        linked_artifacts(dir.path(), name);
        let run = || on.run("true").env("CHITIN_ARTIFACTS", dir.path()).outcome();
        run().refused("cargo xtask rootfs");
        if name == "root.json" {
            file(dir.path(), name, "{\"tar_sha256\": \"../../../etc\"}").unwrap();
            run().refused("no SHA-256");
        }
    }
}

mod nanoclaw {
    use super::*;

    const ON: On = On { tier: TierKind::Nanoclaw };

    /// A directory with a program `runsc`, which is found before that of the system. What it says of itself is new each time, so
    /// that what is remembered of another one does not count.
    fn runsc(script: &str) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        let path = file(dir.path(), "runsc", format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
        dir
    }

    fn with(runsc: &TempDir, chitin: Chitin) -> Chitin {
        let path = std::env::var("PATH").unwrap();
        chitin.env("PATH", format!("{}:{path}", runsc.path().display()))
    }

    fn report(runsc: &TempDir) -> (i32, Value) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("report.json");
        let outcome = with(runsc, ON.with("--report").arg(&path).args(["--", "true"])).outcome();
        assert!(outcome.stderr.starts_with("chitin: running as nanoclaw/"), "{outcome:?}");
        assert!(outcome.stderr.contains("runsc/ptrace does not work: "), "{outcome:?}");
        let report =
            fs::read(&path).unwrap_or_else(|error| panic!("no report: {error}: {outcome:?}"));
        (outcome.code, serde_json::from_slice(&report).unwrap())
    }

    #[test]
    fn a_runtime_that_hangs_is_passed_over_and_the_other_is_reported_as_what_it_is() {
        ON.check(|_| {
            let started = Instant::now();
            // It says who it is, and then nothing more.
            let hanging = runsc(
                "case $* in *--version*) echo runsc version hanging;; *) exec sleep 1000;; esac",
            );
            let (code, report) = report(&hanging);
            assert_eq!(code, 0, "{report}");
            let tier = report["tier"].as_str().unwrap();
            assert!(["nanoclaw/crun", "nanoclaw/runc"].contains(&tier), "{report}");
            assert!(
                report["isolation"]["why"].as_str().unwrap().contains("not answered for 10 s"),
                "{report}"
            );
            assert!(started.elapsed() < Duration::from_secs(25), "{:?}", started.elapsed());
        });
    }

    #[test]
    fn a_runtime_that_fails_is_passed_over() {
        ON.check(|_| {
            let broken = runsc("echo no such luck >&2; exit 1");
            let (code, report) = report(&broken);
            let tier = report["tier"].as_str().unwrap();
            assert!(code == 0 && ["nanoclaw/crun", "nanoclaw/runc"].contains(&tier), "{report}");
        });
    }

    #[test]
    fn without_gvisor_a_policy_has_places_for_its_files() {
        ON.check(|on| {
            let broken = runsc("exit 1");
            let policy = on.policy("");
            let dir = policy.dir.path();
            file(dir, "config", "settings").unwrap();
            let config = |path: &str| {
                let source = dir.join("config");
                format!("{{access: read-only, path: {path}, source: {}}}", source.display())
            };
            let files = format!("[{}, {}]", config("/shared/config"), config("/etc/app/config"));
            fs::write(&policy.path, format!("runtime: nanoclaw\nsandbox: {{filesystem: {files}}}\n")).unwrap();
            let script = "cat /shared/config /etc/app/config; grep -c . /etc/passwd; ls /shared; echo x >/shared/config; \
                          chmod u+w /shared/config; echo x >/shared/config; touch /etc/x; touch /x";
            let outcome = with(&broken, policy.sh(script)).outcome();
            assert!(outcome.text().starts_with("settingssettings"), "{outcome:?}");
            assert!(outcome.text().len() > "settingssettings".len(), "{outcome:?}");
            let lines = outcome.stderr.lines().filter(|line| !line.starts_with("chitin: "));
            let said: Vec<&str> = lines.filter_map(|line| line.rsplit(": ").next()).collect();
            let (denied, read_only) = ("Permission denied", "Read-only file system");
            assert_eq!(said, [denied, denied, denied, read_only, read_only], "{outcome:?}");
            // Killed, it leaves its root to the next start.
            let script = "echo up; exec sleep 600";
            let mut running = with(&broken, policy.sh(script)).spawn();
            assert_eq!(running.line(), "up");
            running.child.kill().unwrap();
            running.wait();
            with(&broken, on.run("true")).outcome().ok();
            running.assert_nothing_left();
        });
    }

    #[test]
    fn a_runtime_that_hangs_later_is_given_up() {
        ON.check(|on| {
            let real = fs::canonicalize("/usr/bin/runsc").unwrap();
            let hanging = runsc(&format!(
                "case $* in *--version*|*delete*) exec {0} \"$@\";; esac\n\
                 test -e {1} && exec sleep 1000\nexec {0} \"$@\"",
                real.display(),
                "$(dirname $0)/hang"
            ));
            // It works when it is tried out.
            with(&hanging, on.run("true")).outcome().ok();
            file(hanging.path(), "hang", "").unwrap();
            with(&hanging, on.run("true")).outcome().refused("has not answered for");
            let limited = with(&hanging, on.with("--timeout 3s -- true")).outcome();
            assert_eq!(limited.code, 124, "{limited:?}");
            let mut killed = with(&hanging, on.run("true")).spawn();
            thread::sleep(Duration::from_secs(1));
            killed.child.kill().unwrap();
            killed.wait();
            fs::remove_file(hanging.path().join("hang")).unwrap();
            // The next start clears up behind the one that could not.
            with(&hanging, on.run("true")).outcome().ok();
            killed.assert_nothing_left();
        });
    }

    #[test]
    fn an_image_without_the_agent_is_refused() {
        ON.check(|on| {
            let artifacts = empty_root();
            let _unpacked = Unpacked::of(&artifacts);
            let outcome = on.run("true").env("CHITIN_ARTIFACTS", artifacts.path()).outcome();
            outcome.refused("/init");
        });
    }

    #[test]
    fn an_agent_that_is_none_is_ended() {
        ON.check(|on| {
            let artifacts = impostor_for_an_agent();
            let _unpacked = Unpacked::of(&artifacts);
            on.run("true")
                .env("CHITIN_ARTIFACTS", artifacts.path())
                .outcome()
                .refused("broke the protocol");
        });
    }

    #[test]
    fn an_archive_that_is_missing_or_damaged_is_named() {
        ON.check(super::an_archive_that_is_missing_or_damaged_is_named);
        ON.check(|on| {
            let artifacts = empty_root();
            let unpacked = Unpacked::of(&artifacts);
            let archive = artifacts.path().join("root.tar");
            let mut bytes = fs::read(&archive).unwrap();
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
            fs::write(&archive, bytes).unwrap();
            let run = || on.run("true").env("CHITIN_ARTIFACTS", artifacts.path()).outcome();
            run().refused("its SHA-256 is");
            assert!(!unpacked.0.exists());
            // Cut off.
            fs::write(&archive, [0; 100]).unwrap();
            run().refused("root cannot be unpacked");
            let left: Vec<_> = fs::read_dir("/var/cache/chitin/roots").unwrap().flatten().collect();
            let left = left
                .iter()
                .filter(|entry| entry.file_name().to_string_lossy().contains(".partial-"));
            assert_eq!(left.count(), 0);
        });
    }

    #[test]
    fn it_needs_root() {
        let mut run = ON.run("true");
        let program = run.command().get_program().to_owned();
        let output = Command::new("setpriv")
            .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
            .arg(program)
            .args(["run", "--tier", "nanoclaw", "--", "true"])
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(125), "{stderr}");
        assert!(stderr.contains("run chitin as root, or use nemoclaw"), "{stderr}");
    }
}

mod nemoclaw {
    use super::*;

    const ON: On = On { tier: TierKind::Nemoclaw };

    fn with(host: &str, chitin: Chitin) -> Chitin {
        chitin.env("DOCKER_HOST", host)
    }

    /// A daemon that answers each request with what is returned for its path, or never.
    fn impostor(dir: &TempDir, answer: impl Fn(&str) -> Option<String> + Send + 'static) -> String {
        let socket = dir.path().join("socket");
        let listener = UnixListener::bind(&socket).unwrap();
        thread::spawn(move || {
            let mut held = Vec::new();
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut lines =
                    BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
                let Some(request) = lines.next() else { continue };
                lines.find(String::is_empty);
                let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
                match answer(&path) {
                    Some(body) => {
                        let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close";
                        let _ = write!(
                            stream,
                            "{head}\r\nContent-Length: {}\r\n\r\n{body}",
                            body.len()
                        );
                    }
                    None => held.push(stream),
                }
            }
        });
        format!("unix://{}", socket.display())
    }

    #[test]
    fn a_daemon_that_is_down_is_named_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let gone = format!("unix://{}", dir.path().join("gone").display());
        with(&gone, ON.run("true")).outcome().refused("no Docker daemon answers at");
        // One that has left its socket.
        let socket = dir.path().join("left");
        drop(UnixListener::bind(&socket).unwrap());
        let left = format!("unix://{}", socket.display());
        with(&left, ON.run("true")).outcome().refused("DOCKER_HOST");
    }

    #[test]
    fn a_daemon_that_is_too_old_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let host = impostor(&dir, |_| {
            Some(
                "{\"Version\": \"17.05.0\", \"ApiVersion\": \"1.29\", \"MinAPIVersion\": \"1.12\"}"
                    .into(),
            )
        });
        with(&host, ON.run("true")).outcome().refused("speaks API 1.29, and 1.41 is needed");
    }

    #[test]
    fn a_daemon_that_hangs_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let host = impostor(&dir, |_| None);
        let started = Instant::now();
        with(&host, ON.run("true")).outcome().refused("has not answered for");
        assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
    }

    #[test]
    fn something_else_behind_the_socket_is_no_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let host = impostor(&dir, |_| Some("hello".into()));
        with(&host, ON.run("true")).outcome().refused("no Docker daemon answers at");
    }

    #[test]
    fn a_fallback_says_what_it_passes_over() {
        let dir = tempfile::tempdir().unwrap();
        let gone = format!("unix://{}", dir.path().join("gone").display());
        On { tier: TierKind::Nanoclaw }.run("true").outcome().ok();
        let outcome = with(&gone, ON.with("--fallback nanoclaw -- echo ran")).outcome();
        assert_eq!(outcome.ok(), "ran");
        assert!(outcome.stderr.starts_with("chitin: running as nanoclaw"), "{outcome:?}");
        assert!(outcome.stderr.contains("no nemoclaw: no Docker daemon answers at"), "{outcome:?}");
    }

    fn start(dockerd: &Dockerd, script: &str) -> Running {
        let mut running = with(&dockerd.host(), ON.sh(script)).spawn();
        assert_eq!(running.line(), "up");
        running
    }

    #[test]
    fn a_daemon_that_dies_in_mid_run_ends_the_run() {
        let mut dockerd = Dockerd::start().unwrap();
        let mut running = start(&dockerd, "echo up; exec sleep 54321");
        dockerd.kill();
        assert_eq!(running.wait(), 125);
        let mut said = String::new();
        running.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert!(said.starts_with("chitin: ") && said.contains("Docker daemon"), "{said}");
        running.assert_nothing_left();
        // Nobody is there to end the container. The next daemon does, and works.
        dockerd.restart().unwrap();
        assert!(!runs_somewhere(b"sleep\x0054321\0"), "the workload has outlived its daemon");
        with(&dockerd.host(), ON.run("true")).outcome().ok();
        let left = chitin_integration::docker::containers(&dockerd.host()).unwrap();
        assert!(left.is_empty(), "{left:?}");
    }

    /// Whether any process of the host has this command line.
    fn runs_somewhere(line: &[u8]) -> bool {
        let processes = fs::read_dir("/proc").unwrap().flatten();
        processes
            .into_iter()
            .any(|entry| fs::read(entry.path().join("cmdline")).is_ok_and(|found| found == line))
    }

    #[test]
    fn a_daemon_that_is_stopped_ends_the_run() {
        let dockerd = Dockerd::start().unwrap();
        let mut running = start(&dockerd, "echo up; exec sleep 600");
        drop(dockerd);
        assert_eq!(running.wait(), 125);
        running.assert_nothing_left();
    }

    #[test]
    fn an_image_without_the_agent_is_refused() {
        let dockerd = Dockerd::start().unwrap();
        let artifacts = empty_root();
        let run = with(&dockerd.host(), ON.run("true")).env("CHITIN_ARTIFACTS", artifacts.path());
        run.outcome().refused("/init");
        let left = chitin_integration::docker::containers(&dockerd.host()).unwrap();
        assert!(left.is_empty(), "{left:?}");
    }

    #[test]
    fn an_agent_that_is_none_is_ended() {
        let dockerd = Dockerd::start().unwrap();
        let artifacts = impostor_for_an_agent();
        let run = with(&dockerd.host(), ON.run("true")).env("CHITIN_ARTIFACTS", artifacts.path());
        run.outcome().refused("broke the protocol");
        let left = chitin_integration::docker::containers(&dockerd.host()).unwrap();
        assert!(left.is_empty(), "{left:?}");
    }

    #[test]
    fn an_archive_that_is_missing_or_damaged_is_named() {
        ON.check(super::an_archive_that_is_missing_or_damaged_is_named);
    }

    #[test]
    fn an_image_is_imported_once() {
        let dockerd = Dockerd::start().unwrap();
        let run = || with(&dockerd.host(), ON.run("echo ran")).outcome();
        assert_eq!(run().ok(), "ran");
        // The archive is not needed any more.
        let dir = tempfile::tempdir().unwrap();
        linked_artifacts(dir.path(), "root.tar");
        fs::write(dir.path().join("root.tar"), "").unwrap();
        let again = with(&dockerd.host(), ON.run("echo again"))
            .env("CHITIN_ARTIFACTS", dir.path())
            .outcome();
        assert_eq!(again.ok(), "again");
    }
}
