//! Kconfig fragments, and the check that a final `.config` has all of their options.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// Options and their values; `n` for "is not set".
pub type Options = BTreeMap<String, String>;

/// All fragments together.
pub struct Fragments {
    /// The input of make and of the cache key: the option lines only, so that a change of a comment
    /// does not rebuild the kernel.
    pub text: String,
    /// The parsed lines.
    pub options: Options,
}

/// Reads the `*.config` of a directory in the order of their names. An option that is set twice is
/// an error.
pub fn read_fragments(dir: &Path) -> Result<Fragments> {
    let items = fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))?;
    let mut paths: Vec<_> = items.filter_map(|item| Some(item.ok()?.path())).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "config"));
    paths.sort();
    ensure!(!paths.is_empty(), "{} has no *.config", dir.display());
    let (mut text, mut options) = (String::new(), Options::new());
    for path in paths {
        let fragment =
            fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        for (line, (name, value)) in
            fragment.lines().filter_map(|line| Some((line.trim_end(), parse_option(line)?)))
        {
            ensure!(
                options.insert(name.clone(), value).is_none(),
                "{}: {name} is set twice",
                path.display()
            );
            text.push_str(line);
            text.push('\n');
        }
    }
    Ok(Fragments { text, options })
}

/// Parses a `.config`.
pub fn parse_config(text: &str) -> Options {
    text.lines().filter_map(parse_option).collect()
}

/// Parses `CONFIG_X=value` or `# CONFIG_X is not set`; other lines are not options.
fn parse_option(line: &str) -> Option<(String, String)> {
    let line = line.trim_end();
    if let Some(name) = line.strip_prefix("# ").and_then(|rest| rest.strip_suffix(" is not set")) {
        return is_option_name(name).then(|| (name.to_owned(), "n".to_owned()));
    }
    let (name, value) = line.split_once('=')?;
    is_option_name(name).then(|| (name.to_owned(), value.to_owned()))
}

fn is_option_name(text: &str) -> bool {
    text.strip_prefix("CONFIG_").is_some_and(|rest| {
        !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
    })
}

/// Returns a line for each option that has another value. An option that Kconfig does not mention
/// is not set.
pub fn list_mismatches(wanted: &Options, got: &Options) -> Vec<String> {
    let differing = wanted.iter().filter_map(|(name, wanted)| {
        let got = got.get(name).map_or("n", String::as_str);
        (got != wanted).then(|| format!("  {name}: is {got} instead of {wanted}"))
    });
    differing.collect()
}

#[cfg(test)]
#[path = "config_test.rs"]
mod tests;
