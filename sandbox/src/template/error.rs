use std::io;
use std::path::PathBuf;

/// An invalid template, or a failed operation on one.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The name is not valid as the name of a directory.
    #[error(
        "`{name}` is not a template name: letters, digits, `.`, `_` and `-`, at most {max}, the \
         first one not `.` or `-`"
    )]
    Name {
        /// The requested name.
        name: String,
        /// The largest length.
        max: usize,
    },
    /// There is no template of this name.
    #[error("there is no template `{name}` in {}: `chitin template ls` lists them", dir.display())]
    Missing {
        /// The requested name.
        name: String,
        /// The directory that was searched.
        dir: PathBuf,
    },
    /// A file of the template cannot be used.
    #[error("{operation} {}", path.display())]
    File {
        /// The operation.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// `template.json` is not valid.
    #[error("{} is damaged: build the template again", path.display())]
    Manifest {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: serde_json::Error,
    },
    /// The memory file is not the one that was sealed, or the key is not the one it was sealed
    /// with.
    #[error(
        "the memory of template `{0}` was changed, replaced or moved, or the key is another: build \
         the template again"
    )]
    Seal(String),
    /// No directory for templates is known.
    #[error("no home directory: set CHITIN_TEMPLATES to a directory for templates")]
    NoHome,
}
