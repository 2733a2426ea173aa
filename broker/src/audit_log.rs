//! The audit log: one line of JSON for each attempt to connect, allowed or not, and for each
//! delivery and revocation of a credential. It never contains transferred data or values.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use chitin_spec::{DeliveryKind, MAX_HOST};
use chitin_text::printable_json;
use rustix::fs::OFlags;
use serde::Serialize;

use crate::egress::RefusalNotices;
use crate::token_bucket::TokenBucket;

/// Lines per second, and the burst, that a sandbox can cause. Further lines are counted in the next
/// one: a sandbox must not be able to fill the host's disk.
const LINE_RATE: f64 = 100.0;
const LINE_BURST: f64 = 1000.0;

/// The outcome of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Verdict {
    /// The connection was made.
    Allowed,
    /// A rule or a limit refused it.
    Refused,
    /// It was allowed, and the connection could not be made.
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

/// The line of an attempt to connect.
#[derive(Debug, Serialize)]
pub(crate) struct ConnectionRecord<'a> {
    /// Start of the attempt, UTC.
    pub time: String,
    pub host: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    pub verdict: Verdict,
    /// The reason of the verdict; for a connection, the error that ended it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The address that was dialled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    /// Bytes from the sandbox.
    pub sent: u64,
    /// Bytes to the sandbox.
    pub received: u64,
    pub duration_ms: u64,
    /// HTTP requests sent to the endpoint, if TLS was intercepted.
    #[serde(skip_serializing_if = "is_zero")]
    pub requests: u64,
    /// Messages of the endpoint in which a value was scrubbed.
    #[serde(skip_serializing_if = "is_zero")]
    pub scrubbed: u64,
    /// Names of the credentials sent to the endpoint.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub credentials: Vec<String>,
    /// Lines omitted before this one.
    #[serde(skip_serializing_if = "is_zero")]
    pub omitted: u64,
    /// The remedy of a refusal, for the user who started the sandbox.
    #[serde(skip)]
    pub remedy: Option<&'static str>,
}

/// The line of a credential that is about to be delivered, or was revoked.
#[derive(Debug, Serialize)]
struct CredentialRecord<'a> {
    time: String,
    verdict: &'static str,
    credentials: [&'a str; 1],
    delivery: &'static str,
}

fn format_credential_record(
    verdict: &'static str,
    name: &str,
    kind: DeliveryKind,
) -> io::Result<Vec<u8>> {
    let record = CredentialRecord {
        time: format_now(),
        verdict,
        credentials: [name],
        delivery: kind.name(),
    };
    format_line(&record)
}

/// Encodes one line. Names of hosts come from a guest, and a person reads the log in a terminal.
fn format_line(record: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut line = printable_json(&serde_json::to_string(record)?);
    line.push('\n');
    Ok(line.into_bytes())
}

/// Opens a file to append to, which no other user can change, or a device or pipe.
fn open_file(path: &Path) -> io::Result<File> {
    let user = rustix::process::geteuid().as_raw();
    let refuse = |reason: String| Err(io::Error::new(io::ErrorKind::PermissionDenied, reason));
    let link = std::fs::symlink_metadata(path).ok().filter(Metadata::is_symlink);
    if let Some(owner) = link.map(|link| link.uid()).filter(|owner| ![0, user].contains(owner)) {
        return refuse(format!("it is a link of user {owner}: choose another path"));
    }
    // Without `O_NONBLOCK`, a pipe that no process reads would stop the run before it starts.
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .custom_flags(flags.bits().cast_signed())
        .open(path)?;
    let metadata = file.metadata()?;
    let (owner, mode) = (metadata.uid(), metadata.mode() & 0o7777);
    if metadata.is_file() && ![0, user].contains(&owner) {
        return refuse(format!(
            "it belongs to user {owner}, who could change it: choose another path"
        ));
    }
    if metadata.is_file() && mode & 0o022 != 0 {
        return refuse(format!("its mode {mode:04o} lets other users change it: `chmod go-w` it"));
    }
    let flags = rustix::fs::fcntl_getfl(&file)?;
    rustix::fs::fcntl_setfl(&file, flags - OFlags::NONBLOCK)?;
    Ok(file)
}

/// Returns the current time, UTC.
fn format_now() -> String {
    humantime::format_rfc3339_millis(SystemTime::now()).to_string()
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature that serde requires")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl ConnectionRecord<'_> {
    /// Makes the record of an attempt that starts now.
    pub fn new(
        host: &str,
        port: Option<u16>,
        verdict: Verdict,
        reason: Option<String>,
    ) -> ConnectionRecord<'_> {
        ConnectionRecord {
            time: format_now(),
            host: truncate_name(host),
            port,
            verdict,
            reason,
            address: None,
            sent: 0,
            received: 0,
            duration_ms: 0,
            requests: 0,
            scrubbed: 0,
            credentials: Vec::new(),
            omitted: 0,
            remedy: None,
        }
    }

    /// Sets the verdict and its reason.
    pub fn set_refusal(&mut self, verdict: Verdict, reason: String) {
        self.verdict = verdict;
        self.reason = Some(reason);
    }

    /// Sets the time from the attempt to its end.
    pub fn set_duration(&mut self, duration: Duration) {
        self.duration_ms = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    }
}

/// An audit log. Without a file, attempts are only logged.
#[derive(Debug)]
pub struct AuditLog {
    state: Option<Mutex<State>>,
    /// Limits the events of the process's log like the lines of the file.
    log_bucket: Mutex<TokenBucket>,
    notices: Option<RefusalNotices>,
}

impl Default for AuditLog {
    fn default() -> Self {
        let log_bucket = Mutex::new(TokenBucket::new(LINE_RATE, LINE_BURST));
        AuditLog { state: None, log_bucket, notices: None }
    }
}

#[derive(Debug)]
struct State {
    file: File,
    bucket: TokenBucket,
    omitted: u64,
    /// A line could not be written.
    failed: bool,
}

impl State {
    /// Writes a line at once, so that lines of several processes do not mix.
    fn write_line(&mut self, line: &[u8]) {
        self.failed |= self.file.write_all(line).is_err();
    }
}

impl AuditLog {
    /// Opens a file to append to. A new file is readable only by its owner; an existing one must
    /// not be writable by other users.
    pub fn open(path: Option<&Path>) -> io::Result<AuditLog> {
        let Some(path) = path else { return Ok(AuditLog::default()) };
        let file = open_file(path)?;
        let bucket = TokenBucket::new(LINE_RATE, LINE_BURST);
        let state = State { file, bucket, omitted: 0, failed: false };
        Ok(AuditLog { state: Some(Mutex::new(state)), ..AuditLog::default() })
    }

    /// Reports refused attempts in addition to recording them.
    pub(crate) fn with_notices(self, notices: Option<RefusalNotices>) -> AuditLog {
        AuditLog { notices, ..self }
    }

    fn state(&self) -> Option<MutexGuard<'_, State>> {
        self.state.as_ref().map(|state| state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Returns false after a line could not be written: no further attempt is allowed then.
    pub(crate) fn is_writable(&self) -> bool {
        self.state().is_none_or(|state| !state.failed)
    }

    /// Counts lines that were omitted by others.
    pub(crate) fn add_omitted(&self, count: u64) {
        if let Some(mut state) = self.state() {
            state.omitted += count;
        }
    }

    /// Records a credential that is about to be delivered. If this fails, it must not be delivered.
    pub fn record_delivery(&self, name: &str, kind: DeliveryKind) -> io::Result<()> {
        tracing::info!(name, delivery = kind.name(), "credential delivered");
        let Some(mut state) = self.state() else { return Ok(()) };
        state.file.write_all(&format_credential_record("delivered", name, kind)?)
    }

    /// Records a credential that was revoked.
    pub fn record_revocation(&self, name: &str, kind: DeliveryKind) {
        tracing::info!(name, delivery = kind.name(), "credential revoked");
        let Some(mut state) = self.state() else { return };
        let line = format_credential_record("revoked", name, kind).unwrap_or_default();
        state.write_line(&line);
    }

    /// Records an attempt to connect.
    pub(crate) fn record_connection(&self, mut record: ConnectionRecord<'_>) {
        self.log_connection(&record);
        if let (Some(notices), Verdict::Refused) = (&self.notices, record.verdict) {
            let reason = record.reason.as_deref().unwrap_or_default();
            notices.report(record.host, record.port, reason, record.remedy);
        }
        let Some(mut state) = self.state() else { return };
        // Connections are always recorded: their number is limited.
        if record.verdict != Verdict::Allowed && !state.bucket.try_take() {
            state.omitted += 1;
            return;
        }
        record.omitted = std::mem::take(&mut state.omitted);
        let line = format_line(&record).unwrap_or_default();
        state.write_line(&line);
    }

    /// Logs an attempt to connect. A guest cannot flood the log with refused ones.
    fn log_connection(&self, record: &ConnectionRecord<'_>) {
        let may_log = || self.log_bucket.lock().unwrap_or_else(PoisonError::into_inner).try_take();
        if !tracing::enabled!(tracing::Level::INFO)
            || record.verdict != Verdict::Allowed && !may_log()
        {
            return;
        }
        tracing::info!(
            host = record.host,
            port = record.port,
            verdict = record.verdict.name(),
            reason = record.reason.as_deref(),
            address = record.address.map(tracing::field::display),
            sent = record.sent,
            received = record.received,
            duration_ms = record.duration_ms,
            credentials = ?record.credentials,
            scrubbed = record.scrubbed,
            "egress"
        );
    }
}

/// Truncates a name that a guest sends to the length of the longest valid one.
pub(crate) fn truncate_name(host: &str) -> &str {
    let end = host.char_indices().map(|(start, _)| start).nth(MAX_HOST).unwrap_or(host.len());
    &host[..end]
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn line_is_short_json_for_any_host_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit");
        let audit = AuditLog::open(Some(&path)).unwrap();
        let name = format!("a\0\n\"{}", "ä".repeat(40_000));
        audit.record_connection(ConnectionRecord::new(
            &name,
            Some(443),
            Verdict::Refused,
            Some("no".into()),
        ));
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), 1);
        let line: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(line["host"].as_str().unwrap().chars().count(), MAX_HOST);
        assert_eq!((&line["verdict"], &line["port"]), (&"refused".into(), &443.into()));
        assert!(line.get("address").is_none());
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn host_name_cannot_control_a_terminal() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit");
        let audit = AuditLog::open(Some(&path)).unwrap();
        let name = "a\u{1b}[2J\u{7f}\u{9b}2J\u{202e}b";
        audit.record_connection(ConnectionRecord::new(name, None, Verdict::Refused, None));
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.is_ascii() && !text.trim_end().contains(|c: char| c.is_control()), "{text:?}");
        let line: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(line["host"], name);
    }

    /// A user that owns nothing.
    const STRANGER: u32 = 54_321;

    fn refused(path: &Path) -> bool {
        let opened = AuditLog::open(Some(path));
        opened.is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
    }

    #[test]
    fn log_that_others_can_change_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit");
        AuditLog::open(Some(&path)).unwrap();
        AuditLog::open(Some(&path)).unwrap();
        for (mode, is_refused) in [(0o622, true), (0o620, true), (0o644, false)] {
            std::fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            assert_eq!(refused(&path), is_refused, "{mode:o}");
        }
        // Only root can give a file or a link away.
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        AuditLog::open(Some(&link)).unwrap();
        std::os::unix::fs::lchown(&link, Some(STRANGER), None).unwrap();
        assert!(refused(&link));
        std::os::unix::fs::chown(&path, Some(STRANGER), None).unwrap();
        assert!(refused(&path));
    }

    #[test]
    fn pipe_without_reader_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit");
        rustix::fs::mkfifoat(
            rustix::fs::CWD,
            &path,
            rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        )
        .unwrap();
        let error = AuditLog::open(Some(&path)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::NXIO.raw_os_error()));
        // With a reader it is used, and waits for one that is slow.
        let _reader = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let audit = AuditLog::open(Some(&path)).unwrap();
        let state = audit.state().unwrap();
        assert!(!rustix::fs::fcntl_getfl(&state.file).unwrap().contains(OFlags::NONBLOCK));
    }

    #[test]
    fn flood_of_refusals_is_counted_not_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit");
        let audit = AuditLog::open(Some(&path)).unwrap();
        for _ in 0..5000 {
            audit.record_connection(ConnectionRecord::new("a", None, Verdict::Refused, None));
        }
        audit.record_connection(ConnectionRecord::new("b", None, Verdict::Allowed, None));
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
    fn full_disk_makes_the_log_unwritable() {
        let audit = AuditLog::open(Some(Path::new("/dev/full"))).unwrap();
        assert!(audit.is_writable());
        audit.record_connection(ConnectionRecord::new("a", None, Verdict::Refused, None));
        assert!(!audit.is_writable());
        assert!(AuditLog::default().is_writable());
        assert!(
            audit.record_delivery("A", DeliveryKind::Memory).is_err()
                && AuditLog::default().record_delivery("A", DeliveryKind::Memory).is_ok()
        );
    }
}
