//! JSON that a terminal can show. Encoders escape the control characters below a space only.

use crate::is_invisible;

/// Returns JSON with the same value, in which control characters, and characters that are invisible
/// or change the order of others, are escaped.
///
/// A file of JSON is looked at in a terminal, and its strings may come from a guest. In JSON such
/// characters occur only within strings, except for line feeds of the layout, which are kept.
pub fn printable_json(json: &str) -> String {
    let mut safe = String::with_capacity(json.len());
    for c in json.chars() {
        if c != '\n' && (c.is_control() || is_invisible(c)) {
            for unit in c.encode_utf16(&mut [0; 2]) {
                safe.push_str(&format!("\\u{unit:04x}"));
            }
        } else {
            safe.push(c);
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_escaped_without_a_change_of_value() {
        let json = "{\n  \"host\": \"a\u{7f}\u{9b}2J\u{202e}\u{2028}\u{1f980}ä\\n\"\n}\n";
        let escaped = printable_json(json);
        assert_eq!(escaped, "{\n  \"host\": \"a\\u007f\\u009b2J\\u202e\\u2028\u{1f980}ä\\n\"\n}\n");
    }
}
