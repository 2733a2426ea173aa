//! The end-to-end tests that a filter and a tier select, and the expressions that select them.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::process::{capture_output, new_command};
use crate::workspace;

/// A way to isolate a sandbox, and the tests of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Tier {
    /// MicroVMs
    Ironclaw,
    /// gVisor, or crun or runc
    Nanoclaw,
    /// Docker
    Nemoclaw,
}

impl Tier {
    /// Every tier.
    pub const ALL: [Self; 3] = [Self::Ironclaw, Self::Nanoclaw, Self::Nemoclaw];

    /// Returns the tier of a test: those of containers are in a module of their tier's name, as
    /// `.config/nextest.toml` has it.
    fn of_test(name: &str) -> Self {
        let modules = name.rsplit_once("::").map_or("", |(modules, _)| modules);
        let in_module = |module: &str| modules.split("::").any(|part| part == module);
        if in_module("nanoclaw") {
            Self::Nanoclaw
        } else if in_module("nemoclaw") {
            Self::Nemoclaw
        } else {
            Self::Ironclaw
        }
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ironclaw => "ironclaw",
            Self::Nanoclaw => "nanoclaw",
            Self::Nemoclaw => "nemoclaw",
        })
    }
}

/// The end-to-end tests to run.
#[derive(Debug)]
pub struct Selection {
    filter: Option<String>,
    tier: Option<Tier>,
    /// Names of the tests that filter and tier select, with the tier of each.
    tests: BTreeMap<String, Tier>,
}

impl Selection {
    /// Compiles the end-to-end tests and selects those that match.
    ///
    /// # Errors
    /// No test matches, or the tests do not compile.
    pub fn find(filter: Option<&str>, tier: Option<Tier>) -> Result<Self> {
        if let Some(filter) = filter {
            check_filter(filter)?;
        }
        let mut list = new_command("cargo", ["nextest", "list", "--message-format", "json"]);
        list.args(["--package", "chitin-integration"]);
        if let Some(filter) = filter {
            list.args(["--filterset", &name_filter(filter)]);
        }
        let listed = capture_output(list.current_dir(workspace::root_dir()))
            .context("list the end-to-end tests")?;
        let mut tests = parse_list(&listed)?;
        tests.retain(|_, of| tier.is_none_or(|tier| tier == *of));
        ensure!(
            !tests.is_empty(),
            "no end-to-end test matches{}{}",
            filter.map_or_else(String::new, |filter| format!(" `{filter}`")),
            tier.map_or_else(String::new, |tier| format!(" on the tier {tier}")),
        );
        Ok(Self { filter: filter.map(str::to_owned), tier, tests })
    }

    /// Returns the number of selected tests of a tier.
    pub fn count(&self, tier: Tier) -> usize {
        self.tests.values().filter(|of| **of == tier).count()
    }

    /// Reports whether a test of this name is selected.
    pub fn contains(&self, test: &str) -> bool {
        self.tests.keys().any(|name| name.rsplit("::").next() == Some(test))
    }

    /// Returns the options of nextest that select these tests, and of them those that another
    /// expression selects. The tests of a tier are a matter of nextest's profile, except that one
    /// profile has both tiers of containers.
    pub fn options(&self, and: Option<&str>) -> Vec<String> {
        let tier = match self.tier {
            Some(tier @ (Tier::Nanoclaw | Tier::Nemoclaw)) => {
                Some(format!("test(/(^|::){tier}::/)"))
            }
            _ => None,
        };
        let filter = self.filter.as_deref().map(name_filter);
        let all = [filter, tier, and.map(str::to_owned)];
        let all: Vec<String> = all.into_iter().flatten().map(|each| format!("({each})")).collect();
        if all.is_empty() { Vec::new() } else { vec!["--filterset".into(), all.join(" & ")] }
    }
}

/// Returns the expression for tests with this text in their name or in that of their file.
fn name_filter(filter: &str) -> String {
    format!("test(~{filter}) | binary(~{filter})")
}

/// Fails unless a filter can stand in an expression as it is.
fn check_filter(filter: &str) -> Result<()> {
    ensure!(
        !filter.is_empty()
            && filter.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | ':')),
        "`{filter}` is not a filter: use letters, digits, `_`, `-` and `:`"
    );
    Ok(())
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct TestList {
    rust_suites: BTreeMap<String, Suite>,
}

#[derive(Deserialize)]
struct Suite {
    testcases: BTreeMap<String, TestCase>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct TestCase {
    filter_match: FilterMatch,
}

#[derive(Deserialize)]
struct FilterMatch {
    status: String,
}

fn parse_list(json: &str) -> Result<BTreeMap<String, Tier>> {
    let list: TestList = serde_json::from_str(json).context("read nextest's list of tests")?;
    let mut tests = BTreeMap::new();
    for (binary, suite) in list.rust_suites {
        for (name, case) in suite.testcases {
            if case.filter_match.status == "matches" {
                let tier = Tier::of_test(&name);
                tests.insert(format!("{binary}::{name}"), tier);
            }
        }
    }
    Ok(tests)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selection(filter: Option<&str>, tier: Option<Tier>) -> Selection {
        Selection { filter: filter.map(str::to_owned), tier, tests: BTreeMap::new() }
    }

    #[test]
    fn tier_of_a_test_is_its_module() {
        assert_eq!(Tier::of_test("exit::nanoclaw::codes"), Tier::Nanoclaw);
        assert_eq!(Tier::of_test("nemoclaw::codes"), Tier::Nemoclaw);
        assert_eq!(Tier::of_test("exit::ironclaw::codes"), Tier::Ironclaw);
        assert_eq!(Tier::of_test("without_nanoclaw_it_is_refused"), Tier::Ironclaw);
        assert_eq!(Tier::of_test("nanoclaw"), Tier::Ironclaw);
    }

    #[test]
    fn expressions_are_joined() {
        assert_eq!(selection(None, None).options(None), Vec::<String>::new());
        assert_eq!(selection(None, Some(Tier::Ironclaw)).options(None), Vec::<String>::new());
        assert_eq!(
            selection(Some("exit"), Some(Tier::Nemoclaw)).options(Some("not test(=x)")),
            [
                "--filterset",
                "(test(~exit) | binary(~exit)) & (test(/(^|::)nemoclaw::/)) & (not test(=x))"
            ]
        );
    }

    #[test]
    fn filter_with_syntax_is_refused() {
        assert!(check_filter("exit::ironclaw").is_ok());
        for filter in ["", "a)", "a | b", "a/b", "a b"] {
            assert!(check_filter(filter).is_err(), "{filter:?}");
        }
    }

    #[test]
    fn list_has_matching_tests_only() {
        let json = r#"{"rust-suites": {"chitin-integration::run": {"testcases": {
            "nanoclaw::a": {"ignored": false, "filter-match": {"status": "matches"}},
            "b": {"ignored": false, "filter-match": {"status": "mismatch", "reason": "string"}}
        }}}}"#;
        let tests = parse_list(json).unwrap();
        assert_eq!(
            tests.into_iter().collect::<Vec<_>>(),
            [("chitin-integration::run::nanoclaw::a".to_owned(), Tier::Nanoclaw)]
        );
    }
}
