//! Attacks on sandboxes from inside, to test whether the promised properties hold.
//!
//! The attacks are one Python program, `probes.py`, run by the root image's interpreter as a
//! workload. Their targets are a second sandbox with a credential (the neighbour), a file and a
//! process of the host, and a port that the host listens on. An attack that reaches one of them has
//! broken out.

mod property;

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use chitin_protocol::Exit;
use chitin_spec::{Boundary, SecretSource};
use chitin_tiers::SelectedTier;
use chitin_vmm::HostError;
use serde::Serialize;
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use property::Setting;
pub use property::{PROPERTIES, Property, render_document};

use crate::builder::Builder;
use crate::error::{Error, ProbeError};
use crate::process::{ECHO, Process};
use crate::sandbox::Sandbox;

const PROBES: &str = include_str!("probes.py");

/// The time limit of one property's attacks. Most take milliseconds; the longest wait for addresses
/// that never answer, and an emulated host is a hundred times slower.
const PROBE_LIMIT: Duration = Duration::from_secs(120);

/// Most output of one probe that is read: some twenty attacks of a line each.
const MAX_OUTPUT: u64 = 64 * 1024;

/// The port that the neighbour listens on.
const NEIGHBOUR_PORT: u16 = 47_114;

/// The result for a property.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Every attack failed.
    Held,
    /// An attack succeeded.
    Broken,
    /// The tier does not promise the property.
    NotPromised,
}

/// The result of the attacks on one property.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The name of the property.
    pub property: &'static str,
    /// The result.
    pub verdict: Verdict,
    /// The attacks that succeeded; if none did, those that failed, or the reason why the property
    /// is not promised.
    pub evidence: String,
    /// All attacks.
    pub attacks: Vec<Attack>,
}

/// One attack.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Attack {
    /// The operation.
    pub tried: String,
    /// True if it succeeded.
    pub succeeded: bool,
    /// The observation: a value, an error name.
    pub seen: String,
}

/// Attacks every property in sandboxes of this specification, and calls `on_finding` with each
/// result as it comes. The promises are those of the boundary that the sandboxes turn out to have.
///
/// # Errors
/// A sandbox or its surroundings cannot be set up, or a probe fails. A sandbox that an attack ends
/// is a finding and not an error.
pub async fn attack_properties(
    builder: &Builder,
    mut on_finding: impl FnMut(&SelectedTier, Finding),
) -> Result<(), Error> {
    let surroundings = Surroundings::create(builder).await?;
    let sandbox = builder.clone().start().await?;
    let selected = sandbox.selected_tier().clone();
    let boundary = selected.boundary();
    for property in &PROPERTIES {
        let attacks = match (property.exemption(boundary), property.setting) {
            (Some(_), _) => Vec::new(),
            (None, Setting::Alone) => surroundings.attack_property(&sandbox, property).await?,
            (None, Setting::Destructive) => {
                let victim = builder.clone().start().await?;
                let mut attacks = surroundings.attack_property(&victim, property).await?;
                attacks.push(check_responsive(&sandbox).await);
                let _ = victim.stop().await;
                attacks
            }
        };
        on_finding(&selected, judge_property(property, boundary, attacks));
    }
    let _ = sandbox.stop().await;
    surroundings.tear_down().await;
    Ok(())
}

/// Checks that a sandbox which was not attacked still answers.
async fn check_responsive(sandbox: &Sandbox) -> Attack {
    let echo = sandbox.command(ECHO).arg("alive").output();
    let output = tokio::time::timeout(PROBE_LIMIT, echo).await;
    let answers = matches!(&output, Ok(Ok(output)) if output.stdout == b"alive\n");
    let seen = if answers { "it answers" } else { "it does not answer" };
    Attack { tried: "disturb another sandbox".into(), succeeded: !answers, seen: seen.into() }
}

fn judge_property(property: &Property, boundary: Boundary, attacks: Vec<Attack>) -> Finding {
    let list_attacks = |succeeded: bool| {
        let list = attacks.iter().filter(move |attack| attack.succeeded == succeeded);
        list.map(|attack| format!("{}: {}", attack.tried, attack.seen))
            .collect::<Vec<_>>()
            .join("; ")
    };
    let (verdict, evidence) = match property.exemption(boundary) {
        Some(reason) => (Verdict::NotPromised, reason.to_owned()),
        None if attacks.iter().any(|attack| attack.succeeded) => {
            (Verdict::Broken, list_attacks(true))
        }
        // A property without a single attack was not tested, so that it does not count as held.
        None if attacks.is_empty() => (Verdict::Broken, "the probe reported nothing".to_owned()),
        None => (Verdict::Held, list_attacks(false)),
    };
    Finding { property: property.name, verdict, evidence, attacks }
}

/// The targets of the attacks outside of the attacked sandbox.
struct Surroundings {
    /// The context of `probes.py`, as JSON.
    context: String,
    neighbour: Sandbox,
    /// A process of the host, killed when this is dropped.
    _process: tokio::process::Child,
    /// A file of the host.
    _file: tempfile::NamedTempFile,
    host: HostListeners,
}

impl Surroundings {
    async fn create(builder: &Builder) -> Result<Surroundings, Error> {
        let mark = format!("chitin-audit-{}", random_hex()?);
        let canary = format!("chitin-canary-{}", random_hex()?);
        let file = tempfile::Builder::new()
            .prefix(&mark)
            .tempfile()
            .map_err(HostError::during("create a file as a target"))?;
        let process = tokio::process::Command::new("sleep")
            .arg0(&mark)
            .arg("3600")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .map_err(HostError::during("start a process as a target"))?;
        let listeners = HostListeners::bind().await?;
        let mut context = json!({
            "host_file": file.path(),
            "host_process": mark,
            "host_listeners": listeners.addresses,
            "host_kernel": rustix::system::uname().release().to_string_lossy(),
            "neighbour_port": NEIGHBOUR_PORT,
            "neighbour_name": mark,
            "neighbour_key": 0x4348_4954,
            "canary_sha256": format!("{:x}", Sha256::digest(canary.as_bytes())),
            "memory_mib": builder.clone().validate()?.vm.memory_mib,
        });
        let neighbour = start_neighbour(builder, &canary).await?;
        context["tasks"] = json!(neighbour.max_tasks());
        context["boundary"] = json!(neighbour.selected_tier().boundary());
        let context = context.to_string();
        serve_as_neighbour(&neighbour, &context).await?;
        Ok(Surroundings { context, neighbour, _process: process, _file: file, host: listeners })
    }

    /// Runs the attacks on a property. A connection to the host counts even if the probe does not
    /// report it.
    async fn attack_property(
        &self,
        sandbox: &Sandbox,
        property: &Property,
    ) -> Result<Vec<Attack>, Error> {
        let mut process = start_probe(sandbox, &self.context, property.probe).await?;
        // Read as bytes: `read_to_string` would discard the output if the sandbox ends.
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let attacking = async {
            if let (Some(out), Some(err)) = (process.stdout.take(), process.stderr.take()) {
                let (mut out, mut err) = (out.take(MAX_OUTPUT), err.take(MAX_OUTPUT));
                let _ = tokio::join!(out.read_to_end(&mut stdout), err.read_to_end(&mut stderr));
            }
            process.wait().await
        };
        let ended = tokio::time::timeout(PROBE_LIMIT, attacking).await;
        let mut attacks = parse_attacks(&stdout);
        let failure = match ended {
            Ok(Ok((Exit::Code(0), _))) => None,
            // The attack may have ended its sandbox, after it reported what that would mean.
            Ok(_) if property.setting == Setting::Destructive && !attacks.is_empty() => None,
            Ok(Ok((exit, _))) => {
                let stderr = String::from_utf8_lossy(&stderr);
                let stderr = stderr.lines().last().unwrap_or_default().to_owned();
                Some(ProbeError::Exited { exit, stderr })
            }
            Ok(Err(error)) => Some(ProbeError::Sandbox(Box::new(error))),
            Err(_) => Some(ProbeError::Unfinished { limit: PROBE_LIMIT }),
        };
        if let Some(source) = failure {
            return Err(Error::Probe { property: property.name, source });
        }
        if self.host.reached.swap(false, Ordering::Relaxed) {
            let (tried, seen) = ("reach the host".into(), "the host was connected to".into());
            attacks.push(Attack { tried, succeeded: true, seen });
        }
        Ok(attacks)
    }

    async fn tear_down(self) {
        let _ = self.neighbour.stop().await;
    }
}

/// Listeners on the addresses of this host. Dropping them stops them.
struct HostListeners {
    addresses: Vec<(String, u16)>,
    /// Set by a connection.
    reached: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<()>>,
}

impl HostListeners {
    async fn bind() -> Result<HostListeners, Error> {
        let (mut addresses, mut tasks) = (Vec::new(), Vec::new());
        let reached = Arc::new(AtomicBool::new(false));
        for address in list_host_addresses() {
            let listener = TcpListener::bind(SocketAddr::new(address, 0))
                .await
                .map_err(HostError::during("listen as a target"))?;
            let bound = listener.local_addr().map_err(HostError::during("listen as a target"))?;
            addresses.push((bound.ip().to_string(), bound.port()));
            let reached = reached.clone();
            tasks.push(tokio::spawn(async move {
                while listener.accept().await.is_ok() {
                    reached.store(true, Ordering::Relaxed);
                }
            }));
        }
        Ok(HostListeners { addresses, reached, tasks })
    }
}

impl Drop for HostListeners {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// Starts the second sandbox, with a credential in it.
async fn start_neighbour(builder: &Builder, canary: &str) -> Result<Sandbox, Error> {
    let value = tempfile::NamedTempFile::new().map_err(HostError::during("store a credential"))?;
    std::fs::write(value.path(), canary).map_err(HostError::during("store a credential"))?;
    let source = SecretSource::File(value.path().to_owned());
    builder.clone().secret("NEIGHBOUR", source).start().await
}

/// Starts the services of the second sandbox. They run until it ends.
async fn serve_as_neighbour(neighbour: &Sandbox, context: &str) -> Result<(), Error> {
    let mut process = start_probe(neighbour, context, "serve_as_neighbour").await?;
    let mut ready = [0; 6];
    if let Some(stdout) = &mut process.stdout {
        // A service that fails ends the program, which ends the stream.
        let _ = tokio::time::timeout(PROBE_LIMIT, stdout.read_exact(&mut ready)).await;
    }
    if &ready != b"ready\n" {
        return Err(Error::AuditNeighbour);
    }
    Ok(())
}

/// Starts a function of `probes.py`.
async fn start_probe(sandbox: &Sandbox, context: &str, function: &str) -> Result<Process, Error> {
    let mut process = sandbox
        .command("/usr/bin/python3")
        .args(["-", function])
        .env("CHITIN_AUDIT", context)
        .piped_stdin()
        .spawn()?;
    if let Some(mut stdin) = process.stdin.take() {
        // A probe that does not read its program ends, and reports why.
        let _ = stdin.write_all(PROBES.as_bytes()).await;
    }
    Ok(process)
}

/// Reads the attacks from the last line: a probe that may be killed first reports what a kill would
/// mean.
fn parse_attacks(stdout: &[u8]) -> Vec<Attack> {
    let stdout = String::from_utf8_lossy(stdout);
    let last = stdout.lines().last().unwrap_or_default();
    let attacks = serde_json::from_str::<Vec<(String, bool, String)>>(last).unwrap_or_default();
    let attacks = attacks.into_iter();
    attacks.map(|(tried, succeeded, seen)| Attack { tried, succeeded, seen }).collect()
}

/// Returns the loopback address, and the source address of connections to other hosts, if any.
fn list_host_addresses() -> Vec<IpAddr> {
    let loopback = IpAddr::from(Ipv4Addr::LOCALHOST);
    // Connecting a datagram socket sends nothing: it only looks up the route.
    let outer = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).and_then(|socket| {
        socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9))?;
        socket.local_addr()
    });
    let outer = outer.map(|address| address.ip()).ok().filter(|address| *address != loopback);
    [loopback].into_iter().chain(outer).collect()
}

fn random_hex() -> Result<String, HostError> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(HostError::during("get random bytes"))?;
    Ok(format!("{:032x}", u128::from_ne_bytes(bytes)))
}

#[cfg(test)]
#[path = "audit_test.rs"]
mod tests;
