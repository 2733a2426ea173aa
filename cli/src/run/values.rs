//! Values of the options of `chitin run`: copies, ports, bytes and environment variables.

use std::ffi::OsString;
use std::num::NonZeroU64;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use chitin::{HeaderField, ParseScopeError};

use crate::error::CliError;

/// The directory that relative paths in the sandbox start from, as for the workload itself.
pub const WORKDIR: &str = "/work";

/// `SRC:DST`, both paths resolved. The name of the source is added to a target that ends in a
/// slash, unless the source ends in `.` or `..`: that means the contents of the directory, as for
/// `cp -r` and `docker cp`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopySpec {
    pub source: PathBuf,
    pub target: PathBuf,
}

impl CopySpec {
    /// Parses a copy from the host to the sandbox.
    pub fn parse_copy_in(text: &str) -> Result<CopySpec, String> {
        // The path of the host may contain a colon, as those of timestamps do.
        let paths = text.rsplit_once(':').and_then(|(source, target)| resolve(source, target));
        let (source, target) = paths.ok_or("not of the form SRC:DST")?;
        Ok(CopySpec { source, target: Path::new(WORKDIR).join(target) })
    }

    /// Parses a copy from the sandbox to the host.
    pub fn parse_copy_out(text: &str) -> Result<CopySpec, String> {
        let paths = text.split_once(':').and_then(|(source, target)| resolve(source, target));
        let (source, target) = paths.ok_or("not of the form SRC:DST")?;
        Ok(CopySpec { source: Path::new(WORKDIR).join(source), target })
    }
}

fn resolve(text: &str, target: &str) -> Option<(PathBuf, PathBuf)> {
    if text.is_empty() || target.is_empty() {
        return None;
    }
    let source = PathBuf::from(text);
    let mut path = PathBuf::from(target);
    let means_contents = matches!(text.rsplit('/').next(), Some("." | ".."));
    if target.ends_with('/') && !means_contents {
        path.push(source.file_name()?);
    }
    Some((source, path))
}

/// Parses the name of a secret, and that of a header in which its placeholder is replaced.
pub fn parse_header(text: &str) -> Result<(String, HeaderField), String> {
    let (name, header) =
        text.split_once('=').ok_or("not of the form NAME=HEADER, such as TOKEN=X-My-Key")?;
    let header = header.parse().map_err(|error: ParseScopeError| error.to_string())?;
    Ok((name.to_owned(), header))
}

/// `HOST:GUEST`: a port of the host that is forwarded to one of the sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortPair {
    pub host: u16,
    pub guest: u16,
}

impl FromStr for PortPair {
    type Err = String;

    fn from_str(text: &str) -> Result<PortPair, String> {
        let port = |text: &str| text.parse().ok().filter(|port| *port > 0);
        let ports = text
            .split_once(':')
            .and_then(|(host, guest)| Some(PortPair { host: port(host)?, guest: port(guest)? }));
        ports.ok_or_else(|| "not of the form HOST:GUEST, two ports from 1 to 65535".into())
    }
}

/// Parses a positive number of bytes, with a unit as sizes have it.
pub fn parse_bytes(text: &str) -> Result<NonZeroU64, String> {
    let bytes = chitin::parse_bytes(text).map_err(|error| error.to_string())?;
    NonZeroU64::new(bytes).ok_or_else(|| "the number must be positive".into())
}

/// Parses the values of `--env`: `NAME=VALUE`, or a name whose value this process has.
pub fn parse_env(given: &[OsString]) -> Result<Vec<(OsString, OsString)>, CliError> {
    given.iter().map(parse_variable).collect()
}

fn parse_variable(text: &OsString) -> Result<(OsString, OsString), CliError> {
    let bytes = text.as_bytes();
    let argument = || text.display().to_string();
    match bytes.iter().position(|byte| *byte == b'=') {
        Some(0) => Err(CliError::EmptyVariable { argument: argument() }),
        Some(equals) => {
            let part = |bytes: &[u8]| OsString::from_vec(bytes.into());
            check_variable_name(&bytes[..equals])?;
            Ok((part(&bytes[..equals]), part(&bytes[equals + 1..])))
        }
        None => {
            check_variable_name(bytes)?;
            match std::env::var_os(text) {
                Some(value) => Ok((text.clone(), value)),
                None => Err(CliError::UnsetVariable { name: argument() }),
            }
        }
    }
}

/// Refuses names that a shell could not have set: they are mistakes in quoting, and programs that
/// read the environment line by line would see other variables.
fn check_variable_name(name: &[u8]) -> Result<(), CliError> {
    if name.iter().all(u8::is_ascii_graphic) {
        return Ok(());
    }
    Err(CliError::VariableName { name: String::from_utf8_lossy(name).into_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copy_target_is_a_path_or_a_directory() {
        let copy = |source: &str, target: &str| {
            Ok(CopySpec { source: source.into(), target: target.into() })
        };
        let (copy_in, copy_out) = (CopySpec::parse_copy_in, CopySpec::parse_copy_out);
        assert_eq!(copy_in("data/a.csv:/work/b.csv"), copy("data/a.csv", "/work/b.csv"));
        assert_eq!(copy_in("data/a.csv:/work/"), copy("data/a.csv", "/work/a.csv"));
        assert_eq!(copy_in("a:b:/x"), copy("a:b", "/x"));
        assert_eq!(copy_in("a.py:b.py"), copy("a.py", "/work/b.py"));
        assert_eq!(copy_out("out:reports/"), copy("/work/out", "reports/out"));
        assert_eq!(copy_out("/tmp/x:y"), copy("/tmp/x", "y"));
        for bad in ["", "a", "a:", ":b", "/:/work/"] {
            assert!(copy_in(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn dot_means_the_contents_of_a_directory() {
        let target = |text: &str| CopySpec::parse_copy_in(text).map(|copy| copy.target);
        for text in [".:/work/", "..:/work/", "data/.:/work/", "data/..:/work/", "./.:/work"] {
            assert_eq!(target(text), Ok("/work/".into()), "{text}");
        }
        for text in ["data:/work/", "data/:/work/", "./data:/work/"] {
            assert_eq!(target(text), Ok("/work/data".into()), "{text}");
        }
        assert_eq!(target(".hidden:/work/"), Ok("/work/.hidden".into()));
        let out = CopySpec::parse_copy_out("/work/.:out/").unwrap();
        assert_eq!((out.source, out.target), ("/work/.".into(), "out/".into()));
    }

    #[test]
    fn byte_counts_have_units() {
        let bytes = |text| parse_bytes(text).map(NonZeroU64::get);
        for (text, number) in [("1", 1), ("500k", 500 << 10), ("10M", 10 << 20), ("3G", 3 << 30)] {
            assert_eq!(bytes(text), Ok(number));
        }
        for bad in ["", "0", "0M", "-1", "1.5G", "18446744073709551615k"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn published_ports_are_pairs() {
        assert_eq!("8080:80".parse(), Ok(PortPair { host: 8080, guest: 80 }));
        for bad in
            ["", "80", "0:80", "80:0", "70000:80", "80:70000", "a:80", "80:", "-1:80", "1:2:3"]
        {
            assert!(bad.parse::<PortPair>().is_err(), "{bad}");
        }
    }

    #[test]
    fn environment_is_pairs_or_names_that_are_set() {
        let given = ["A=1", "B=", "C=x=y"].map(OsString::from);
        let pairs = [("A", "1"), ("B", ""), ("C", "x=y")].map(|(k, v)| (k.into(), v.into()));
        assert_eq!(parse_env(&given).unwrap(), pairs);
        let given = ["npm_config_a-b=1", "BASH_FUNC_f%%=x\ny"].map(OsString::from);
        assert!(parse_env(&given).is_ok());
        for bad in ["A\nB=1", "A B=1", "A\tB", "\u{1b}[2J=1", "Ä=1"] {
            let error = parse_env(&[bad.into()]).unwrap_err();
            assert!(matches!(error, CliError::VariableName { .. }), "{bad:?}: {error}");
        }
        let error = parse_env(&["=1".into()]).unwrap_err();
        assert!(matches!(error, CliError::EmptyVariable { .. }), "{error}");
        let error = parse_env(&["CHITIN_NO_SUCH".into()]).unwrap_err();
        assert!(matches!(error, CliError::UnsetVariable { .. }), "{error}");
    }
}
