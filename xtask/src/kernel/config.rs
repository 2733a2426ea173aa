//! Kconfig fragments: reading them, and checking that a final `.config` kept every promise.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// Options and their values; `n` for "is not set".
pub type Options = BTreeMap<String, String>;

/// All fragments together.
pub struct Fragments {
    /// What make gets, and what the cache key is made of: the option lines only, so that a better reason in a comment
    /// does not rebuild the kernel.
    pub text: String,
    /// The same, parsed.
    pub options: Options,
}

/// Reads `*.config` of a directory in the order of their names. No option may appear twice.
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
            fragment.lines().filter_map(|line| Some((line.trim_end(), option(line)?)))
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
pub fn parse(text: &str) -> Options {
    text.lines().filter_map(option).collect()
}

/// `CONFIG_X=value` or `# CONFIG_X is not set`; anything else is no option.
fn option(line: &str) -> Option<(String, String)> {
    let line = line.trim_end();
    if let Some(name) = line.strip_prefix("# ").and_then(|rest| rest.strip_suffix(" is not set")) {
        return is_name(name).then(|| (name.to_owned(), "n".to_owned()));
    }
    let (name, value) = line.split_once('=')?;
    is_name(name).then(|| (name.to_owned(), value.to_owned()))
}

fn is_name(text: &str) -> bool {
    text.strip_prefix("CONFIG_").is_some_and(|rest| {
        !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
    })
}

/// What was asked for and is not so, a line each. An option that Kconfig does not mention is not set.
pub fn mismatches(wanted: &Options, got: &Options) -> Vec<String> {
    let differing = wanted.iter().filter_map(|(name, wanted)| {
        let got = got.get(name).map_or("n", String::as_str);
        (got != wanted).then(|| format!("  {name}: asked for {wanted}, is {got}"))
    });
    differing.collect()
}

#[cfg(test)]
#[path = "config_test.rs"]
mod tests;
