//! Failures of a Docker daemon, and of images that it runs.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::thread;
use std::time::{Duration, Instant};

use chitin::TierKind;
use chitin_integration::{Chitin, Dockerd, Running, TierUnderTest, docker};
use tempfile::TempDir;

use crate::fake_daemon::{Failure, FakeDaemon, Step};
use crate::{create_empty_root, create_impostor_root, link_artifacts_without};

const TIER: TierUnderTest = TierUnderTest::new(TierKind::Nemoclaw);

/// Sets the daemon of a `chitin`.
fn with_daemon(host: &str, chitin: Chitin) -> Chitin {
    chitin.env("DOCKER_HOST", host)
}

/// Starts a daemon that responds to each request with the body for its path, or never.
fn start_impostor(dir: &TempDir, body: impl Fn(&str) -> Option<String> + Send + 'static) -> String {
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
            match body(&path) {
                Some(body) => {
                    let length = body.len();
                    let _ = write!(
                        stream,
                        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\
                         Connection: close\r\nContent-Length: {length}\r\n\r\n{body}",
                    );
                }
                None => held.push(stream),
            }
        }
    });
    format!("unix://{}", socket.display())
}

#[test]
fn missing_daemon_is_reported_with_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let gone = format!("unix://{}", dir.path().join("gone").display());
    with_daemon(&gone, TIER.run("true")).outcome().assert_refused(&gone);
    // A socket without a listener.
    let socket = dir.path().join("left");
    drop(UnixListener::bind(&socket).unwrap());
    let left = format!("unix://{}", socket.display());
    with_daemon(&left, TIER.run("true")).outcome().assert_refused("DOCKER_HOST");
}

#[test]
fn outdated_daemon_is_rejected() {
    let dir = tempfile::tempdir().unwrap();
    let host = start_impostor(&dir, |_| {
        Some(
            "{\"Version\": \"17.05.0\", \"ApiVersion\": \"1.29\", \"MinAPIVersion\": \"1.12\"}"
                .into(),
        )
    });
    with_daemon(&host, TIER.run("true")).outcome().assert_refused("API 1.29");
}

#[test]
fn hanging_daemon_times_out() {
    let dir = tempfile::tempdir().unwrap();
    let host = start_impostor(&dir, |_| None);
    let started = Instant::now();
    with_daemon(&host, TIER.run("true")).outcome().assert_refused(&host);
    assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
}

#[test]
fn socket_of_another_service_is_rejected() {
    let dir = tempfile::tempdir().unwrap();
    let host = start_impostor(&dir, |_| Some("hello".into()));
    with_daemon(&host, TIER.run("true")).outcome().assert_refused(&host);
}

#[test]
fn fallback_reports_unavailable_tier() {
    let dir = tempfile::tempdir().unwrap();
    let gone = format!("unix://{}", dir.path().join("gone").display());
    TierUnderTest::new(TierKind::Nanoclaw).run("true").outcome().assert_success();
    let outcome = with_daemon(&gone, TIER.run_with("--fallback nanoclaw -- echo ran")).outcome();
    assert_eq!(outcome.assert_success(), "ran");
    assert!(outcome.stderr.starts_with("chitin: running as nanoclaw"), "{outcome:?}");
    assert!(outcome.stderr.contains("nemoclaw") && outcome.stderr.contains(&gone), "{outcome:?}");
}

/// Time within which a daemon must have removed the containers that it ends after a restart. It
/// removes them in the background.
const REMOVAL_LIMIT: Duration = Duration::from_secs(30);

/// Asserts that the daemon has no container, or soon has none.
#[track_caller]
fn assert_no_container(dockerd: &Dockerd) {
    let deadline = Instant::now() + REMOVAL_LIMIT;
    loop {
        let left = docker::list_containers(&dockerd.host()).unwrap();
        if left.is_empty() {
            return;
        }
        assert!(Instant::now() < deadline, "{left:?}");
        thread::sleep(Duration::from_millis(50));
    }
}

/// Starts a script that prints `up`.
fn start_script(dockerd: &Dockerd, script: &str) -> Running {
    let mut running = with_daemon(&dockerd.host(), TIER.run_sh(script)).spawn();
    assert_eq!(running.read_line(), "up");
    running
}

#[test]
fn killed_daemon_ends_run() {
    let mut dockerd = Dockerd::start().unwrap();
    let mut running = start_script(&dockerd, "echo up; exec sleep 54321");
    dockerd.kill();
    assert_eq!(running.wait(), 125);
    let stderr = running.read_stderr();
    assert!(stderr.starts_with("chitin: ") && stderr.contains("Docker daemon"), "{stderr}");
    running.assert_no_process_left();
    // Without a daemon the container continues. The next daemon ends it, and works.
    dockerd.restart().unwrap();
    assert!(!has_process(b"sleep\x0054321\0"), "the workload has outlived its daemon");
    with_daemon(&dockerd.host(), TIER.run("true")).outcome().assert_success();
    assert_no_container(&dockerd);
}

/// Returns true if a process of the host has this command line.
fn has_process(line: &[u8]) -> bool {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    processes
        .into_iter()
        .any(|entry| fs::read(entry.path().join("cmdline")).is_ok_and(|found| found == line))
}

#[test]
fn stopped_daemon_ends_run() {
    let dockerd = Dockerd::start().unwrap();
    let mut running = start_script(&dockerd, "echo up; exec sleep 600");
    drop(dockerd);
    assert_eq!(running.wait(), 125);
    running.assert_no_process_left();
}

#[test]
fn image_without_agent_is_rejected() {
    let dockerd = Dockerd::start().unwrap();
    let artifacts = create_empty_root();
    let run =
        with_daemon(&dockerd.host(), TIER.run("true")).env("CHITIN_ARTIFACTS", artifacts.path());
    run.outcome().assert_refused("/init");
    assert_no_container(&dockerd);
}

#[test]
fn impostor_agent_is_rejected() {
    let dockerd = Dockerd::start().unwrap();
    let artifacts = create_impostor_root();
    let run =
        with_daemon(&dockerd.host(), TIER.run("true")).env("CHITIN_ARTIFACTS", artifacts.path());
    run.outcome().assert_refused("broke the protocol");
    assert_no_container(&dockerd);
}

#[test]
fn missing_or_damaged_archive_is_reported() {
    TIER.run_case(crate::missing_or_damaged_archive_is_reported);
}

#[test]
fn image_is_imported_once() {
    let dockerd = Dockerd::start().unwrap();
    let run = || with_daemon(&dockerd.host(), TIER.run("echo ran")).outcome();
    assert_eq!(run().assert_success(), "ran");
    // The second run does not need the archive.
    let dir = tempfile::tempdir().unwrap();
    link_artifacts_without(dir.path(), "root.tar");
    fs::write(dir.path().join("root.tar"), "").unwrap();
    let again = with_daemon(&dockerd.host(), TIER.run("echo again"))
        .env("CHITIN_ARTIFACTS", dir.path())
        .outcome();
    assert_eq!(again.assert_success(), "again");
}

#[test]
fn concurrent_cold_runs_import_one_image() {
    let dockerd = Dockerd::start().unwrap();
    let runs: Vec<Running> =
        (0..20).map(|_| with_daemon(&dockerd.host(), TIER.run("true")).spawn()).collect();
    for mut run in runs {
        let code = run.wait();
        assert_eq!(code, 0, "{}", run.read_stderr());
    }
    let images = docker::list_images(&dockerd.host()).unwrap();
    assert!(
        matches!(images.as_slice(), [image] if image.starts_with("chitin-root:")),
        "{images:?}"
    );
}

#[test]
fn prune_removes_images_of_other_roots_only() {
    let dockerd = Dockerd::start().unwrap();
    let run = || with_daemon(&dockerd.host(), TIER.run("true"));
    run().outcome().assert_success();
    let artifacts = create_impostor_root();
    run().env("CHITIN_ARTIFACTS", artifacts.path()).outcome().assert_refused("broke the protocol");
    let images = || docker::list_images(&dockerd.host()).unwrap();
    assert_eq!(images().len(), 2, "{:?}", images());
    let prune = || with_daemon(&dockerd.host(), TIER.chitin("prune --tier nemoclaw")).outcome();
    let text = prune().assert_success().to_owned();
    assert!(text.starts_with("removed image chitin-root:") && text.lines().count() == 1, "{text}");
    assert_eq!(images().len(), 1, "{:?}", images());
    assert_eq!(prune().assert_success(), "");
    run().outcome().assert_success();
}

#[test]
fn doctor_has_run_a_container() {
    let dockerd = Dockerd::start().unwrap();
    let doctor = |host: &str| {
        let outcome = with_daemon(host, Chitin::new("doctor")).outcome();
        let line = outcome.stdout_text().lines().find(|line| line.starts_with("nemoclaw"));
        line.unwrap_or_default().to_owned()
    };
    assert!(doctor(&dockerd.host()).contains("available (Docker"), "{}", doctor(&dockerd.host()));
    let images = docker::list_images(&dockerd.host()).unwrap();
    assert!(images.iter().any(|image| image.starts_with("chitin-probe:")), "{images:?}");
    assert_no_container(&dockerd);
    // A daemon that answers, and cannot run anything.
    let fake = FakeDaemon::start(Step::Start, Failure::Reset);
    let line = doctor(&fake.host());
    assert!(line.contains("not available") && line.contains("a container was tried"), "{line}");
}

#[test]
fn limits_do_not_depend_on_the_daemon() {
    let dockerd = Dockerd::start_with(&["--default-ulimit", "nofile=256:256"]).unwrap();
    let secret = with_daemon(&dockerd.host(), TIER.run_with("--secret T=env:VALUE"));
    let read = secret.env("VALUE", "abcdefgh").args(["--", "sh", "-c", "cat $T_FILE; ulimit -n"]);
    assert_eq!(read.outcome().assert_success(), "abcdefgh1024");
    // On a host with more CPUs than a sandbox may have there is nothing to refuse.
    let cpus = with_daemon(&dockerd.host(), TIER.run_with("--cpus 8 -- true")).outcome();
    match std::thread::available_parallelism().unwrap().get() {
        0..8 => cpus.assert_refused("lower --cpus"),
        8.. => drop(cpus.assert_success()),
    }
}

#[test]
fn report_has_no_jail_without_a_monitor() {
    let (outcome, report) = TIER.run_with("").outcome_with_json("--report", &["--", "true"]);
    outcome.assert_success();
    assert_eq!(report["jail"], serde_json::Value::Null);
}
