//! The documents name files of this repository that exist.

use std::fs;
use std::path::{Path, PathBuf};

fn root_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Returns the documents: the Markdown files in the root and in `docs/`.
fn documents() -> Vec<PathBuf> {
    let mut documents = Vec::new();
    for dir in [root_dir(), root_dir().join("docs")] {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            // The change log names files of the past.
            if path.extension().is_some_and(|extension| extension == "md")
                && !path.ends_with("CHANGELOG.md")
            {
                documents.push(path);
            }
        }
    }
    documents
}

/// Returns true if `text` is a path below one of the top-level directories of the repository.
fn is_repository_path(text: &str) -> bool {
    let plain = text.chars().all(|c| c.is_ascii_alphanumeric() || "/._-".contains(c));
    let top = text.split('/').next().filter(|top| text.contains('/') && !top.is_empty());
    plain && top.is_some_and(|top| top != "target" && root_dir().join(top).is_dir())
}

#[test]
fn paths_in_documents_exist() {
    let mut checked = 0;
    for document in documents() {
        let text = fs::read_to_string(&document).unwrap();
        for quoted in text.split('`').skip(1).step_by(2).filter(|text| is_repository_path(text)) {
            let found = root_dir().join(quoted).exists();
            assert!(found, "{}: there is no `{quoted}`", document.display());
            checked += 1;
        }
    }
    assert!(checked > 50, "only {checked} paths were found");
}

#[test]
fn links_in_documents_lead_to_files() {
    for document in documents() {
        let text = fs::read_to_string(&document).unwrap();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let file = link.split('#').next().unwrap_or_default();
            if file.is_empty() || file.contains("://") {
                continue;
            }
            let found = document.parent().unwrap().join(file).exists();
            assert!(found, "{}: there is no {link}", document.display());
        }
    }
}
