//! Durations on the command line: `90s`, `10m`, `1h`, `1500ms`; a bare number is seconds.

use std::time::Duration;

/// Parses a duration; the error says what is accepted.
pub fn parse(text: &str) -> Result<Duration, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor = match unit {
        "ms" => 1,
        "" | "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(format!("{text:?} is no duration: write 500ms, 90s, 10m or 1h")),
    };
    let number: u64 = number
        .parse()
        .map_err(|_| format!("{text:?} is no duration: write 500ms, 90s, 10m or 1h"))?;
    number
        .checked_mul(factor)
        .map(Duration::from_millis)
        .ok_or_else(|| format!("{text:?} is too long"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units() {
        assert_eq!(parse("1500ms"), Ok(Duration::from_millis(1500)));
        assert_eq!(parse("90"), Ok(Duration::from_secs(90)));
        assert_eq!(parse("10m"), Ok(Duration::from_secs(600)));
        assert_eq!(parse("1h"), Ok(Duration::from_secs(3600)));
    }

    #[test]
    fn nonsense_is_refused() {
        for text in
            ["", "s", "-1s", "1.5s", "1 s", "1d", "99999999999999999999h", "18446744073709551615h"]
        {
            assert!(parse(text).is_err(), "{text:?}");
        }
    }
}
