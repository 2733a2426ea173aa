//! What is promised holds under attack, and what does not hold is found.
#![allow(
    clippy::unwrap_used,
    reason = "a test ends at the first thing that is not as it should be"
)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use chitin::TierKind;
use chitin_integration::{Chitin, On, Outcome, chitin, file};
use serde_json::Value;
use tempfile::TempDir;

#[test]
fn every_promise_of_a_microvm_holds() {
    let outcome = chitin("audit --verbose --memory 128").outcome();
    let text = outcome.ok();
    let held = text.lines().filter(|line| line.contains(" held ")).count();
    assert_eq!(held, 19, "{text}");
    // The attacks were made: these two say what they saw.
    assert!(
        text.contains("CapEff 0000000000000400") && text.contains("processes, then EAGAIN"),
        "{text}"
    );
}

/// An audit, and what it has written as JSON.
fn audited(audit: Chitin) -> (Outcome, Value) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("audit.json");
    let outcome = audit.arg("--json").arg(&path).outcome();
    let report = fs::read(&path).unwrap_or_else(|error| panic!("no report: {error}: {outcome:?}"));
    (outcome, serde_json::from_slice(&report).unwrap())
}

/// What became of a property of the tier that was attacked.
fn finding<'a>(report: &'a Value, property: &str) -> &'a Value {
    let findings = report["tiers"][0]["findings"].as_array().unwrap();
    findings.iter().find(|finding| finding["property"] == property).unwrap()
}

/// Properties with this verdict.
fn count(report: &Value, verdict: &str) -> usize {
    let findings = report["tiers"][0]["findings"].as_array().unwrap();
    findings.iter().filter(|finding| finding["verdict"] == verdict).count()
}

/// A directory with a program of this name and text, and the variable that has it found before that of the system.
fn program(name: &str, script: &str) -> (TempDir, String) {
    let dir = tempfile::tempdir().unwrap();
    add(dir.path(), name, script);
    let path = format!("{}:{}", dir.path().display(), std::env::var("PATH").unwrap());
    (dir, path)
}

fn add(dir: &Path, name: &str, script: &str) {
    let path = file(dir, name, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

mod nanoclaw {
    use super::*;

    const ON: On = On { tier: TierKind::Nanoclaw };

    #[test]
    fn every_promise_of_gvisor_holds() {
        ON.check(|on| {
            let (outcome, report) = audited(on.bare("audit --tier nanoclaw"));
            outcome.ok();
            let tier = &report["tiers"][0];
            assert_eq!(
                (&tier["tier"], &tier["wall"]),
                (&"nanoclaw".into(), &"gvisor".into()),
                "{report}"
            );
            assert!(tier["implementation"].as_str().unwrap().starts_with("runsc/"), "{report}");
            assert_eq!(
                (count(&report, "held"), count(&report, "not_promised")),
                (18, 1),
                "{report}"
            );
        });
    }

    #[test]
    fn every_promise_of_a_container_holds() {
        ON.check(|on| {
            let (_dir, path) = program("runsc", "echo it does not work here >&2; exit 1");
            let (outcome, report) = audited(on.bare("audit --tier nanoclaw").env("PATH", path));
            outcome.ok();
            let tier = &report["tiers"][0];
            assert_eq!(tier["wall"], "namespaces", "{report}");
            assert_eq!(
                (count(&report, "held"), count(&report, "not_promised")),
                (18, 1),
                "{report}"
            );
            assert!(outcome.text().contains("it runs on the host's kernel"), "{outcome:?}");
        });
    }

    /// A runtime that gives its containers a directory of the host on top of what it was told.
    #[test]
    fn a_runtime_that_shows_files_of_the_host_is_found_out() {
        ON.check(|on| {
            let (dir, path) = program("runsc", "exit 1");
            // Where the audit puts its file, and open to all.
            let shown = tempfile::tempdir().unwrap();
            fs::set_permissions(shown.path(), fs::Permissions::from_mode(0o755)).unwrap();
            for name in ["crun", "runc"] {
                let leaking = format!(
                    "prev=; for word; do
                         test \"$prev\" = --bundle && sed -i 's|\"mounts\":\\[|&{{\"destination\":\"/mnt\",\"type\":\"bind\",\"source\":\"{}\",\"options\":[\"rbind\",\"ro\"]}},|' \"$word/config.json\"
                         prev=$word
                     done
                     PATH={} exec {name} \"$@\"",
                    shown.path().display(),
                    std::env::var("PATH").unwrap()
                );
                add(dir.path(), name, &leaking);
            }
            let run = on.bare("audit --tier nanoclaw").env("PATH", path).env("TMPDIR", shown.path());
            let (outcome, report) = audited(run);
            assert_eq!(outcome.code, 1, "{outcome:?}");
            let found = finding(&report, "host files");
            assert_eq!(found["verdict"], "broken", "{report}");
            assert!(found["evidence"].as_str().unwrap().contains("/mnt/chitin-audit-"), "{found}");
            assert_eq!(count(&report, "broken"), 1, "{report}");
        });
    }
}

mod nemoclaw {
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::thread;

    use super::*;

    const ON: On = On { tier: TierKind::Nemoclaw };

    #[test]
    fn every_promise_of_a_container_holds() {
        ON.check(|on| {
            let (outcome, report) = audited(on.bare("audit --tier nemoclaw"));
            outcome.ok();
            let tier = &report["tiers"][0];
            assert_eq!(
                (&tier["implementation"], &tier["wall"]),
                (&"Docker".into(), &"namespaces".into())
            );
            assert_eq!(
                (count(&report, "held"), count(&report, "not_promised")),
                (18, 1),
                "{report}"
            );
        });
    }

    /// In front of a daemon, and replaces what its clients ask for.
    fn before(host: &str, asked: &'static str, instead: &'static str) -> (TempDir, String) {
        assert_eq!(asked.len(), instead.len(), "the length is said beforehand");
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let listener = UnixListener::bind(&socket).unwrap();
        let behind = host.strip_prefix("unix://").unwrap().to_owned();
        thread::spawn(move || {
            for client in listener.incoming() {
                let (client, daemon) = (client.unwrap(), UnixStream::connect(&behind).unwrap());
                let (from_client, to_client) = (client.try_clone().unwrap(), client);
                let (from_daemon, to_daemon) = (daemon.try_clone().unwrap(), daemon);
                thread::spawn(move || {
                    carry(from_client, to_daemon, asked.as_bytes(), instead.as_bytes())
                });
                thread::spawn(move || carry(from_daemon, to_client, b"", b""));
            }
        });
        (dir, format!("unix://{}", socket.display()))
    }

    fn carry(mut from: UnixStream, mut to: UnixStream, asked: &[u8], instead: &[u8]) {
        let mut chunk = vec![0; 1 << 16];
        while let Ok(count @ 1..) = from.read(&mut chunk) {
            let read = &mut chunk[..count];
            let found = read.windows(asked.len().max(1)).position(|window| window == asked);
            if let Some(at) = found {
                read[at..at + asked.len()].copy_from_slice(instead);
            }
            if to.write_all(read).is_err() {
                break;
            }
        }
        let _ = to.shutdown(std::net::Shutdown::Write);
    }

    #[test]
    fn a_daemon_that_gives_the_hosts_network_is_found_out() {
        ON.check(|on| {
            let real = std::env::var("DOCKER_HOST").unwrap();
            let (_dir, host) =
                before(&real, "\"NetworkMode\":\"none\"", "\"NetworkMode\":\"host\"");
            let (outcome, report) =
                audited(on.bare("audit --tier nemoclaw").env("DOCKER_HOST", host));
            assert_eq!(outcome.code, 1, "{outcome:?}");
            let found = finding(&report, "network");
            assert_eq!(found["verdict"], "broken", "{report}");
            assert!(
                found["evidence"].as_str().unwrap().contains("the host was connected to"),
                "{found}"
            );
        });
    }

    #[test]
    fn a_tier_that_is_not_here_is_refused_by_name_and_named_among_all() {
        let gone = "unix:///nowhere/socket";
        let named = ON.bare("audit --tier nemoclaw").env("DOCKER_HOST", gone).outcome();
        named.refused("no Docker daemon answers at unix:///nowhere/socket");
        // Without artifacts no tier is.
        let none = tempfile::tempdir().unwrap();
        let run = ON
            .bare("audit --tier all")
            .env("DOCKER_HOST", gone)
            .env("CHITIN_ARTIFACTS", none.path());
        let (outcome, report) = audited(run);
        assert_eq!(outcome.code, 125, "{outcome:?}");
        for tier in ["ironclaw", "nanoclaw", "nemoclaw"] {
            assert!(
                outcome.stderr.contains(&format!("chitin: {tier} was not attacked: ")),
                "{outcome:?}"
            );
            assert!(outcome.text().contains(&format!("\n{tier}: unavailable: ")), "{outcome:?}");
        }
        assert_eq!(report["tiers"].as_array().unwrap().len(), 3, "{report}");
        assert!(
            report["tiers"][2]["not_here"]["reason"].as_str().unwrap().contains("Docker"),
            "{report}"
        );
    }

    #[test]
    fn an_audit_of_all_tiers_leaves_out_the_one_that_is_not_here() {
        ON.check(|on| {
            // KVM, where this host has any, is attacked by a test of its own.
            let without_monitor = tempfile::tempdir().unwrap();
            for name in ["root.tar", "root.json"] {
                let built = chitin_integration::workspace().join("target/artifacts").join(name);
                std::os::unix::fs::symlink(built, without_monitor.path().join(name)).unwrap();
            }
            let (_dir, path) = program("runsc", "exit 1");
            let run = on.bare("audit --tier all").env("CHITIN_ARTIFACTS", without_monitor.path());
            let (outcome, report) = audited(run.env("PATH", path));
            assert_eq!(outcome.code, 0, "{outcome:?}");
            assert!(outcome.stderr.contains("chitin: ironclaw was not attacked: "), "{outcome:?}");
            assert!(outcome.stderr.contains("chitin: running as nanoclaw/"), "{outcome:?}");
            let row = |words: &[&str]| {
                outcome.text().lines().any(|line| line.split_whitespace().eq(words.iter().copied()))
            };
            assert!(row(&["PROPERTY", "IRONCLAW", "NANOCLAW", "NEMOCLAW"]), "{outcome:?}");
            assert!(row(&["host", "files", "not", "here", "held", "held"]), "{outcome:?}");
            assert_eq!(report["tiers"][1]["findings"].as_array().unwrap().len(), 19, "{report}");
        });
    }
}
