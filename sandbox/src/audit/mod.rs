//! Attacks on sandboxes from inside, to see whether what is promised holds.
//!
//! The attacks are one Python program ([`probes.py`](https://docs.python.org/3/)), run by the root image's interpreter as any
//! workload would be. Beside the sandbox that is attacked from there is another one, its neighbour, with a credential; a file
//! and a process of the host; and a port that the host listens on. Whoever finds one of them has broken out.

mod property;

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde::Serialize;
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use property::Setting;
pub use property::{PROPERTIES, Property, document};

use crate::{Boundary, Builder, Error, Exit, Sandbox, SecretSource, SelectedTier};

const PROBES: &str = include_str!("probes.py");

/// One property's attacks: most take milliseconds, the longest wait for addresses that never answer, and an emulated host is
/// a hundred times slower.
const PROBE_LIMIT: Duration = Duration::from_secs(120);

/// The most output of one probe that is read: some twenty attacks of a line each.
const MAX_OUTPUT: u64 = 64 * 1024;

/// What became of a promise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Every attack failed.
    Held,
    /// One succeeded.
    Broken,
    /// This tier does not promise it.
    NotPromised,
}

/// One property under attack.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Its name.
    pub property: &'static str,
    /// What became of it.
    pub verdict: Verdict,
    /// The attacks that succeeded; else how many failed and how, or why nothing was promised.
    pub evidence: String,
    /// One by one.
    pub attacks: Vec<Attack>,
}

/// One attack.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Attack {
    /// What was tried.
    pub tried: String,
    /// Whether it succeeded.
    pub succeeded: bool,
    /// What was seen.
    pub seen: String,
}

/// Attacks every property in sandboxes of this kind, and calls `done` with each finding as it comes. What is promised follows
/// from what the sandboxes turn out to be isolated by.
///
/// # Errors
/// A sandbox or its surroundings cannot be had, or a probe fails. A sandbox that an attack ends is no error but a finding.
pub async fn audit(
    builder: &Builder,
    mut done: impl FnMut(&SelectedTier, Finding),
) -> Result<(), Error> {
    let scene = Scene::set(builder).await?;
    let sandbox = builder.clone().start().await?;
    let chosen = sandbox.chosen().clone();
    let wall = chosen.boundary();
    for property in &PROPERTIES {
        let attacks = match (property.exemption(wall), property.setting) {
            (Some(_), _) => Vec::new(),
            (None, Setting::Alone) => scene.attack(&sandbox, property).await?,
            (None, Setting::Destructive) => {
                let victim = builder.clone().start().await?;
                let mut attacks = scene.attack(&victim, property).await?;
                attacks.push(alive("the sandbox beside it", &sandbox).await);
                let _ = victim.stop().await;
                attacks
            }
        };
        done(&chosen, judge(property, wall, attacks));
    }
    let _ = sandbox.stop().await;
    scene.strike().await;
    Ok(())
}

/// Says whether somebody who was not attacked still answers.
async fn alive(who: &str, sandbox: &Sandbox) -> Attack {
    let answer =
        tokio::time::timeout(PROBE_LIMIT, sandbox.command(crate::ECHO).arg("alive").output()).await;
    let answers = matches!(&answer, Ok(Ok(output)) if output.stdout == b"alive\n");
    let seen = if answers { "it answers" } else { "it does not answer" };
    Attack { tried: format!("disturb {who}"), succeeded: !answers, seen: seen.into() }
}

fn judge(property: &Property, wall: Boundary, attacks: Vec<Attack>) -> Finding {
    let said = |succeeded: bool| {
        let list = attacks.iter().filter(move |attack| attack.succeeded == succeeded);
        list.map(|attack| format!("{}: {}", attack.tried, attack.seen))
            .collect::<Vec<_>>()
            .join("; ")
    };
    let (verdict, evidence) = match property.exemption(wall) {
        Some(reason) => (Verdict::NotPromised, reason.to_owned()),
        None if attacks.iter().any(|attack| attack.succeeded) => (Verdict::Broken, said(true)),
        // One that says nothing has not been attacked.
        None if attacks.is_empty() => (Verdict::Broken, "the probe said nothing".to_owned()),
        None => (Verdict::Held, said(false)),
    };
    Finding { property: property.name, verdict, evidence, attacks }
}

/// What surrounds the sandbox under attack, and is to be found.
struct Scene {
    context: String,
    neighbour: Sandbox,
    /// A process of the host, which ends with this.
    _process: tokio::process::Child,
    /// A file of the host.
    _file: tempfile::NamedTempFile,
    /// Whether anybody has reached the host.
    reached: Arc<AtomicBool>,
    listeners: Vec<tokio::task::JoinHandle<()>>,
}

impl Scene {
    async fn set(builder: &Builder) -> Result<Scene, Error> {
        let host = |what| move |source| Error::Host { what, source };
        let mark = format!("chitin-audit-{}", random()?);
        let canary = format!("chitin-canary-{}", random()?);

        let file = tempfile::Builder::new()
            .prefix(&mark)
            .tempfile()
            .map_err(host("make a file to be found"))?;
        let process = tokio::process::Command::new("sleep")
            .arg0(&mark)
            .arg("3600")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .map_err(host("start a process to be found"))?;

        let (mut addresses, mut listeners) = (Vec::new(), Vec::new());
        let reached = Arc::new(AtomicBool::new(false));
        for address in own_addresses() {
            let listener = TcpListener::bind(SocketAddr::new(address, 0))
                .await
                .map_err(host("listen to be reached"))?;
            let bound = listener.local_addr().map_err(host("listen to be reached"))?;
            addresses.push((bound.ip().to_string(), bound.port()));
            let reached = reached.clone();
            listeners.push(tokio::spawn(async move {
                while listener.accept().await.is_ok() {
                    reached.store(true, Ordering::Relaxed);
                }
            }));
        }

        let port = 47_114;
        let mut context = json!({
            "host_file": file.path(),
            "host_process": mark,
            "host_listeners": addresses,
            "host_kernel": rustix::system::uname().release().to_string_lossy(),
            "neighbour_port": port,
            "neighbour_name": mark,
            "neighbour_key": 0x4348_4954,
            "canary_sha256": format!("{:x}", Sha256::digest(canary.as_bytes())),
            "memory_mib": builder.memory()?,
        });
        let value = tempfile::NamedTempFile::new().map_err(host("hold a credential"))?;
        std::fs::write(value.path(), &canary).map_err(host("hold a credential"))?;
        let source = SecretSource::File(value.path().to_owned());
        let neighbour = builder.clone().secret("NEIGHBOUR", source).start().await?;
        context["wall"] = json!(neighbour.chosen().boundary());
        let context = context.to_string();
        let mut serving = probe(&neighbour, &context, "neighbour").await?;
        let mut ready = [0; 6];
        if let Some(stdout) = &mut serving.stdout {
            // One that cannot be set up says so by its end.
            let _ = tokio::time::timeout(PROBE_LIMIT, stdout.read_exact(&mut ready)).await;
        }
        if &ready != b"ready\n" {
            return Err(Error::Audit { what: "the neighbour does not come up".into() });
        }
        Ok(Scene { context, neighbour, _process: process, _file: file, reached, listeners })
    }

    /// Runs a property's attacks. What has succeeded is seen from outside too.
    async fn attack(&self, sandbox: &Sandbox, property: &Property) -> Result<Vec<Attack>, Error> {
        let mut process = probe(sandbox, &self.context, property.probe).await?;
        // As bytes: what was read before the sandbox ended would be lost to a text.
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let attacked = async {
            if let (Some(out), Some(err)) = (process.stdout.take(), process.stderr.take()) {
                let (mut out, mut err) = (out.take(MAX_OUTPUT), err.take(MAX_OUTPUT));
                let _ = tokio::join!(out.read_to_end(&mut stdout), err.read_to_end(&mut stderr));
            }
            process.wait().await
        };
        let ended = tokio::time::timeout(PROBE_LIMIT, attacked).await;
        let (stdout, stderr) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
        // The last line counts: a probe that may be killed says beforehand what that would mean.
        let last = stdout.lines().last().unwrap_or_default();
        let mut attacks: Vec<Attack> = serde_json::from_str::<Vec<(String, bool, String)>>(last)
            .unwrap_or_default()
            .into_iter()
            .map(|(tried, succeeded, seen)| Attack { tried, succeeded, seen })
            .collect();
        let failed = match ended {
            Ok(Ok((Exit::Code(0), _))) => None,
            Ok(Ok(_) | Err(_))
                if property.setting == Setting::Destructive && !attacks.is_empty() =>
            {
                None
            }
            Ok(Ok((exit, _))) => {
                Some(format!("{exit:?}: {}", stderr.lines().last().unwrap_or_default()))
            }
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some(format!("has not ended within {PROBE_LIMIT:?}")),
        };
        if let Some(what) = failed {
            return Err(Error::Audit {
                what: format!("the probe of `{}` failed: {what}", property.name),
            });
        }
        if self.reached.swap(false, Ordering::Relaxed) {
            let (tried, seen) =
                ("reach the host".to_owned(), "the host was connected to".to_owned());
            attacks.push(Attack { tried, succeeded: true, seen });
        }
        Ok(attacks)
    }

    async fn strike(self) {
        self.listeners.iter().for_each(tokio::task::JoinHandle::abort);
        let _ = self.neighbour.stop().await;
    }
}

/// Starts a function of `probes.py`.
async fn probe(sandbox: &Sandbox, context: &str, function: &str) -> Result<crate::Process, Error> {
    let mut process = sandbox
        .command("/usr/bin/python3")
        .args(["-", function])
        .env("CHITIN_AUDIT", context)
        .piped_stdin()
        .spawn()?;
    if let Some(mut stdin) = process.stdin.take() {
        // A probe that does not read it ends, and says why.
        let _ = stdin.write_all(PROBES.as_bytes()).await;
    }
    Ok(process)
}

/// The loopback address, and the one that this host would be seen by from outside, if any.
fn own_addresses() -> Vec<IpAddr> {
    let loopback = IpAddr::from(Ipv4Addr::LOCALHOST);
    // Connecting a datagram socket sends nothing: it asks the routing table.
    let outer = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).and_then(|socket| {
        socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9))?;
        socket.local_addr()
    });
    let outer = outer.map(|address| address.ip()).ok().filter(|address| *address != loopback);
    [loopback].into_iter().chain(outer).collect()
}

fn random() -> Result<String, Error> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)
        .map_err(|error| Error::Host { what: "get random bytes", source: error.into() })?;
    Ok(format!("{:032x}", u128::from_ne_bytes(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attack(succeeded: bool) -> Attack {
        Attack { tried: "x".into(), succeeded, seen: "y".into() }
    }

    #[test]
    fn one_success_breaks_and_silence_does_too() {
        let property = &PROPERTIES[0];
        let verdict = |attacks| judge(property, Boundary::Kvm, attacks).verdict;
        assert_eq!(verdict(vec![attack(false), attack(false)]), Verdict::Held);
        assert_eq!(verdict(vec![attack(false), attack(true)]), Verdict::Broken);
        assert_eq!(verdict(vec![]), Verdict::Broken);
        let kernel = PROPERTIES.iter().find(|property| property.name == "host kernel").unwrap();
        assert_eq!(judge(kernel, Boundary::Namespaces, vec![]).verdict, Verdict::NotPromised);
    }

    #[test]
    fn every_property_has_its_probe_and_its_own_name() {
        let mut names: Vec<_> = PROPERTIES.iter().map(|property| property.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), PROPERTIES.len());
        for property in &PROPERTIES {
            assert!(PROBES.contains(&format!("\ndef {}():", property.probe)), "{}", property.probe);
        }
    }

    /// Attacks that succeed are seen: without a sandbox most of them do.
    #[test]
    fn on_the_host_itself_promises_break() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let context = json!({"host_file": file.path(), "host_process": "probes", "host_listeners": [],
            "host_kernel": rustix::system::uname().release().to_string_lossy()});
        for probe in ["host_files", "processes", "host_kernel"] {
            let output = std::process::Command::new("python3")
                .args(["-c", PROBES, probe])
                .env("CHITIN_AUDIT", context.to_string())
                .output()
                .unwrap();
            let text = String::from_utf8(output.stdout).unwrap();
            let attacks: Vec<(String, bool, String)> = serde_json::from_str(&text).unwrap();
            assert!(attacks.iter().any(|(_, succeeded, _)| *succeeded), "{probe}: {text}");
        }
    }
}
