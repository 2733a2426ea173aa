//! Text that a person reads on a terminal: chains of errors, and text from outside.
//!
//! Every program and layer of the host prints with these functions, and the crate imports none of
//! them.
#![forbid(unsafe_code)]

mod json;
mod limits;

use std::error::Error;

pub use json::printable_json;
pub use limits::{explain_limit, explain_memory_lock, explain_refused_process};

/// Returns an error and its causes as one line that a terminal can show.
///
/// A cause that the line already contains is left out: some libraries repeat their source in their
/// own text. A limit of this process that explains the error is named. Control characters are
/// escaped, see [`printable`].
pub fn error_chain(error: &(dyn Error + 'static)) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let text = cause.to_string();
        if !line.contains(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        source = cause.source();
    }
    if let Some(limit) = explain_limit(error) {
        line.push_str(": ");
        line.push_str(&limit);
    }
    printable(&line)
}

/// Escapes control characters except the tab, and characters that are invisible or change the order
/// of others.
///
/// Text from a guest, or text that holds a path, may contain escape sequences that a terminal would
/// obey, or direction marks that make it look like another text.
pub fn printable(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() && c != '\t' || is_invisible(c) {
            safe.extend(c.escape_default());
        } else {
            safe.push(c);
        }
    }
    safe
}

/// Returns true for format characters (Unicode category Cf) and line separators: direction marks,
/// embeddings, overrides and isolates (UAX #9), joiners, and tags.
pub fn is_invisible(c: char) -> bool {
    matches!(c,
        '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{feff}' | '\u{200b}'..='\u{200f}'
        | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{fff9}'..='\u{fffb}'
        | '\u{e0001}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{operation}")]
    struct Failed {
        operation: &'static str,
        source: io::Error,
    }

    #[test]
    fn control_characters_are_escaped() {
        assert_eq!(printable("a\u{1b}[2Jb\u{9b}c\td"), "a\\u{1b}[2Jb\\u{9b}c\td");
    }

    #[test]
    fn invisible_characters_are_escaped() {
        for c in
            ['\u{202e}', '\u{2066}', '\u{200f}', '\u{61c}', '\u{200b}', '\u{feff}', '\u{e0041}']
        {
            let escaped = printable(&format!("a{c}b"));
            assert!(escaped.is_ascii() && escaped.starts_with("a\\u{"), "{escaped}");
        }
        assert_eq!(printable("Grüße, 世界"), "Grüße, 世界");
    }

    #[test]
    fn chain_names_the_limit_behind_it() {
        let source = io::Error::from_raw_os_error(24);
        let line = error_chain(&Failed { operation: "open a", source });
        assert!(line.starts_with("open a: ") && line.contains("`ulimit -n`"), "{line}");
    }

    #[test]
    fn chain_is_one_line() {
        let not_found = || io::Error::from(io::ErrorKind::NotFound);
        let error = Failed { operation: "write\nreport.json", source: not_found() };
        assert_eq!(error_chain(&error), "write\\nreport.json: entity not found");
    }

    #[test]
    fn repeated_cause_is_left_out() {
        let source = io::Error::from(io::ErrorKind::NotFound);
        let error = Failed { operation: "open a: entity not found", source };
        assert_eq!(error_chain(&error), "open a: entity not found");
    }
}
