//! Every claim of docs/threat-model.md names tests that exist.

use std::fs;

use crate::workspace;

/// Directories of the workspace root without sources of tests.
const OTHER: [&str; 3] = ["target", "xtask", "docs"];

/// Returns the sources of this workspace as one text.
fn read_sources() -> String {
    let mut text = String::new();
    let mut dirs = vec![workspace::root_dir()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if path.is_dir() && !OTHER.contains(&name) && !name.starts_with('.') {
                dirs.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                text.push_str(&fs::read_to_string(&path).unwrap());
            }
        }
    }
    text
}

/// Returns the rows `| CLAIM | TESTS |` of the tables whose second column is "tried by".
fn parse_claims(model: &str) -> Vec<(&str, &str)> {
    let mut claims = Vec::new();
    let mut inside = false;
    for line in model.lines() {
        let row = line.strip_prefix("| ").and_then(|line| line.strip_suffix(" |"));
        match row.and_then(|row| row.split_once(" | ")) {
            Some((_, HEADING)) => inside = true,
            Some(row) if inside => claims.push(row),
            Some(_) => {}
            None => inside = inside && line.starts_with("|---"),
        }
    }
    claims
}

/// The heading of the column of tests and attacks.
const HEADING: &str = "tried by";

#[test]
fn threat_model_names_existing_tests() {
    let model = fs::read_to_string(workspace::root_dir().join("docs/threat-model.md")).unwrap();
    let sources = read_sources();
    let claims = parse_claims(&model);
    assert!(claims.len() > 20, "only {} claims were found", claims.len());
    for (claim, tests) in claims {
        let functions: Vec<&str> = tests.split('`').skip(1).step_by(2).collect();
        let attacks: Vec<&str> = tests.split('"').skip(1).step_by(2).collect();
        assert!(functions.len() + attacks.len() > 0, "{claim}: no test tries to break it");
        for test in functions {
            assert!(sources.contains(&format!("fn {test}(")), "{claim}: no test `{test}`");
        }
        for attack in attacks {
            assert!(sources.contains(&format!("\"{attack}\",")), "{claim}: no attack \"{attack}\"");
        }
    }
}
