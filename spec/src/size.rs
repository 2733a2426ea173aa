//! Sizes with units, as options and policies write them.

use std::str::FromStr;

use schemars::JsonSchema;
use serde::Deserialize;

/// A text that is not a size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ParseSizeError {
    /// It is not a number with a unit.
    #[error("not a size: write a whole number with a unit such as 500k, 512M or 1G")]
    Invalid,
    /// It does not fit 64 bits.
    #[error("the size is too large")]
    TooLarge,
    /// It is not a multiple of a MiB.
    #[error("the size is not a whole number of MiB: write 512M or 1G")]
    Fraction,
}

/// The units, each 1024 times the one before. `i` and `B` may follow: `k`, `KiB`.
const UNITS: [(char, u32); 4] = [('k', 10), ('m', 20), ('g', 30), ('t', 40)];

/// The binary logarithm of a MiB.
const MIB: u32 = 20;

/// Parses a number of bytes; a plain number has the unit byte.
///
/// # Errors
/// Not a whole number with a unit, or more than 64 bits.
pub fn parse_bytes(text: &str) -> Result<u64, ParseSizeError> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let shift = match &text[digits.len()..] {
        "" => 0,
        unit => parse_unit(unit).ok_or(ParseSizeError::Invalid)?,
    };
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(ParseSizeError::Invalid);
    }
    let number = u64::from_str(digits).map_err(|_| ParseSizeError::TooLarge)?;
    number.checked_mul(1 << shift).ok_or(ParseSizeError::TooLarge)
}

/// Parses a number of MiB; a plain number has the unit MiB.
///
/// # Errors
/// As for [`parse_bytes`], or not a multiple of a MiB.
pub fn parse_mib(text: &str) -> Result<u64, ParseSizeError> {
    if text.bytes().all(|byte| byte.is_ascii_digit()) {
        return parse_bytes(text);
    }
    let bytes = parse_bytes(text)?;
    if bytes.trailing_zeros() < MIB { Err(ParseSizeError::Fraction) } else { Ok(bytes >> MIB) }
}

fn parse_unit(unit: &str) -> Option<u32> {
    let mut letters = unit.chars();
    let letter = letters.next()?.to_ascii_lowercase();
    let (_, shift) = UNITS.into_iter().find(|(unit, _)| *unit == letter)?;
    // `MB` is read as 1024² by some programs and as 1000² by others.
    matches!(letters.as_str(), "" | "i" | "iB").then_some(shift)
}

/// A size in MiB from `MIN` to `MAX`: an integer, or a string with a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mebibytes<const MIN: u32, const MAX: u32>(pub u32);

impl<'de, const MIN: u32, const MAX: u32> Deserialize<'de> for Mebibytes<MIN, MAX> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Size;
        impl serde::de::Visitor<'_> for Size {
            type Value = i128;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an integer of MiB, or a size such as 512M")
            }

            fn visit_i64<E>(self, number: i64) -> Result<i128, E> {
                Ok(number.into())
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<i128, E> {
                // A string of digits alone may mean another unit.
                if text.bytes().all(|byte| byte.is_ascii_digit()) {
                    return Err(E::invalid_type(serde::de::Unexpected::Str(text), &self));
                }
                parse_mib(text).map(i128::from).map_err(E::custom)
            }
        }
        let number = deserializer.deserialize_any(Size)?;
        match u32::try_from(number) {
            Ok(number) if (MIN..=MAX).contains(&number) => Ok(Mebibytes(number)),
            _ => Err(serde::de::Error::custom(format!(
                "{number} MiB is out of range: use {MIN} to {MAX}"
            ))),
        }
    }
}

impl<const MIN: u32, const MAX: u32> JsonSchema for Mebibytes<MIN, MAX> {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        format!("Mebibytes{MIN}To{MAX}").into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "oneOf": [
                { "type": "integer", "minimum": MIN, "maximum": MAX },
                { "type": "string", "pattern": "^[0-9]+[kKmMgGtT](iB?)?$" },
            ]
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_number_has_the_unit_of_its_option() {
        assert_eq!((parse_bytes("4096"), parse_mib("512")), (Ok(4096), Ok(512)));
        for (text, mib) in [("512M", 512), ("1G", 1024), ("2g", 2048), ("1T", 1 << 20)] {
            assert_eq!((parse_mib(text), parse_bytes(text)), (Ok(mib), Ok(mib << 20)), "{text}");
        }
        for (text, bytes) in [("500k", 500 << 10), ("1KiB", 1024), ("3Mi", 3 << 20), ("0", 0)] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        assert_eq!(parse_mib("2048k"), Ok(2));
    }

    #[test]
    fn invalid_size_is_rejected() {
        for bad in ["", "G", "-1", "+1", "1.5G", "10 M", "1MB", "1B", "1ä", "1kk", "M1", " 1"] {
            assert_eq!(parse_bytes(bad), Err(ParseSizeError::Invalid), "{bad}");
            assert_eq!(parse_mib(bad), Err(ParseSizeError::Invalid), "{bad}");
        }
        for large in ["18446744073709551616", "18446744073709551615k", "99999999999T"] {
            assert_eq!(parse_bytes(large), Err(ParseSizeError::TooLarge), "{large}");
        }
        assert_eq!(parse_mib("1500k"), Err(ParseSizeError::Fraction));
    }
}
