//! The tests to run: all of the workspace, or the end-to-end tests that a filter and a tier select.

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

/// The package of end-to-end tests.
pub const END_TO_END: &str = "chitin-integration";

/// The packages that Cargo compiles. Their dependencies have the features that these packages ask
/// for: a run that changed between the two would compile them twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// All packages.
    Workspace,
    /// The package of end-to-end tests.
    EndToEnd,
}

impl Scope {
    /// Returns the options of Cargo and of nextest.
    pub fn options(self) -> &'static [&'static str] {
        match self {
            Self::Workspace => &["--workspace"],
            Self::EndToEnd => &["--package", END_TO_END],
        }
    }
}

/// The tests to run.
#[derive(Debug)]
pub struct Selection {
    /// The packages that were compiled.
    pub scope: Scope,
    /// The expression that selects the tests of the filter.
    filterset: Option<String>,
    tier: Option<Tier>,
    tests: Vec<Test>,
}

/// A test.
#[derive(Debug, PartialEq, Eq)]
struct Test {
    package: String,
    /// The name of its file, for an end-to-end test.
    binary: String,
    /// Its name, with its modules.
    name: String,
    /// Its name in reports of nextest: that of the binary and its own.
    report_name: String,
}

impl Selection {
    /// Compiles all tests of the workspace and selects them.
    pub fn find_all() -> Result<Self> {
        let tests = list_tests(Scope::Workspace)?;
        Ok(Self { scope: Scope::Workspace, filterset: None, tier: None, tests })
    }

    /// Compiles the end-to-end tests and selects those that match.
    ///
    /// # Errors
    /// No test matches, or the tests do not compile.
    pub fn find_matching(filter: Option<&str>, tier: Option<Tier>) -> Result<Self> {
        if let Some(filter) = filter {
            check_filter(filter)?;
        }
        let mut tests = list_tests(Scope::EndToEnd)?;
        let filterset = filter.map(|filter| build_filterset(filter, &tests));
        tests.retain(|test| {
            tier.is_none_or(|tier| test.tier() == Some(tier))
                && filter
                    .is_none_or(|filter| test.name.contains(filter) || test.binary.contains(filter))
        });
        ensure!(
            !tests.is_empty(),
            "no end-to-end test matches{}{}",
            filter.map_or_else(String::new, |filter| format!(" `{filter}`")),
            tier.map_or_else(String::new, |tier| format!(" on the tier {tier}")),
        );
        Ok(Self { scope: Scope::EndToEnd, filterset, tier, tests })
    }

    /// Returns the names of the selected tests in reports of nextest.
    pub fn report_names(&self) -> impl Iterator<Item = &str> {
        self.tests.iter().map(|test| test.report_name.as_str())
    }

    /// Returns the number of selected tests of a tier.
    pub fn count(&self, tier: Tier) -> usize {
        self.tests.iter().filter(|test| test.tier() == Some(tier)).count()
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
    package_name: String,
    binary_name: String,
    testcases: BTreeMap<String, IgnoredAny>,
}

impl Test {
    /// Returns the tier of an end-to-end test.
    fn tier(&self) -> Option<Tier> {
        (self.package == END_TO_END).then(|| Tier::of_test(&self.name))
    }
}

/// Compiles tests and lists them.
fn list_tests(scope: Scope) -> Result<Vec<Test>> {
    let mut list = new_command("cargo", ["nextest", "list", "--message-format", "json"]);
    list.args(scope.options()).current_dir(workspace::root_dir());
    parse_list(&capture_output(&mut list).context("list the tests")?)
}

fn parse_list(json: &str) -> Result<Vec<Test>> {
    let list: TestList = serde_json::from_str(json).context("read nextest's list of tests")?;
    let mut tests = Vec::new();
    for (id, suite) in list.rust_suites {
        for name in suite.testcases.into_keys() {
            tests.push(Test {
                package: suite.package_name.clone(),
                binary: suite.binary_name.clone(),
                report_name: format!("{id} {name}"),
                name,
            });
        }
    }
    Ok(tests)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selection(filterset: Option<&str>, tier: Option<Tier>) -> Selection {
        let filterset = filterset.map(str::to_owned);
        Selection { scope: Scope::EndToEnd, filterset, tier, tests: Vec::new() }
    }

    fn test(binary: &str, name: &str) -> Test {
        Test {
            package: END_TO_END.into(),
            binary: binary.into(),
            name: name.into(),
            report_name: format!("{END_TO_END}::{binary} {name}"),
        }
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
            "package-name": "chitin-integration",
            "binary-name": "run",
            "testcases": {"nanoclaw::a": {"ignored": false}, "b": {"ignored": false}}
        }}}"#;
        assert_eq!(parse_list(json).unwrap(), [test("run", "b"), test("run", "nanoclaw::a")]);
    }
}
