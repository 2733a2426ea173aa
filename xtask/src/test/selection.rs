//! The end-to-end tests that a filter and a tier select, and the expressions that select them.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde::de::IgnoredAny;

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
    /// The expression that selects the tests of the filter.
    filterset: Option<String>,
    tier: Option<Tier>,
    tests: Vec<Test>,
}

/// An end-to-end test.
#[derive(Debug, PartialEq, Eq)]
struct Test {
    /// The name of its file.
    binary: String,
    /// Its name, with its modules.
    name: String,
    tier: Tier,
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
        let listed = capture_output(list.current_dir(workspace::root_dir()))
            .context("list the end-to-end tests")?;
        let mut tests = parse_list(&listed)?;
        let filterset = filter.map(|filter| build_filterset(filter, &tests));
        tests.retain(|test| {
            tier.is_none_or(|tier| tier == test.tier)
                && filter
                    .is_none_or(|filter| test.name.contains(filter) || test.binary.contains(filter))
        });
        ensure!(
            !tests.is_empty(),
            "no end-to-end test matches{}{}",
            filter.map_or_else(String::new, |filter| format!(" `{filter}`")),
            tier.map_or_else(String::new, |tier| format!(" on the tier {tier}")),
        );
        Ok(Self { filterset, tier, tests })
    }

    /// Returns the number of selected tests of a tier.
    pub fn count(&self, tier: Tier) -> usize {
        self.tests.iter().filter(|test| test.tier == tier).count()
    }

    /// Reports whether a test of this name is selected.
    pub fn contains(&self, name: &str) -> bool {
        self.tests.iter().any(|test| test.name.rsplit("::").next() == Some(name))
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
        let all = [self.filterset.clone(), tier, and.map(str::to_owned)];
        let all: Vec<String> = all.into_iter().flatten().map(|each| format!("({each})")).collect();
        if all.is_empty() { Vec::new() } else { vec!["--filterset".into(), all.join(" & ")] }
    }
}

/// Returns the expression for tests with this text in their name or in that of their file. An
/// expression for files that do not exist is an error of nextest.
fn build_filterset(filter: &str, tests: &[Test]) -> String {
    if tests.iter().any(|test| test.binary.contains(filter)) {
        format!("test(~{filter}) | binary(~{filter})")
    } else {
        format!("test(~{filter})")
    }
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
    rust_suites: BTreeMap<String, TestBinary>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct TestBinary {
    binary_name: String,
    testcases: BTreeMap<String, IgnoredAny>,
}

fn parse_list(json: &str) -> Result<Vec<Test>> {
    let list: TestList = serde_json::from_str(json).context("read nextest's list of tests")?;
    let mut tests = Vec::new();
    for TestBinary { binary_name, testcases } in list.rust_suites.into_values() {
        for name in testcases.into_keys() {
            let tier = Tier::of_test(&name);
            tests.push(Test { binary: binary_name.clone(), name, tier });
        }
    }
    Ok(tests)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selection(filterset: Option<&str>, tier: Option<Tier>) -> Selection {
        Selection { filterset: filterset.map(str::to_owned), tier, tests: Vec::new() }
    }

    fn test(binary: &str, name: &str) -> Test {
        Test { binary: binary.into(), name: name.into(), tier: Tier::of_test(name) }
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
            selection(Some("a | b"), Some(Tier::Nemoclaw)).options(Some("not test(=x)")),
            ["--filterset", "(a | b) & (test(/(^|::)nemoclaw::/)) & (not test(=x))"]
        );
    }

    #[test]
    fn filter_matches_files_that_exist() {
        let tests = [test("run", "reads"), test("conformance", "exit::ironclaw::codes")];
        assert_eq!(build_filterset("exit", &tests), "test(~exit)");
        assert_eq!(build_filterset("conf", &tests), "test(~conf) | binary(~conf)");
    }

    #[test]
    fn filter_with_syntax_is_refused() {
        assert!(check_filter("exit::ironclaw").is_ok());
        for filter in ["", "a)", "a | b", "a/b", "a b"] {
            assert!(check_filter(filter).is_err(), "{filter:?}");
        }
    }

    #[test]
    fn list_of_nextest_is_parsed() {
        let json = r#"{"rust-suites": {"chitin-integration::run": {
            "binary-name": "run",
            "testcases": {"nanoclaw::a": {"ignored": false}, "b": {"ignored": false}}
        }}}"#;
        assert_eq!(parse_list(json).unwrap(), [test("run", "b"), test("run", "nanoclaw::a")]);
    }
}
