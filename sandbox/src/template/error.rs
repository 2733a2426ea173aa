use std::io;
use std::path::PathBuf;

use super::store::MAX_NAME;

/// What can be wrong with a template.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The name could not be a directory's.
    #[error(
        "`{0}` is no name of a template: letters, digits, `.`, `_` and `-`, at most {MAX_NAME}, the first one not `.` or `-`"
    )]
    Name(String),
    /// There is no template of that name.
    #[error("there is no template `{name}` in {}: `chitin template ls` shows those there are", dir.display())]
    Missing {
        /// The name.
        name: String,
        /// Where it was looked for.
        dir: PathBuf,
    },
    /// A file of it cannot be used.
    #[error("{operation} {}", path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// `template.json` is not one of ours.
    #[error("{} is damaged: build the template again", path.display())]
    Manifest {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// The memory file is not the one that was sealed.
    #[error(
        "the memory of template `{0}` was changed, replaced or moved, or the key is another: build the template again"
    )]
    Seal(String),
    /// There is no place for templates.
    #[error("no home directory: name a directory for templates in CHITIN_TEMPLATES")]
    NoHome,
}
