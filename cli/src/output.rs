//! The lines that this program prints for people, on standard output and standard error.
//!
//! `println!` and `eprintln!` panic if they cannot write. A closed pipe or a full disk behind a
//! stream must end neither a run nor its clean-up.

use std::fmt;
use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};

use chitin::printable;

use crate::error::CliError;

/// The first failure to write to standard output.
static FAILURE: Mutex<Option<io::Error>> = Mutex::new(None);

/// Prints a notice on standard error. If nobody can read it, the run goes on without it.
macro_rules! notice {
    ($($arg:tt)*) => { $crate::output::print_notice(format_args!($($arg)*)) };
}

/// Prints a line of the result on standard output.
macro_rules! output {
    ($($arg:tt)*) => { $crate::output::print_line(format_args!($($arg)*)) };
}

pub(crate) use {notice, output};

/// Prints one line on standard error. A failure is ignored: there is nowhere to report it.
pub fn print_notice(line: fmt::Arguments<'_>) {
    // One write for the whole line, so that lines of several processes do not mix.
    let _ = io::stderr().write_all(format_notice(line).as_bytes());
}

/// Escapes a notice, whose reasons may come from a guest, and ends it.
fn format_notice(line: fmt::Arguments<'_>) -> String {
    printable(&line.to_string()) + "\n"
}

/// Prints one line on standard output. [`finish`] reports the first failure.
pub fn print_line(line: fmt::Arguments<'_>) {
    let written = writeln!(io::stdout(), "{line}");
    record_failure(written);
}

/// Writes what is buffered, and returns the first failure to write to standard output.
///
/// A reader that has gone, such as `head`, wants no more: that is no failure.
pub fn finish() -> Result<(), CliError> {
    record_failure(io::stdout().flush());
    let failure = FAILURE.lock().unwrap_or_else(PoisonError::into_inner).take();
    match failure {
        Some(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(CliError::io("write to standard output")(error))
        }
        _ => Ok(()),
    }
}

/// Remembers a failure to write to standard output, for [`finish`].
pub fn record_failure(written: io::Result<()>) {
    if let Err(error) = written {
        FAILURE.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notice_is_one_escaped_line() {
        let failure = "a\nb\u{1b}[2J\u{202e}";
        let line = format_notice(format_args!("chitin: {failure}"));
        assert_eq!(line, "chitin: a\\nb\\u{1b}[2J\\u{202e}\n");
    }
}
