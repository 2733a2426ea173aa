//! Logs of the CLI and the library, on standard error.
//!
//! Nothing is logged unless it is asked for. Only events of Chitin's crates are printed, whatever
//! the filter: other libraries, such as those for HTTP and TLS, handle credentials in plain text,
//! and what they log is not under the control of Chitin.

use std::io;

use chitin::printable;
use tracing_subscriber::filter::{LevelFilter, filter_fn};
use tracing_subscriber::fmt::format::FmtSpan;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::{EnvFilter, Registry};

use crate::error::CliError;

/// The environment variable that holds a log filter.
const FILTER_VARIABLE: &str = "CHITIN_LOG";

/// Options of every command about its log.
#[derive(clap::Args)]
pub struct LogArgs {
    /// Log to standard error: -v for each step, -vv for details, -vvv for everything; never the
    /// value of a credential
    #[arg(short, long, global = true, help_heading = "Logging",
        action = clap::ArgAction::Count)]
    verbose: u8,

    /// Format of the log
    #[arg(
        long,
        global = true,
        help_heading = "Logging",
        value_name = "FORMAT",
        default_value = "text"
    )]
    log_format: LogFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

impl LogArgs {
    /// Returns the number of `-v`.
    #[cfg(test)]
    pub fn verbosity(&self) -> u8 {
        self.verbose
    }

    /// Returns whether `-v` was given at least once.
    pub fn is_verbose(&self) -> bool {
        self.verbose > 0
    }

    /// Installs the log for the whole process, if one is asked for.
    pub fn install(&self) -> Result<(), CliError> {
        let Some(filter) = self.parse_filter(std::env::var(FILTER_VARIABLE).ok())? else {
            return Ok(());
        };
        let format = self.log_format;
        let subscriber = new_subscriber(filter, format, move || LogWriter(io::stderr(), format));
        // The only caller: no other subscriber is installed.
        let _ = tracing::subscriber::set_global_default(subscriber);
        Ok(())
    }

    /// Returns the filter of the options, or else of the variable; `None` if nothing is logged.
    fn parse_filter(&self, variable: Option<String>) -> Result<Option<EnvFilter>, CliError> {
        let level = match self.verbose {
            0 => {
                let filter = variable.unwrap_or_default();
                if filter.trim().is_empty() {
                    return Ok(None);
                }
                let parsed = EnvFilter::try_new(&filter);
                return parsed.map(Some).map_err(|_| CliError::LogFilter { filter });
            }
            1 => LevelFilter::INFO,
            2 => LevelFilter::DEBUG,
            _ => LevelFilter::TRACE,
        };
        Ok(Some(EnvFilter::default().add_directive(level.into())))
    }
}

/// Escapes each line of a log for people, which names that a guest has chosen and errors of servers
/// are in. The formatter writes an event at once, without colours.
struct LogWriter<W>(W, LogFormat);

impl<W: io::Write> io::Write for LogWriter<W> {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        match self.1 {
            LogFormat::Json => self.0.write_all(event)?,
            LogFormat::Text => {
                let text = String::from_utf8_lossy(event);
                let line = text.strip_suffix('\n').unwrap_or(&text);
                self.0.write_all((printable(line) + "\n").as_bytes())?;
            }
        }
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

fn new_subscriber<W>(
    filter: EnvFilter,
    format: LogFormat,
    writer: W,
) -> impl tracing::Subscriber + Send + Sync
where
    W: for<'w> tracing_subscriber::fmt::MakeWriter<'w> + Send + Sync + 'static,
{
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(writer)
        // Its report of a failed write would panic where standard error is closed.
        .log_internal_errors(false)
        // A line at the end of each span holds its duration.
        .with_span_events(FmtSpan::CLOSE);
    let lines = match format {
        LogFormat::Text => lines.boxed(),
        LogFormat::Json => lines.json().boxed(),
    };
    let own_events = filter_fn(|event| event.target().starts_with("chitin"));
    Registry::default().with(lines.with_filter(own_events).with_filter(filter))
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// A writer whose bytes can be read.
    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn log_events(filter: EnvFilter, format: LogFormat) -> String {
        let buffer = Buffer::default();
        let writer = buffer.clone();
        let writer = move || LogWriter(writer.clone(), format);
        let subscriber = new_subscriber(filter, format, writer);
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(target: "chitin_broker", host = %"a\u{1b}\u{202e}b", "own");
            tracing::trace!(target: "chitin", "detail");
            tracing::error!(target: "hyper", "foreign");
        });
        String::from_utf8(buffer.0.lock().unwrap().clone()).unwrap()
    }

    fn args(verbose: u8) -> LogArgs {
        LogArgs { verbose, log_format: LogFormat::Text }
    }

    #[test]
    fn only_events_of_chitin_are_logged() {
        let filter = args(3).parse_filter(None).unwrap().unwrap();
        let text = log_events(filter, LogFormat::Text);
        assert!(text.contains("own") && text.contains("detail"), "{text}");
        assert!(!text.contains("foreign"), "{text}");
        assert!(!text.contains(['\u{1b}', '\u{202e}']), "{text}");
        let filter = args(0).parse_filter(Some("hyper=trace".into())).unwrap().unwrap();
        assert_eq!(log_events(filter, LogFormat::Text), "");
    }

    #[test]
    fn json_log_is_one_object_per_line() {
        let filter = args(1).parse_filter(None).unwrap().unwrap();
        let text = log_events(filter, LogFormat::Json);
        let line: serde_json::Value = serde_json::from_str(text.trim_end()).unwrap();
        assert_eq!(line["fields"]["message"], "own");
        assert_eq!(line["fields"]["host"], "a\u{1b}\u{202e}b");
    }

    #[test]
    fn options_override_the_variable() {
        let filter = |verbose, variable: &str| {
            let filter = args(verbose).parse_filter(Some(variable.into()));
            filter.map(|filter| filter.map(|filter| filter.to_string()))
        };
        assert_eq!(filter(0, "").unwrap(), None);
        assert_eq!(filter(0, "debug").unwrap().as_deref(), Some("debug"));
        assert_eq!(filter(1, "trace").unwrap().as_deref(), Some("info"));
        assert!(matches!(filter(0, "chitin=loud"), Err(CliError::LogFilter { .. })));
    }
}
