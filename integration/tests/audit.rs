//! `chitin audit`: promises hold under attack, and broken ones are detected.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use chitin::TierKind;
use chitin_integration::{
    Chitin, Dockerd, Outcome, TierUnderTest, chitin, link_artifacts, write_script,
};
use serde_json::Value;
use tempfile::TempDir;

#[test]
fn microvm_passes_audit() {
    let outcome = chitin("audit --verbose --memory 128").outcome();
    let text = outcome.assert_success();
    let held = text.lines().filter(|line| line.contains(" held ")).count();
    assert_eq!(held, 20, "{text}");
    // Evidence of two attacks shows that they ran.
    assert!(
        text.contains("CapEff 0000000000000400") && text.contains("processes, then EAGAIN"),
        "{text}"
    );
}

/// Runs an audit, and returns its JSON too.
fn run_audit(audit: Chitin) -> (Outcome, Value) {
    audit.outcome_with_json("--json", &[])
}

/// Returns the finding for a property of the first tier.
fn get_finding<'a>(report: &'a Value, property: &str) -> &'a Value {
    let findings = report["tiers"][0]["findings"].as_array().unwrap();
    findings.iter().find(|finding| finding["property"] == property).unwrap()
}

/// Counts the properties with this verdict.
fn count_verdicts(report: &Value, verdict: &str) -> usize {
    let findings = report["tiers"][0]["findings"].as_array().unwrap();
    findings.iter().filter(|finding| finding["verdict"] == verdict).count()
}

/// Asserts that every promise of a container boundary holds.
#[track_caller]
fn assert_container_passes(report: &Value) {
    let counts = (count_verdicts(report, "held"), count_verdicts(report, "not_promised"));
    assert_eq!(counts, (19, 1), "{report}");
}

/// Writes a script of this name, and returns its directory, to be searched first.
fn write_program(name: &str, script: &str) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    write_script(dir.path(), name, script).unwrap();
    let path = dir.path().to_owned();
    (dir, path)
}

mod nanoclaw {
    use super::*;

    const TIER: TierUnderTest = TierUnderTest::new(TierKind::Nanoclaw);

    #[test]
    fn gvisor_passes_audit() {
        TIER.run_case(|tier| {
            let (outcome, report) = run_audit(tier.chitin("audit --tier nanoclaw"));
            outcome.assert_success();
            let tier = &report["tiers"][0];
            assert_eq!(
                (&tier["tier"], &tier["wall"]),
                (&"nanoclaw".into(), &"gvisor".into()),
                "{report}"
            );
            assert!(tier["implementation"].as_str().unwrap().starts_with("runsc/"), "{report}");
            assert_container_passes(&report);
        });
    }

    #[test]
    fn container_passes_audit() {
        TIER.run_case(|tier| {
            let (_dir, path) = write_program("runsc", "echo it does not work here >&2; exit 1");
            let (outcome, report) =
                run_audit(tier.chitin("audit --tier nanoclaw").env("CHITIN_RUNTIME_PATH", path));
            outcome.assert_success();
            let tier = &report["tiers"][0];
            assert_eq!(tier["wall"], "namespaces", "{report}");
            assert_container_passes(&report);
            assert!(outcome.stdout_text().contains("it runs on the host's kernel"), "{outcome:?}");
        });
    }

    /// The runtime mounts a host directory into its containers in addition to their configuration.
    #[test]
    fn audit_detects_runtime_exposing_host_files() {
        TIER.run_case(|tier| {
            let (dir, path) = write_program("runsc", "exit 1");
            // The directory of the audit's file, readable to every user.
            let shown = tempfile::tempdir().unwrap();
            fs::set_permissions(shown.path(), fs::Permissions::from_mode(0o755)).unwrap();
            let mount = serde_json::json!({
                "destination": "/mnt",
                "type": "bind",
                "source": shown.path(),
                "options": ["rbind", "ro"],
            });
            for name in ["crun", "runc"] {
                let leaking = format!(
                    "prev=; for word; do
                         test \"$prev\" = --bundle &&
                             sed -i 's|\"mounts\":\\[|&{mount},|' \"$word/config.json\"
                         prev=$word
                     done
                     PATH={} exec {name} \"$@\"",
                    std::env::var("PATH").unwrap()
                );
                write_script(dir.path(), name, &leaking).unwrap();
            }
            let run = tier
                .chitin("audit --tier nanoclaw")
                .env("CHITIN_RUNTIME_PATH", path)
                .env("TMPDIR", shown.path());
            let (outcome, report) = run_audit(run);
            assert_eq!(outcome.code, 1, "{outcome:?}");
            let found = get_finding(&report, "host files");
            assert_eq!(found["verdict"], "broken", "{report}");
            assert!(found["evidence"].as_str().unwrap().contains("/mnt/chitin-audit-"), "{found}");
            assert_eq!(count_verdicts(&report, "broken"), 1, "{report}");
        });
    }
}

mod nemoclaw {
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::thread;

    use super::*;

    const TIER: TierUnderTest = TierUnderTest::new(TierKind::Nemoclaw);

    #[test]
    fn daemon_without_seccomp_filter_passes_audit() {
        let dir = tempfile::tempdir().unwrap();
        let profile = dir.path().join("allow-all.json");
        fs::write(&profile, r#"{"defaultAction": "SCMP_ACT_ALLOW"}"#).unwrap();
        let option = format!("--seccomp-profile={}", profile.display());
        let dockerd = Dockerd::start_with(&[&option]).unwrap();
        let audit = TIER.chitin("audit --tier nemoclaw").env("DOCKER_HOST", dockerd.host());
        let (outcome, report) = run_audit(audit);
        outcome.assert_success();
        assert_container_passes(&report);
    }

    #[test]
    fn container_passes_audit() {
        TIER.run_case(|tier| {
            let (outcome, report) = run_audit(tier.chitin("audit --tier nemoclaw"));
            outcome.assert_success();
            let tier = &report["tiers"][0];
            assert_eq!(
                (&tier["implementation"], &tier["wall"]),
                (&"Docker".into(), &"namespaces".into())
            );
            assert_container_passes(&report);
        });
    }

    /// Starts a proxy of a daemon that replaces a text in the requests of clients.
    fn start_proxy(host: &str, from: &'static str, to: &'static str) -> (TempDir, String) {
        assert_eq!(from.len(), to.len(), "requests contain their length");
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let listener = UnixListener::bind(&socket).unwrap();
        let upstream = host.strip_prefix("unix://").unwrap().to_owned();
        thread::spawn(move || {
            for client in listener.incoming() {
                let (client, daemon) = (client.unwrap(), UnixStream::connect(&upstream).unwrap());
                let (from_client, to_client) = (client.try_clone().unwrap(), client);
                let (from_daemon, to_daemon) = (daemon.try_clone().unwrap(), daemon);
                let replace = (from.as_bytes(), to.as_bytes());
                thread::spawn(move || relay_bytes(from_client, to_daemon, replace));
                thread::spawn(move || relay_bytes(from_daemon, to_client, (b"", b"")));
            }
        });
        (dir, format!("unix://{}", socket.display()))
    }

    fn relay_bytes(mut from: UnixStream, mut to: UnixStream, replace: (&[u8], &[u8])) {
        let (old, new) = replace;
        let mut chunk = vec![0; 1 << 16];
        while let Ok(count @ 1..) = from.read(&mut chunk) {
            let read = &mut chunk[..count];
            let found = read.windows(old.len().max(1)).position(|window| window == old);
            if let Some(at) = found {
                read[at..at + old.len()].copy_from_slice(new);
            }
            if to.write_all(read).is_err() {
                break;
            }
        }
        let _ = to.shutdown(std::net::Shutdown::Write);
    }

    #[test]
    fn audit_detects_daemon_granting_host_network() {
        TIER.run_case(|tier| {
            let real = std::env::var("DOCKER_HOST").unwrap();
            let (_dir, host) =
                start_proxy(&real, "\"NetworkMode\":\"none\"", "\"NetworkMode\":\"host\"");
            let (outcome, report) =
                run_audit(tier.chitin("audit --tier nemoclaw").env("DOCKER_HOST", host));
            assert_eq!(outcome.code, 1, "{outcome:?}");
            let found = get_finding(&report, "network");
            assert_eq!(found["verdict"], "broken", "{report}");
            assert!(
                found["evidence"].as_str().unwrap().contains("the host was connected to"),
                "{found}"
            );
        });
    }

    #[test]
    fn unavailable_tier_is_named_in_audit() {
        let gone = "unix:///nowhere/socket";
        let named = TIER.chitin("audit --tier nemoclaw").env("DOCKER_HOST", gone).outcome();
        named.assert_refused("unix:///nowhere/socket");
        // No tier is available without artifacts.
        let none = tempfile::tempdir().unwrap();
        let run = TIER
            .chitin("audit --tier all")
            .env("DOCKER_HOST", gone)
            .env("CHITIN_ARTIFACTS", none.path());
        let (outcome, report) = run_audit(run);
        assert_eq!(outcome.code, 125, "{outcome:?}");
        for tier in ["ironclaw", "nanoclaw", "nemoclaw"] {
            assert!(
                outcome.stderr.contains(&format!("chitin: {tier} was not attacked: ")),
                "{outcome:?}"
            );
            assert!(
                outcome.stdout_text().contains(&format!("\n{tier}: unavailable: ")),
                "{outcome:?}"
            );
        }
        assert_eq!(report["tiers"].as_array().unwrap().len(), 3, "{report}");
        assert!(
            report["tiers"][2]["not_here"]["reason"].as_str().unwrap().contains("Docker"),
            "{report}"
        );
    }

    #[test]
    fn audit_of_all_tiers_skips_unavailable_tier() {
        TIER.run_case(|tier| {
            // Another test attacks microVMs. Here they are unavailable even on a host with KVM.
            let without_monitor = tempfile::tempdir().unwrap();
            link_artifacts(without_monitor.path(), &["root.tar", "root.json"]).unwrap();
            let (_dir, path) = write_program("runsc", "exit 1");
            let run =
                tier.chitin("audit --tier all").env("CHITIN_ARTIFACTS", without_monitor.path());
            let (outcome, report) = run_audit(run.env("CHITIN_RUNTIME_PATH", path));
            assert_eq!(outcome.code, 0, "{outcome:?}");
            assert!(outcome.stderr.contains("chitin: ironclaw was not attacked: "), "{outcome:?}");
            assert!(outcome.stderr.contains("chitin: running as nanoclaw/"), "{outcome:?}");
            let row = |words: &[&str]| {
                outcome
                    .stdout_text()
                    .lines()
                    .any(|line| line.split_whitespace().eq(words.iter().copied()))
            };
            assert!(row(&["PROPERTY", "IRONCLAW", "NANOCLAW", "NEMOCLAW"]), "{outcome:?}");
            assert!(row(&["host", "files", "unavailable", "held", "held"]), "{outcome:?}");
            assert_eq!(report["tiers"][1]["findings"].as_array().unwrap().len(), 20, "{report}");
        });
    }
}
