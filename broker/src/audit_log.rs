//! One line of JSON for each attempt to reach something, allowed or not, and for each credential that is delivered or taken back.
//! Never what was sent, and never a value.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use chitin_spec::{DeliveryKind, MAX_HOST};
use serde::Serialize;

use crate::bucket::Bucket;

/// Lines that a sandbox can cause in a second, and at once. What is over is counted in the next line: a sandbox must not be
/// able to fill the host's disk.
const LINES: (f64, f64) = (100.0, 1000.0);

/// What came of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Verdict {
    /// It was connected.
    Allowed,
    /// The policy forbids it.
    Refused,
    /// It was allowed, and there was no connection.
    Failed,
}

impl Verdict {
    fn name(self) -> &'static str {
        match self {
            Verdict::Allowed => "allowed",
            Verdict::Refused => "refused",
            Verdict::Failed => "failed",
        }
    }
}

/// An attempt.
#[derive(Debug, Serialize)]
pub(crate) struct Line<'a> {
    /// When it began, UTC.
    pub time: String,
    pub host: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    pub verdict: Verdict,
    /// In words; of a connection, how it ended, unless both sides ended it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What was dialled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    /// Bytes from the sandbox.
    pub sent: u64,
    /// Bytes to the sandbox.
    pub received: u64,
    pub duration_ms: u64,
    /// HTTP requests that went out, where TLS was taken apart.
    #[serde(skip_serializing_if = "is_zero")]
    pub requests: u64,
    /// The credentials that went out with them, by their names.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub credentials: Vec<String>,
    /// Lines that were left out before this one.
    #[serde(skip_serializing_if = "is_zero")]
    pub omitted: u64,
}

/// A credential, about to be delivered, or taken back.
#[derive(Debug, Serialize)]
struct Delivered<'a> {
    time: String,
    verdict: &'static str,
    credentials: [&'a str; 1],
    delivery: &'static str,
}

fn delivered(verdict: &'static str, name: &str, way: DeliveryKind) -> io::Result<Vec<u8>> {
    let line = Delivered { time: now(), verdict, credentials: [name], delivery: way.name() };
    let mut text = serde_json::to_vec(&line)?;
    text.push(b'\n');
    Ok(text)
}

/// UTC.
fn now() -> String {
    humantime::format_rfc3339_millis(SystemTime::now()).to_string()
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl Line<'_> {
    /// Of an attempt that began now.
    pub fn new(
        host: &str,
        port: Option<u16>,
        verdict: Verdict,
        reason: Option<String>,
    ) -> Line<'_> {
        Line {
            time: now(),
            host: truncate_name(host),
            port,
            verdict,
            reason,
            address: None,
            sent: 0,
            received: 0,
            duration_ms: 0,
            requests: 0,
            credentials: Vec::new(),
            omitted: 0,
        }
    }

    /// It has taken so long.
    pub fn lasted(&mut self, duration: Duration) {
        self.duration_ms = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    }
}

/// Where lines go.
#[derive(Debug)]
pub struct AuditLog {
    state: Option<Mutex<State>>,
    /// Limits the events of the process's log, as lines of the file are limited.
    log_bucket: Mutex<Bucket>,
}

impl Default for AuditLog {
    /// Without a file: attempts are only logged.
    fn default() -> Self {
        AuditLog { state: None, log_bucket: Mutex::new(Bucket::new(LINES.0, LINES.1)) }
    }
}

#[derive(Debug)]
struct State {
    file: File,
    bucket: Bucket,
    omitted: u64,
    /// A line could not be written.
    broken: bool,
}

impl AuditLog {
    /// Lines are added to this file, which only its owner can read if it is a new one.
    pub fn open(path: Option<&Path>) -> io::Result<AuditLog> {
        let Some(path) = path else { return Ok(AuditLog::default()) };
        let file = OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
        let bucket = Bucket::new(LINES.0, LINES.1);
        let state = State { file, bucket, omitted: 0, broken: false };
        Ok(AuditLog { state: Some(Mutex::new(state)), ..AuditLog::default() })
    }

    /// Whether what is attempted now can be written down. What cannot is not to be done.
    pub(crate) fn works(&self) -> bool {
        self.state
            .as_ref()
            .is_none_or(|state| !state.lock().unwrap_or_else(PoisonError::into_inner).broken)
    }

    /// So many lines were left out before they came here.
    pub(crate) fn omit(&self, count: u64) {
        if let Some(state) = &self.state {
            state.lock().unwrap_or_else(PoisonError::into_inner).omitted += count;
        }
    }

    /// A credential is about to be delivered in this way. What cannot be written down is not to be done.
    pub fn record_delivery(&self, name: &str, way: DeliveryKind) -> io::Result<()> {
        tracing::info!(name, delivery = way.name(), "credential delivered");
        let Some(state) = &self.state else { return Ok(()) };
        let text = delivered("delivered", name, way)?;
        state.lock().unwrap_or_else(PoisonError::into_inner).file.write_all(&text)
    }

    /// A credential that was delivered in this way was taken back.
    pub fn record_revocation(&self, name: &str, way: DeliveryKind) {
        tracing::info!(name, delivery = way.name(), "credential revoked");
        let Some(state) = &self.state else { return };
        let text = delivered("revoked", name, way).unwrap_or_default();
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        state.broken |= state.file.write_all(&text).is_err();
    }

    pub(crate) fn write(&self, mut line: Line<'_>) {
        self.log(&line);
        let Some(state) = &self.state else { return };
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        // What was connected is always written: connections are few.
        if line.verdict != Verdict::Allowed && !state.bucket.take_one() {
            state.omitted += 1;
            return;
        }
        line.omitted = std::mem::take(&mut state.omitted);
        let mut text = serde_json::to_vec(&line).unwrap_or_default();
        text.push(b'\n');
        // One write, so that lines of several processes do not mix.
        state.broken |= state.file.write_all(&text).is_err();
    }
}

impl AuditLog {
    /// Logs an attempt. A guest cannot flood the log with refused ones.
    fn log(&self, line: &Line<'_>) {
        let may_log = || self.log_bucket.lock().unwrap_or_else(PoisonError::into_inner).take_one();
        if !tracing::enabled!(tracing::Level::INFO)
            || line.verdict != Verdict::Allowed && !may_log()
        {
            return;
        }
        tracing::info!(
            host = line.host,
            port = line.port,
            verdict = line.verdict.name(),
            reason = line.reason.as_deref(),
            address = line.address.map(tracing::field::display),
            sent = line.sent,
            received = line.received,
            duration_ms = line.duration_ms,
            credentials = ?line.credentials,
            "egress"
        );
    }
}

/// Cuts a name that a guest sends to its longest valid length.
pub(crate) fn truncate_name(host: &str) -> &str {
    let end = host.char_indices().map(|(at, _)| at).nth(MAX_HOST).unwrap_or(host.len());
    &host[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_short_json_whatever_the_name_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit");
        let audit = AuditLog::open(Some(&path)).unwrap();
        let name = format!("a\0\n\"{}", "ä".repeat(40_000));
        audit.write(Line::new(&name, Some(443), Verdict::Refused, Some("no".into())));
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), 1);
        let line: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(line["host"].as_str().unwrap().chars().count(), MAX_HOST);
        assert_eq!((&line["verdict"], &line["port"]), (&"refused".into(), &443.into()));
        assert!(line.get("address").is_none());
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_flood_of_lines_is_counted_and_not_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit");
        let audit = AuditLog::open(Some(&path)).unwrap();
        for _ in 0..5000 {
            audit.write(Line::new("a", None, Verdict::Refused, None));
        }
        audit.write(Line::new("b", None, Verdict::Allowed, None));
        let text = std::fs::read_to_string(&path).unwrap();
        let lines = text.lines().count();
        assert!((1001..2000).contains(&lines), "{lines}");
        let last: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        let omitted: u64 = text
            .lines()
            .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
            .filter_map(|line| line["omitted"].as_u64())
            .sum();
        assert_eq!((last["host"].as_str(), omitted), (Some("b"), 5001 - lines as u64));
    }

    #[test]
    fn a_full_disk_is_noticed() {
        let audit = AuditLog::open(Some(Path::new("/dev/full"))).unwrap();
        assert!(audit.works());
        audit.write(Line::new("a", None, Verdict::Refused, None));
        assert!(!audit.works());
        assert!(AuditLog::default().works());
        assert!(
            audit.record_delivery("A", DeliveryKind::Memory).is_err()
                && AuditLog::default().record_delivery("A", DeliveryKind::Memory).is_ok()
        );
    }
}
